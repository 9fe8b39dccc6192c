"""EKFAC: the moments in the eigenbasis, when the basis is renewed, and whole directions, against dense oracles in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmaker import METHODS, from_config
from gradmaker.curvature import Curvature, FisherEmp, FisherExact, OneHot, Outer, evidence as curvature_evidence
from gradmaker.methods.custom import CustomGradientConfig
from gradmaker.representations import Eigenbasis, Kron, eigenbasis
from gradmaker.representations.eigenbasis import rotated_squares
from gradmaker.solvers import Rotate
from tests import models, oracles
from tests.measure import ggn, site_order
from tests.models import Case

EVERY_STEP: dict[str, Any] = {"curvature_interval": 1, "preconditioner_interval": 1, "warmup_steps": 0, "stagger": False}
EXACT, EMP = FisherExact(), FisherEmp()


def ekfac(case: Case, **options: Any) -> Any:
    return METHODS["ekfac"](case.model, METHODS["ekfac"].Config(**{"fisher": EXACT, **EVERY_STEP, **options}))


def step(maker: Any, case: Case) -> Tensor:
    """P g of a step that leaves the weights where they are."""
    case.model.zero_grad(set_to_none=True)
    y = maker.setup_model_call(case.model, case.x)
    maker.setup_loss_call(case.loss, y, case.t)
    maker.forward_and_backward()
    return oracles.gradient_vector(case.model)


def held(maker: Any) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """For each block: site, Q (P, P), D (P,), and where the block lies in the parameter vector."""
    found = []
    for block in maker.plan.blocks:
        if not isinstance(block.triple.representation, Eigenbasis):
            continue
        for site, slot in zip(block.sites, block.slots, strict=True):
            state = {k: v[slot] for k, v in block.state.items()}
            order = site_order(maker.model, site).reshape(slot.stop - slot.start, -1)
            for j, where in enumerate(order):
                sides = []
                for Q, size in zip(block.triple.representation.bases(state), block.frame.shape, strict=True):
                    sides.append(torch.eye(size, dtype=torch.float64) if Q is None else Q[j])
                D = block.triple.representation.spectrum(state)[j].reshape(-1)
                found.append((site.name, oracles.kron(*sides), D, where))
    return found


def select_of(case: Case) -> oracles.Select:
    return (lambda y: y.mT) if case.t.ndim == 2 else oracles.identity


def dense(case: Case, fisher: Curvature) -> Tensor:
    if isinstance(fisher, FisherEmp):
        columns = oracles.empirical_columns("categorical", case.t, example="sequence")
        return oracles.fisher_from_columns(case.model, case.x, columns, case.t.numel(), None, select_of(case))
    return ggn(case)


MODELS: dict[str, Callable[[], Case]] = {
    "mlp": models.mlp,
    "no_bias": partial(models.mlp, bias=False),
    "bernoulli": models.mlp_bernoulli,
    "convolution": partial(models.convolution, 2, groups=2),
    "convolution_1d": partial(models.convolution, 1),
    "positions": partial(models.deep_linear, 3),
    "tagger": partial(models.tagger, mix=True),
    "bag": models.embedding_mean,
}


# --- D ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", [EXACT, EMP])
def test_moments_are_the_diagonal_of_the_fisher_in_the_basis(name: str, sharing: str, fisher: Curvature) -> None:
    """D = diag(Q^T F Q), positions summed before the square whatever the factors do; the basis is that of another batch."""
    if fisher == EMP and name in ("positions", "bernoulli"):
        pytest.skip("the oracle's columns are categorical")
    case = MODELS[name]()
    maker = ekfac(case, fisher=fisher, sharing=sharing, decay=0.0)
    step(maker, case._replace(x=case.x.flip(0)))
    step(maker, case)
    C = dense(case, fisher)
    assert held(maker)
    for site, Q, D, where in held(maker):
        F = oracles.reorder(C, where)
        assert oracles.relative_error(Q.mT @ Q, torch.eye(len(Q), dtype=Q.dtype)) < 1e-12
        assert oracles.relative_error(D, (Q.mT @ F @ Q).diagonal()) < 1e-11, site


@pytest.mark.parametrize("name", ["mlp", "convolution", "tagger"])
def test_moments_are_optimal_in_the_basis(name: str) -> None:
    """Property 14: nearer to F than the Kronecker product, and than any other diagonal in the same basis."""
    case, twin = MODELS[name](), MODELS[name]()
    maker = ekfac(case, decay=0.0)
    first = step(maker, case)
    kron = {site: (Q * D) @ Q.mT for site, Q, D, _ in held(maker)}  # of the first step: b a^T
    assert oracles.relative_error(first, step(maker, case)) > 1e-3
    C, generator = dense(twin, EXACT), torch.Generator().manual_seed(0)
    for site, Q, D, where in held(maker):
        F = oracles.reorder(C, where)
        error = torch.linalg.norm(F - (Q * D) @ Q.mT)
        if sum(s == site for s, *_ in held(maker)) == 1:
            assert error < torch.linalg.norm(F - kron[site]), site
        for _ in range(5):
            other = D + 1e-3 * D.max() * torch.randn(D.shape, generator=generator, dtype=D.dtype)
            assert error < torch.linalg.norm(F - (Q * other) @ Q.mT)


@pytest.mark.parametrize("fisher", [EXACT, EMP])
def test_one_datum_is_exact(fisher: Curvature) -> None:
    case = models.mlp()
    case = case._replace(x=case.x[:1], t=case.t[:1])
    maker = ekfac(case, fisher=fisher, decay=0.0, damping=0.1)
    for _ in range(2):  # by b a^T, and by the measured moments
        found = step(maker, case)
        g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(case.run(), list(case.model.parameters()))])
        C = dense(case, fisher)
        for _, Q, D, where in held(maker):
            F = oracles.reorder(C, where)
            assert oracles.relative_error((Q * D) @ Q.mT, F) < 1e-11
            assert oracles.relative_error(found[where], oracles.tikhonov_solve(F, 0.1, g[where])) < 1e-10


def loop_squares(evidence: Outer, left: Tensor, right: Tensor, per_position: bool = False) -> Tensor:
    """``sum_N (left^T J_N right)^2``, one row at a time; with the wrong order of square and sum on request."""
    k, G, n, R, _ = evidence.gradients.shape
    x = evidence.inputs if isinstance(evidence.inputs, Tensor) else evidence.inputs.dense(torch.float64)
    if evidence.bias:
        x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    total = torch.zeros(G, left.shape[-1], right.shape[-1], dtype=torch.float64)
    for group in range(G):
        for c in range(k):
            for m in range(n):
                rows = [torch.outer(evidence.gradients[c, group, m, r], x[group, m, r]) for r in range(R)]
                for J in rows if per_position else [sum(rows)]:
                    J = J.mT if evidence.transposed else J
                    total[group] += (left[group].mT @ J @ right[group]).square()
    return total


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", [(2, 2, 3, 1, 4, 5), (4, 2, 3, 2, 9, 8), (6, 1, 2, 3, 9, 8), (1, 2, 3, 7, 3, 2)])
@pytest.mark.parametrize("piece", [None, 1, 200])
def test_rotated_squares(
    sizes: tuple[int, ...], transposed: bool, bias: bool, piece: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One position; pairs of positions (the second and third sizes, without a bias); J formed (the last); all in pieces."""
    if piece is not None:
        for module in (curvature_evidence, eigenbasis):
            monkeypatch.setattr(module, "PIECE", piece)
    k, G, n, R, o, i = sizes
    evidence = Outer(torch.randn(G, n, R, i).double(), torch.randn(k, G, n, R, o).double(), bias, transposed)
    of_outer, of_inner = (torch.linalg.qr(torch.randn(G, d, d).double())[0] for d in (o, i + bias))
    left, right = (of_inner, of_outer) if transposed else (of_outer, of_inner)
    found = rotated_squares(evidence, left, right)
    assert oracles.relative_error(found, loop_squares(evidence, left, right)) < 1e-13
    if R > 1:
        assert oracles.relative_error(found, loop_squares(evidence, left, right, per_position=True)) > 1e-2


def test_rotated_squares_of_tokens() -> None:
    index = torch.tensor([[0, 2, 2], [1, 0, 3]])  # a token twice: its two gradients are one number
    evidence = Outer(OneHot(index, 4), torch.randn(2, 1, 2, 3, 5).double(), transposed=True)
    Q = torch.linalg.qr(torch.randn(1, 5, 5).double())[0]
    found = rotated_squares(evidence, None, Q)
    assert oracles.relative_error(found, loop_squares(evidence, torch.eye(4).double()[None], Q)) < 1e-13


# --- the basis --------------------------------------------------------------------------------------------------------------
def test_first_step_is_kfac_with_exact_damping() -> None:
    for make in (models.mlp, partial(models.convolution, 2), models.embedding_mean, models.normed):
        one, other = make(), make()
        found = step(ekfac(one), one)
        kfac = METHODS["kfac"](other.model, METHODS["kfac"].Config(fisher=EXACT, split="exact", **EVERY_STEP))
        assert oracles.relative_error(found, step(kfac, other)) < 1e-9


def test_signs_of_the_basis_do_not_matter() -> None:
    case, twin = models.mlp(), models.mlp()
    makers = ekfac(case), ekfac(twin)
    for maker, of in zip(makers, (case, twin), strict=True):
        step(maker, of)
    for block in makers[1].plan.blocks:
        for key, Q in block.state.items():
            if key.startswith("basis"):
                Q[..., ::2] *= -1
    for k in range(3):
        found = [step(m, c._replace(t=c.t.roll(k))) for m, c in zip(makers, (case, twin), strict=True)]
        assert oracles.relative_error(*found) < 1e-12


class Ekfac:
    """EKFAC re-derived: dense Fishers, factors from loops over examples, their whole history."""

    def __init__(self, decay: float | None, interval: int, sharing: str) -> None:
        self.decay, self.interval, self.sharing = decay, interval, sharing
        self.factors: dict[str, oracles.State] = {}
        self.Q: dict[str, Tensor] = {}
        self.D: dict[str, list[tuple[float, Tensor]]] = {}  # what was put in, with its weight as of now

    def averaged(self, name: str, pair: oracles.Factors | None, kind: str) -> Tensor:
        state = self.factors.setdefault(f"{name}/{kind}", {})
        if pair is not None:
            value = oracles.averaged(state, "S", getattr(pair, kind), self.decay)
            state["now"] = value / (len(state["S"]) if self.decay is None and kind == "A" else 1)
        now: Tensor = state["now"]
        return now

    def renew(self, name: str) -> Tensor:
        """A new basis; what was put in becomes the diagonal that its matrix has there.  Returns ``b a^T``."""
        A, B = self.averaged(name, None, "A"), self.averaged(name, None, "B")
        (a, U), (b, V) = torch.linalg.eigh(A), torch.linalg.eigh(B)
        Q, before = oracles.kron(V, U), self.Q.get(name)
        if before is not None:
            matrices = [(w, (before * D) @ before.mT) for w, D in self.D[name]]
            self.D[name] = [(w, (Q.mT @ C @ Q).diagonal()) for w, C in matrices]
        self.Q[name] = Q
        return torch.outer(b, a).reshape(-1)

    def measure(self, case: Case, name: str, F: Tensor, k: int) -> None:
        columns = oracles.exact_columns("categorical", case.t)
        (pair,) = oracles.kfac_factors(
            case.model, case.x, name, columns, case.t.numel(), sharing=self.sharing, select=select_of(case)
        )
        decay = 1.0 if self.decay is None else self.decay
        if k == 1 and self.decay is not None:
            self.D[name] = []  # no moments, but what the factors predicted
        if k > 0 and k % self.interval == 0:
            self.renew(name)
        for kind in ("A", "B"):
            self.averaged(name, pair, kind)
        if k == 0:
            self.D[name] = [(1.0, self.renew(name))]
            return
        fresh = ((1.0 if self.decay is None else 1 - decay), (self.Q[name].mT @ F @ self.Q[name]).diagonal())
        self.D[name] = [(w * decay, D) for w, D in self.D[name]] + [fresh]

    def moments(self, name: str) -> Tensor:
        total = torch.stack([w * D for w, D in self.D[name]]).sum(0)
        return total if self.decay is None else total / sum(w for w, _ in self.D[name])


@pytest.mark.parametrize("decay", [0.8, 0.0, None])
@pytest.mark.parametrize(
    "interval, sharing, name", [(3, "expand", "mlp"), (1, "expand", "mlp"), (2, "reduce", "convolution_1d")]
)
def test_whole_run(decay: float | None, interval: int, sharing: str, name: str) -> None:
    """With enough examples for factors of full rank: of a null space there is no one basis."""
    case = MODELS[name]()
    case = case._replace(x=torch.randn(20, *case.x.shape[1:]).double(), t=torch.arange(20) % 3)
    maker = ekfac(case, decay=decay, preconditioner_interval=interval, sharing=sharing, damping=0.05)
    judge = Ekfac(decay, interval, sharing)
    for k in range(8):
        now = case._replace(x=case.x.roll(k % 3, -1) * (1 + 0.1 * k), t=case.t.roll(k))
        found = step(maker, now)
        g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(now.run(), list(case.model.parameters()))])
        C = dense(now, EXACT)
        for block in maker.plan.blocks:
            for site in block.sites:
                where = site_order(case.model, site).reshape(-1)
                judge.measure(now, site.name, oracles.reorder(C, where), k)
                Q, D = judge.Q[site.name], judge.moments(site.name)
                expected = Q @ ((Q.mT @ g[where]) / (D + 0.05))
                assert oracles.relative_error(found[where], expected) < 1e-9, (k, site.name)


@pytest.mark.parametrize("interval", [1, 2])
def test_micro_batches_and_chunks_do_not_matter(interval: int) -> None:
    """Neither in the first step, whose basis comes from its own factors, nor later."""
    whole, parts = models.mlp(), models.mlp()
    one, other = (
        ekfac(whole, preconditioner_interval=interval),
        ekfac(parts, preconditioner_interval=interval, fisher=FisherExact(chunk=1)),
    )
    for k in range(4):
        found = step(one, whole._replace(t=whole.t.roll(k)))
        parts.model.zero_grad(set_to_none=True)
        for rows in (slice(0, 2), slice(2, 6)):
            y = other.setup_model_call(parts.model, parts.x[rows])
            other.setup_loss_call(parts.loss, y, parts.t.roll(k)[rows])
            other.accumulate((rows.stop - rows.start) / 6)
        other.precondition()
        assert oracles.relative_error(oracles.gradient_vector(parts.model), found) < 1e-10, k


def test_resume_is_bitwise_at_any_step() -> None:
    for at in range(1, 7):
        case = models.mlp()
        maker = ekfac(case, curvature_interval=2, preconditioner_interval=3)
        for k in range(at):
            step(maker, case._replace(t=case.t.roll(k)))
        second = ekfac(case, curvature_interval=2, preconditioner_interval=3)
        second.load_state_dict(copy.deepcopy(maker.state_dict()))
        for k in range(at, at + 5):
            now = case._replace(t=case.t.roll(k))
            assert torch.equal(step(maker, now), step(second, now)), (at, k)


def test_a_solve_leaves_the_statistic_as_it_was() -> None:
    case = models.mlp()
    maker = ekfac(case)
    for _ in range(3):
        step(maker, case)
    for block in maker.plan.blocks:
        before = {k: v.clone() for k, v in block.state.items()}
        for _ in range(20):
            cache = block.triple.solver.prepare(block.triple.representation, block.state, block.cache)
            block.triple.solver.solve(block.triple.representation, cache, torch.ones_like(block.state["moments"]))
            cache["scale"].zero_()
        assert all(torch.equal(v, before[k]) for k, v in block.state.items())


def test_wide_axes_keep_the_unit_basis() -> None:
    case = models.mlp()
    maker = ekfac(case, max_dim=5, decay=0.0)  # (5, 5) and (3, 6)
    step(maker, case)
    step(maker, case)
    assert {"basis_left"} == {k for k in maker.plan.blocks[1].state if k.startswith("basis")}
    C = dense(case, EXACT)
    for _, Q, D, where in held(maker):
        assert oracles.relative_error(D, (Q.mT @ oracles.reorder(C, where) @ Q).diagonal()) < 1e-12


# --- the solver -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("power", [-1.0, -0.5, -0.25])
def test_rotate_is_the_dense_power(power: float) -> None:
    case = MODELS["convolution"]()
    config = CustomGradientConfig(
        curvature=EXACT, representation=Eigenbasis(), solver=Rotate(power=power, damping=0.03), decay=0.5
    )
    maker = METHODS["custom"](case.model, config)
    for k in range(3):
        found = step(maker, case._replace(t=case.t.roll(k)))
    g = torch.cat(
        [p.reshape(-1) for p in torch.autograd.grad(case._replace(t=case.t.roll(2)).run(), list(case.model.parameters()))]
    )
    for block in maker.plan.blocks:
        C = block.triple.representation.to_dense(block.state)
        v = torch.randn(len(C), *block.frame.shape).double()
        product = block.triple.representation.matvec(block.state, v).flatten(1)
        assert oracles.relative_error(product, (C @ v.flatten(1).unsqueeze(-1)).squeeze(-1)) < 1e-13
    for _, Q, D, where in held(maker):
        damped = (Q * D) @ Q.mT + 0.03 * torch.eye(len(Q), dtype=Q.dtype)
        assert oracles.relative_error(found[where], oracles.matrix_power(damped, power) @ g[where]) < 1e-9
    assert maker.verify().passed


def test_a_factor_that_is_not_finite_keeps_the_basis() -> None:
    case = models.mlp()
    maker = ekfac(case, preconditioner_interval=1)
    good = [step(maker, case) for _ in range(2)][-1]
    block = maker.plan.blocks[0]
    before = block.state["basis_right"].clone()
    block.state["right"].fill_(torch.nan)
    assert step(maker, case).isfinite().all()
    assert torch.equal(block.state["basis_right"], before) and int(block.cache["failures"].sum()) > 0
    assert good.isfinite().all()


@pytest.mark.parametrize("options", [{"sharing": "both"}, {"wide_sides": "none"}])
def test_illegal_parts(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Eigenbasis(**options)


@pytest.mark.parametrize("options", [{"preconditioner_interval": 0}, {"sharing": "both"}, {"preconditioner_interval": 1.5}])
def test_illegal_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        METHODS["ekfac"].Config(**options)


def test_not_mistaken_for_kronecker_factors() -> None:
    """Solvers of factors would leave D out without a word."""
    with pytest.raises(ValueError, match="Solvers that fit FisherExact in Eigenbasis: Rotate, CG"):
        from_config(
            nn.Linear(2, 2), {"method": "custom", "curvature": "FisherExact", "representation": "Eigenbasis", "solver": "Eigh"}
        )
    assert not hasattr(Eigenbasis(), "factors") and hasattr(Kron(), "factors")
