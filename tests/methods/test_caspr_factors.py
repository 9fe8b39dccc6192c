"""The factors of CASPR-adaptive: what they estimate, how history is carried over, any number of axes, roots that fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmaker import from_config
from gradmaker.curvature import Gradient
from gradmaker.linalg.state import State
from gradmaker.representations import OneWayDims
from gradmaker.representations.base import Fold, Frame
from gradmaker.solvers import HeldRoot
from tests import oracles
from tests.kronecker_reference import inverse_root, on_axis, unfolded
from tests.methods.test_caspr_adaptive import damped
from tests.methods.test_kronecker_dims import gradients
from tests.refreshing import follow, take

AVERAGED = Fold(0.9, 0.1, 0.1)


def empty(representation: OneWayDims, shape: tuple[int, ...], diagonal: frozenset[int] = frozenset(), stack: int = 1) -> State:
    return representation.init(Frame(stack, shape, diagonal, torch.float64, torch.device("cpu")))


def fed(
    representation: OneWayDims, state: State, steps: list[Tensor], fold: Fold = AVERAGED, interval: int = 20, **at: int
) -> State:
    return follow(representation, state, [Gradient(g.unsqueeze(0)) for g in steps], fold, interval, **at)


def covariance(shape: tuple[int, ...], count: int) -> tuple[Tensor, list[Tensor]]:
    """A Kronecker covariance of condition 100 an axis, and samples of it."""
    roots = []
    for k, d in enumerate(shape):
        Q = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(k)))[0]
        roots.append(Q * torch.logspace(0, -1, d, dtype=torch.float64) @ Q.T)
    samples = gradients(*shape, steps=count, seed=5)
    for axis, A in enumerate(roots):
        samples = [on_axis(A, z, axis) for z in samples]
    C = torch.ones(1, 1, dtype=torch.float64)
    for A in roots:
        C = oracles.kron(C, A @ A)
    return C, samples


def agreement(found: Tensor, C: Tensor) -> tuple[float, float]:
    """Cosine and scale."""
    inner = (found * C).sum()
    return float(inner / found.norm() / C.norm()), float(inner / C.square().sum())


@pytest.mark.parametrize("shape, decay", [((6, 5), 0.999), ((3, 2, 4), 0.999), ((6, 5), None)])
def test_a_kronecker_covariance_is_recovered(shape: tuple[int, ...], decay: float | None) -> None:
    """With its scale: no grafting is needed in principle."""
    C, samples = covariance(shape, 4000)
    representation = OneWayDims(at_once=False)
    fold = Fold(1.0, 1.0, 1.0, summed=True) if decay is None else Fold(decay, 1 - decay, 1 - decay)
    found = representation.to_dense(fed(representation, empty(representation, shape), samples, fold))[0]
    cosine, scale = agreement(found / (4000 if decay is None else 1), C)
    assert cosine > 0.999
    assert abs(scale - 1) < 0.05


def test_a_warm_up_spoils_the_columns() -> None:
    C, samples = covariance((30, 20), 60)
    cosines = []
    for warmup in (0, 5):
        representation = OneWayDims(at_once=warmup > 0)
        state = fed(representation, empty(representation, (30, 20)), samples, Fold(0.999, 0.001, 0.001), warmup=warmup)
        cosines.append(agreement(representation.to_dense(state)[0], C)[0])
    assert cosines[0] > 0.97 and cosines[1] < 0.9


def test_history_is_carried_over() -> None:
    """Where rows are white and only their scale changes, R is what it would be had the newest root whitened all of it."""
    representation = OneWayDims(at_once=False)
    state = empty(representation, (4, 4))
    whole, seen = torch.zeros(4, 4, dtype=torch.float64), []
    for t, z in enumerate(gradients(4, 4, steps=60), 1):
        G = 0.5 ** (t % 7) * torch.linalg.qr(z)[0] * 3.0
        whole = 0.9 * whole + 0.1 * G.T @ G / 4
        fed(representation, state, [G], interval=5, begin=t - 1)
        if t == 6:  # what came before the first refresh was not whitened at all
            whole = state["factor_1"][0] / state["root_0"][0, 0, 0] ** 2
        if t > 6:
            assert oracles.relative_error(state["factor_1"][0], whole * state["root_0"][0, 0, 0] ** 2) < 1e-10
            seen.append(float(state["root_0"][0, 0, 0]))
    assert max(seen) > 1.1 * min(seen)


def loops(steps: list[Tensor], interval: int, diagonal: int | None) -> list[Tensor]:
    """``X_k`` for any number of axes, one of which may be kept as a diagonal: history whitened anew by hand."""
    shape = tuple(steps[0].shape)
    later = 1e-6 * (1 + 1e-6) if interval == 1 else 1.0
    S = [(later if k else 1e-6) * torch.eye(d, dtype=torch.float64) for k, d in enumerate(shape)]
    X, rooted = [torch.eye(d, dtype=torch.float64) for d in shape], [damped(H) for H in S]
    for t, g in enumerate(steps, 1):
        size = 1
        for k, d in enumerate(shape):
            x = unfolded(g, k)
            fresh = x @ x.T / size
            S[k] = 0.9 * S[k] + 0.1 * (torch.diag(fresh.diagonal()) if k == diagonal else fresh)
            g, size = on_axis(X[k], g, k), size * d
        if (t - 1) % interval == 0 and (t > 1 or interval == 1):
            X = [inverse_root(H, 1e-6, -0.5) for H in S]
            change = 1.0
            for k, d in enumerate(shape):
                old, rooted[k] = rooted[k], damped(S[k])
                S[k] = change * S[k]
                change *= float((X[k] @ old @ X[k]).trace()) / d
    return X


@pytest.mark.parametrize(
    "shape, diagonal", [((4, 3), None), ((4, 3), 0), ((4, 3), 1), ((2, 3, 4), None), ((2, 3, 4), 1), ((3,), None)]
)
@pytest.mark.parametrize("interval", [1, 5])
def test_any_axes(shape: tuple[int, ...], diagonal: int | None, interval: int) -> None:
    steps = gradients(*shape, steps=23)
    always = interval == 1
    representation = OneWayDims(at_once=always, later=1e-6 * (1 + 1e-6) if always else 1.0)
    state = empty(representation, shape, frozenset() if diagonal is None else frozenset({diagonal}))
    fed(representation, state, steps, interval=interval)
    expected = torch.ones(1, 1, dtype=torch.float64)
    for root in loops(steps, interval, diagonal):
        expected = oracles.kron(expected, root)
    assert oracles.relative_error(HeldRoot().operator(representation, state)[0], expected) < 1e-8
    g = gradients(*shape, steps=1, seed=9)[0]
    cache = HeldRoot().prepare(representation, state, None)
    assert (
        oracles.relative_error(HeldRoot().solve(representation, cache, g.unsqueeze(0))[0].flatten(), expected @ g.flatten())
        < 1e-8
    )
    C = torch.linalg.inv(expected @ expected) @ g.flatten()
    assert oracles.relative_error(representation.matvec(state, g.unsqueeze(0))[0].flatten(), C) < 1e-8


# --- failures -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("poison", ["nan", "indefinite"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("root", ["eigh", "newton"])
def test_a_bad_root_is_refused(poison: str, axis: int, root: Any) -> None:
    """The block keeps what it had, the other member of the stack goes on, and the failure is counted."""
    representation = OneWayDims(at_once=False, root=root)
    state = empty(representation, (4, 3), stack=2)
    follow(representation, state, map(Gradient, gradients(2, 4, 3, steps=8)), AVERAGED, 4)
    healthy, before = {k: v.clone() for k, v in state.items()}, {k: v.clone() for k, v in state.items()}
    size = state[f"factor_{axis}"].shape[-1]
    state[f"factor_{axis}"][1] = (
        torch.full((size, size), torch.nan) if poison == "nan" else -torch.eye(size, dtype=torch.float64)
    )
    (g,) = gradients(2, 4, 3, steps=1, seed=3)
    for each in (state, healthy):
        take(representation, each, Gradient(g), AVERAGED, 8)
    assert state["failures"].tolist() == [0, 1] and healthy["failures"].tolist() == [0, 0]
    for name in ("root_0", "root_1", "rooted_0", "diagnosis"):
        assert torch.equal(state[name][1], before[name][1]), name
        assert not torch.equal(healthy[name][1], before[name][1]), name
    for name in state:
        assert torch.equal(state[name][0], healthy[name][0]), name
    if axis == 0:  # nor was history carried over to it
        K = g[1].T @ before["root_0"][1]
        assert oracles.relative_error(state["factor_1"][1], 0.9 * before["factor_1"][1] + 0.1 * K @ K.T / 4) < 1e-12
    state[f"factor_{axis}"][1] = healthy[f"factor_{axis}"][1]
    follow(representation, state, map(Gradient, gradients(2, 4, 3, steps=4, seed=4)), AVERAGED, 4, begin=9)
    assert state["failures"].tolist() == [0, 1] and not torch.equal(state["root_0"][1], before["root_0"][1])


@pytest.mark.parametrize("root", ["eigh", "newton"])
def test_the_summary_tells_of_refreshes(root: str) -> None:
    model = nn.Linear(4, 3).double()
    maker: Any = from_config(model, {"method": "caspr_adaptive", "preconditioner_interval": 3, "root": root})
    for g in gradients(3, 4, steps=4):
        model.weight.grad, model.bias.grad = g, g[:, 0].clone()
        maker.precondition()
    block = next(b for b in maker.plan.blocks if isinstance(b.triple.representation, OneWayDims))
    iterations, _, largest, ridge, _ = block.cache["diagnosis"][0, 0].tolist()
    assert largest == pytest.approx(float(torch.linalg.eigvalsh(block.state["factor_0"][0])[-1]), rel=0.05)
    assert ridge == pytest.approx(1e-6 * largest)
    assert (iterations > 0) == (root == "newton")
    assert len(maker.summary().refreshes) == 2
