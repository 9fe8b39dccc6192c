"""Factors of wide sides in blocks, against dense block-diagonal matrices in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmaker import METHODS, cost_report
from gradmaker.capture.one_hot import OneHot
from gradmaker.curvature import FisherExact
from gradmaker.curvature.evidence import Outer
from gradmaker.curvature.products import Factors
from gradmaker.linalg.factors import (
    average_trace,
    blocks,
    conjugate,
    dense,
    identity,
    join,
    split,
    tile_width,
    transpose,
)
from gradmaker.linalg.state import State
from gradmaker.representations import Kron
from gradmaker.representations.base import Fold, Frame
from gradmaker.solvers import CG, Cholesky, DenmanBeavers, Eigh, HigherOrder, NewtonRoot, NewtonSchulz, Solver
from tests import models, oracles
from tests.live import Live
from tests.models import CLASSES, Case

pytestmark = pytest.mark.usefixtures("double")
EVERY_STEP: dict[str, Any] = {"curvature_interval": 1, "preconditioner_interval": 1, "warmup_steps": 0, "stagger": False}
NEW, FURTHER = Fold(0.0, 1.0, 1.0), Fold(0.7, 0.3, 0.3)


def mask(d: int, width: int) -> Tensor:
    """One where two coordinates lie in one block.  # (d, d)"""
    return torch.tensor([[float(j // width == k // width) for k in range(d)] for j in range(d)])


# --- the form -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("d", "limit", "width"), [(10, 4, 4), (9, 4, 3), (8, 4, 4), (5, 4, 3), (4, 4, 4), (3, None, 3), (7, 1, 1)]
)
def test_as_few_blocks_as_the_limit_allows(d: int, limit: int | None, width: int) -> None:
    assert tile_width(d, limit) == width
    F = torch.randn(2, d, width)
    for rows, block in blocks(F):
        F[:, rows, block.shape[-1] :] = 0  # to the right of the last, smaller block
        assert block.shape[-1] == rows.stop - rows.start <= (limit or d)
    whole = dense(F)
    assert torch.equal(whole, whole * mask(d, width)) and whole.ne(0).sum() == 2 * mask(d, width).sum()
    if width < d:
        assert torch.equal(join(split(F), d), F)
    assert torch.equal(dense(transpose(F)), whole.mT)
    assert torch.equal(dense(identity(F).expand_as(F)), torch.eye(d).expand(2, d, d))
    assert oracles.relative_error(average_trace(F), whole.diagonal(dim1=1, dim2=2).mean(1)) < 1e-14
    v = torch.rand(2, d)
    assert oracles.relative_error(dense(conjugate(F, v)), whole @ torch.diag_embed(v) @ whole.mT) < 1e-13


# --- the statistic --------------------------------------------------------------------------------------------------------
G, k, n, r, i, o = 2, 2, 4, 3, 7, 5


def outer(bias: bool = True, weights: Tensor | None = None) -> Outer:
    return Outer(torch.randn(G, n, r, i), torch.randn(k, G, n, r, o), bias, weights=weights)


def factors_known() -> Factors:
    A, B = torch.randn(G, i, i), torch.randn(G, o, o)
    return Factors(A @ A.mT, B @ B.mT)


EVIDENCE: dict[str, tuple[Callable[[], Any], tuple[int, int], int]] = {  # with the block's shape and the number of blocks
    "bias": (outer, (o, i + 1), G),
    "plain": (lambda: outer(False), (o, i), G),
    "masked": (lambda: outer(weights=torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1.0]])), (o, i + 1), G),
    "bias_only": (lambda: Outer(torch.randn(G, n, r, 0), torch.randn(k, G, n, r, o), True), (o, 1), G),
    "one_hot": (lambda: Outer(OneHot(torch.randint(9, (n, r)), 9), torch.randn(k, 1, n, r, o), transposed=True), (9, o), 1),
    "known": (factors_known, (o, i), G),
    "inputs": (lambda: Outer(torch.randn(G, n, r, i), torch.randn(0, G, n, r, o), True, kind="inputs"), (o, i + 1), G),
}


def both(name: str, limit: int, sharing: Any = "expand") -> tuple[Kron, State, Kron, State, Frame]:
    """Two chunks of evidence, in blocks and whole."""
    make, shape, stack = EVIDENCE[name]
    diagonal = frozenset({0}) if name == "one_hot" else frozenset()
    frame = Frame(stack, shape, diagonal, torch.float64, torch.device("cpu"), limit)
    tiled, whole = Kron(sharing=sharing, wide_sides="blocks"), Kron(sharing=sharing)
    states = tiled.init(frame), whole.init(frame)
    for fold in (NEW, FURTHER):
        evidence = make()
        for representation, state in zip((tiled, whole), states, strict=True):
            representation.update(state, evidence, fold)
    return tiled, states[0], whole, states[1], frame


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", EVIDENCE)
def test_a_factor_is_the_block_diagonal_of_the_whole(name: str, sharing: str, limit: int) -> None:
    """The bias is the last coordinate, in a block of its own where 7 inputs make one of 7; a one-hot side is a diagonal."""
    tiled, state, whole, full, frame = both(name, limit, sharing)
    for side, (found, F) in enumerate(zip(tiled.factors(state), whole.factors(full), strict=True)):
        d = frame.shape[side]
        expected = dense(F) * mask(d, tile_width(d, limit))
        assert oracles.relative_error(dense(found), expected) < 1e-13
        assert state["left" if side == 0 else "right"].numel() <= d * min(d, limit) * frame.stack
    v = torch.randn(frame.stack, *frame.shape)
    C = tiled.to_dense(state)
    assert oracles.relative_error(tiled.matvec(state, v).flatten(1), (C @ v.flatten(1).unsqueeze(-1)).squeeze(-1)) < 1e-13


def test_blocks_that_hold_a_side_are_the_whole_and_blocks_of_one_the_diagonal() -> None:
    tiled, state, whole, full, frame = both("bias", 8)
    assert all(torch.equal(state[key], full[key]) for key in full)
    tiled, state, *_ = both("bias", 1)
    flat = Kron()
    other = flat.init(replace(frame, diagonal=frozenset({0, 1})))
    torch.manual_seed(0)
    tiled, state, _, _, _ = both("bias", 1)
    torch.manual_seed(0)
    for fold in (NEW, FURTHER):
        flat.update(other, outer(), fold)
    for F, a in zip(tiled.factors(state), flat.factors(other), strict=True):
        assert F.shape == (*a.shape, 1) and oracles.relative_error(F[..., 0], a) < 1e-14


# --- solvers --------------------------------------------------------------------------------------------------------------
SOLVERS: dict[str, Solver] = {
    "cholesky": Cholesky(damping=0.3),
    "cholesky_each": Cholesky(damping=0.3, split="each"),
    "eigh": Eigh(damping=0.3),
    "eigh_pi": Eigh(damping=0.3, split="pi", power=-0.5),
    "eigh_each": Eigh(damping=0.3, split="each", mode="largest"),
    "eigh_clamp": Eigh(damping=0.3, mode="clamp"),
    "newton": NewtonRoot(power=-0.5, damping=0.1, mode="absolute", tolerance=1e-12),
    "newton_largest": NewtonRoot(power=-0.5, damping=0.1),
    "higher_order": HigherOrder(power=-0.5, damping=0.1, mode="trace", tolerance=1e-12),
    "newton_schulz": NewtonSchulz(power=-0.5, damping=0.1, mode="trace", tolerance=1e-12),
    "denman_beavers": DenmanBeavers(power=-0.5, damping=0.1, mode="trace", tolerance=1e-12),
    "cg": CG(damping=0.3, tolerance=1e-13),
}
LOOSE = {"newton_largest": 0.05}  # the ridge is a share of an estimate


@pytest.mark.parametrize("limit", [1, 3, 4])
@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_take_them_as_the_matrices_that_they_are(name: str, limit: int) -> None:
    """Against the same factors, formed; and against the definition."""
    solver = SOLVERS[name]
    tiled, state, whole, full, frame = both("known", limit)
    masked = {key: dense(state[key]) if state[key].ndim == 3 else state[key] for key in full}
    g = torch.randn(G, *frame.shape)
    found = solver.solve(tiled, solver.prepare(tiled, state, None), g)
    expected = solver.solve(whole, solver.prepare(whole, masked, None), g)
    assert oracles.relative_error(found, expected) < LOOSE.get(name, 1e-8)
    P = solver.operator(tiled, state)
    assert oracles.relative_error(P, solver.operator(whole, masked)) < 1e-12
    assert oracles.relative_error(found.flatten(1), (P @ g.flatten(1).unsqueeze(-1)).squeeze(-1)) < LOOSE.get(name, 1e-8)


@pytest.mark.parametrize("solver", [Cholesky(damping=0.1), Eigh(damping=0.1), NewtonRoot(damping=0.1)])
def test_a_block_that_fails_loses_its_member_alone(solver: Solver) -> None:
    tiled, state, *_ = both("known", 3)
    good = solver.prepare(tiled, state, None)
    g = torch.randn(G, o, i)
    broken = {key: v.clone() for key, v in state.items()}
    broken["right"][1, 5, 1] = torch.nan
    cache = solver.prepare(tiled, broken, good)
    assert cache["failures"].tolist() == [0, 1]
    assert torch.equal(solver.solve(tiled, cache, g), solver.solve(tiled, good, g))
    alone = solver.solve(tiled, solver.prepare(tiled, broken, None), g)[1] / g[1]
    assert oracles.relative_error(alone, alone[0, 0].expand_as(alone)) < 1e-12  # without a past: a multiple of the gradient


def test_a_block_is_rescued_by_a_larger_ridge() -> None:
    """An indefinite block is tried again, the others keep their bits; the diagnosis tells of the most retries."""
    tiled, state, *_ = both("known", 3)
    broken = {key: v.clone() for key, v in state.items()}
    rows, block = blocks(broken["right"])[1]
    s, Q = torch.linalg.eigh(block[0])
    s[0] = -1e-12 * s[-1]
    block[0] = Q @ torch.diag(s) @ Q.mT
    solver = Cholesky(damping=1e-30)
    good, cache = solver.prepare(tiled, state, None), solver.prepare(tiled, broken, None)
    assert cache["failures"].tolist() == [0, 0] and cache["diagnosis"][0, 1, 4] >= 1 and cache["diagnosis"][1, 1, 4] == 0
    assert torch.equal(good["root_1"][1], cache["root_1"][1]) and cache["root_1"].isfinite().all()


# --- methods --------------------------------------------------------------------------------------------------------------
def wide(n: int = 6) -> Case:
    """11 and 13 units, seen in blocks of at most 5, with a group convolution before."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv1d(4, 12, 3, groups=2)
            self.body, self.norm = nn.Linear(12, 13), nn.LayerNorm(13)
            self.head = nn.Linear(13, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(torch.tanh(self.norm(self.body(torch.tanh(self.convolution(x)).mT))).mean(1))
            return y

    return models.build(Net, n, 4, 5)


def maker_of(case: Case, method: str, **options: Any) -> Any:
    options = {**EVERY_STEP, "damping": 0.05, "wide_sides": "blocks", "max_dim": 5, **options}
    return METHODS[method](case.model, METHODS[method].Config(**options))


def step(maker: Any, case: Case) -> Any:
    case.model.zero_grad(set_to_none=True)
    maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
    maker.forward_and_backward()
    return maker


@pytest.mark.parametrize("split", ["pi", "exact"])
def test_kfac_by_hand(split: str) -> None:
    case, reference = wide(), wide()
    raw = torch.autograd.grad(reference.run(), list(reference.model.parameters()))
    g = dict(zip(oracles.parameter_slices(reference.model), raw, strict=True))
    step(maker_of(case, "kfac", fisher=FisherExact(), split=split), case)
    columns = oracles.exact_columns("categorical", case.t)
    for name, groups in (("convolution", 2), ("body", 1), ("head", 1)):
        pairs = oracles.kfac_factors(reference.model, case.x, name, columns, len(case.x))
        joint = torch.cat([g[f"{name}.weight"].flatten(1), g[f"{name}.bias"].unsqueeze(1)], 1).chunk(groups)
        cut = [[F * mask(len(F), tile_width(len(F), 5)) for F in (A, B)] for A, B in pairs]
        expected = torch.cat(
            [oracles.kfac_direction(v, A, B, damping=0.05, split=split) for v, (A, B) in zip(joint, cut, strict=True)]
        )
        weight, bias = (case.model.get_parameter(f"{name}.{part}").grad for part in ("weight", "bias"))
        assert weight is not None and bias is not None
        assert oracles.relative_error(torch.cat([weight.flatten(1), bias.unsqueeze(1)], 1), expected) < 1e-10, name


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_ekfac_by_hand(sharing: str) -> None:
    """Moments in the bases of the blocks: the second step measures them, example by example."""
    case = wide()
    maker = maker_of(case, "ekfac", fisher=FisherExact(), decay=0.0, preconditioner_interval=10, sharing=sharing)
    for _ in range(2):
        step(maker, case)
    gradients = oracles.fisher_from_columns(case.model, case.x, oracles.exact_columns("categorical", case.t), len(case.x))
    where = oracles.parameter_slices(case.model)
    for block in maker.plan.blocks:
        for site in block.sites:
            if site.name not in ("body", "head"):
                continue
            Q_B, Q_A = (dense(Q)[0] for Q in block.triple.representation.bases(block.state))
            o, i = site.shape[1:]
            for Q, d in ((Q_B, o), (Q_A, i)):
                assert torch.equal(Q, Q * mask(d, tile_width(d, 5))) and oracles.relative_error(Q @ Q.mT, torch.eye(d)) < 1e-12
            rows = [*range(where[f"{site.name}.weight"].start, where[f"{site.name}.weight"].stop)]
            bias = [*range(where[f"{site.name}.bias"].start, where[f"{site.name}.bias"].stop)]
            order = torch.tensor([x for j in range(o) for x in (*rows[j * (i - 1) : (j + 1) * (i - 1)], bias[j])])
            F = gradients[order][:, order]
            U = torch.kron(Q_B.contiguous(), Q_A.contiguous())
            moments = (U * (F @ U)).sum(0).reshape(o, i)
            slot = block.slots[block.sites.index(site)]
            assert oracles.relative_error(block.triple.representation.spectrum(block.state)[slot][0], moments) < 1e-10


@pytest.mark.parametrize("method", ["kfac", "kflr", "ekfac"])
def test_a_method_in_blocks(method: str) -> None:
    """It checks itself, descends, resumes bitwise; wide enough blocks are the method itself, blocks of one its diagonal."""
    case, twin = wide(), wide()
    maker, second = (maker_of(c, method) for c in (case, twin))
    optimizer = torch.optim.SGD(case.model.parameters(), 0.1)
    first = case.run().item()
    for _ in range(15):
        step(maker, case)
        optimizer.step()
    assert case.run().item() < 0.6 * first and maker.verify().passed
    twin.model.load_state_dict(case.model.state_dict())
    second.load_state_dict(maker.state_dict())
    for m, c in ((maker, case), (second, twin)):
        step(m, c)
    assert torch.equal(oracles.gradient_vector(case.model), oracles.gradient_vector(twin.model))
    for max_dim, tolerance in ((100, 0.0), (1, 1e-10)):
        cut, plain = (
            models.build(lambda: nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, CLASSES)), 5, 6) for _ in "ab"
        )
        step(maker_of(cut, method, max_dim=max_dim), cut)
        step(maker_of(plain, method, max_dim=max_dim, wide_sides="diagonal"), plain)
        error = oracles.relative_error(oracles.gradient_vector(cut.model), oracles.gradient_vector(plain.model))
        assert error <= tolerance, max_dim


def test_nothing_as_large_as_the_square_of_a_side() -> None:
    model = nn.Sequential(nn.Linear(2000, 3))
    case = Case(model, torch.randn(8, 2000), torch.randint(CLASSES, (8,)), nn.functional.cross_entropy)
    maker = maker_of(case, "kfac", max_dim=64)
    with Live() as live:
        step(maker, case)
    assert live.peak < 0.5 * 2001**2 * 8
    held = {key: v.shape for key, v in maker.plan.blocks[0].state.items() if "mass" not in key}
    assert held == {"left": (1, 3, 3), "right": (1, 2001, 63)}
    assert cost_report(maker, case.x).rows[0].refresh < 100 * 2001 * 64**2


@pytest.mark.parametrize("method", ["kfac", "kflr", "kfra", "ekfac"])
def test_illegal_options(method: str) -> None:
    with pytest.raises(ValueError, match=r"wide_sides='block': expected diagonal, blocks; did you mean 'blocks'"):
        METHODS[method].Config(wide_sides="block")
    with pytest.raises(ValueError, match="wide_sides='block': expected diagonal, blocks"):
        Kron(wide_sides="block")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="wide_sides='blocks' would have no effect"):
        METHODS["skfac"].Config(wide_sides="blocks")
