"""Full-matrix AdaGrad: dense and windowed, both placements of the damping, against SVDs of the gradients themselves."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmaker import FullAdagradGradientConfig, from_config
from gradmaker.curvature.evidence import Gradient
from gradmaker.representations import Dense, Kron, Window
from gradmaker.representations.base import Fold, Frame
from gradmaker.solvers import Eigh, Gram
from tests import oracles

SUM = Fold(1.0, 1.0, 1.0, summed=True)
PLACEMENTS = ("before", "after")
RULES = list(itertools.product(PLACEMENTS, ("absolute", "largest")))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def root(history: list[Tensor], placement: str, mode: str, damping: float, decay: float | None, window: int | None) -> Tensor:
    """P from the singular values of the weighted gradients; ``A`` itself is never formed."""
    kept = history if window is None else history[-window:]
    weights = torch.tensor([1.0 if decay is None else decay**age for age in reversed(range(len(kept)))], dtype=torch.float64)
    weights = weights if decay is None else weights / weights.sum()
    rows = weights.sqrt().unsqueeze(1) * torch.stack([g.reshape(-1) for g in kept])
    _, s, Vh = torch.linalg.svd(rows, full_matrices=True)
    s = torch.cat([s, s.new_zeros(rows.shape[1])])[: rows.shape[1]]
    powered = s.square() if placement == "before" else s
    damped = powered + damping * (powered.max() if mode == "largest" else 1.0)
    return Vh.mT @ torch.diag(damped ** (-0.5 if placement == "before" else -1.0)) @ Vh


class Tensors(nn.Module):
    """Parameters that are given their gradients."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in shapes])

    def run(self, maker: Any, gradients: list[Tensor]) -> list[Tensor]:
        for p, g in zip(self.w, gradients, strict=True):
            p.grad = g.clone()
        maker.precondition()
        return [p.grad for p in self.w if p.grad is not None]


def results(config: dict[str, Any], steps: list[list[Tensor]]) -> list[list[Tensor]]:
    """The preconditioned gradients of every step."""
    model = Tensors(*(tuple(g.shape) for g in steps[0]))
    maker = from_config(model, {"method": "full_adagrad", **config})
    return [[g.clone() for g in model.run(maker, gradients)] for gradients in steps]


@pytest.mark.parametrize("placement, mode", RULES)
@pytest.mark.parametrize("window", [None, 1, 4, 20])
@pytest.mark.parametrize("decay", [None, 0.8])
def test_eight_steps(placement: str, mode: str, window: int | None, decay: float | None) -> None:
    """Of tensors that have more and fewer entries than there are gradients, before and after the window is full."""
    options = {"placement": placement, "mode": mode, "damping": 1e-2, "decay": decay}
    steps = [[randn(3, 4, seed=3 * k), randn(5, seed=3 * k + 1), randn(seed=3 * k + 2)] for k in range(8)]
    found = results({**options, "window": window}, steps)
    for t, directions in enumerate(found):
        for j, value in enumerate(directions):
            history = [gradients[j] for gradients in steps[: t + 1]]
            P = root(history, placement, mode, 1e-2, decay, window)
            assert oracles.relative_error(value.reshape(-1), P @ steps[t][j].reshape(-1)) < 1e-10, (t, j)


@pytest.mark.parametrize("placement, damping", [("before", 1e-8), ("after", 1e-6)])
@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("shape", [(3, 2), (6, 5)])
def test_a_window_that_holds_all_is_dense(placement: str, damping: float, decay: float | None, shape: tuple[int, ...]) -> None:
    """In fewer and in more dimensions than steps. A root has half the digits: at 1e-8 it shows the noise of a formed matrix."""
    steps = [[randn(*shape, seed=k)] for k in range(12)]
    config = {"placement": placement, "decay": decay, "damping": damping}
    dense, windowed = (results({**config, "window": w}, steps) for w in (None, 12))
    for a, b in zip(dense, windowed, strict=True):
        assert oracles.relative_error(b[0], a[0]) < 1e-8


@pytest.mark.parametrize("shape", [(3, 2), (6, 5)])
def test_a_window_does_not_magnify_rounding(shape: tuple[int, ...]) -> None:
    """A gradient lies in the span of the rows: the gain of what is left of it, 1e8, would turn one roundoff into 1e-8."""
    steps = [[randn(*shape, seed=k)] for k in range(12)]
    for found, t in zip(results({"placement": "after", "damping": 1e-8, "window": 12}, steps), range(12), strict=True):
        rows = torch.stack([g.reshape(-1) for (g,) in steps[: t + 1]])
        _, s, Vh = torch.linalg.svd(rows, full_matrices=False)
        inside = Vh.T @ ((Vh @ steps[t][0].reshape(-1)) / (s + 1e-8 * s[0]))
        assert oracles.relative_error(found[0].reshape(-1), inside) < 1e-11


# --- identities -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("window", [None, 9])
def test_one_number_is_adagrad(window: int | None) -> None:
    steps = [[randn(1, seed=k)] for k in range(9)]
    total = torch.stack([g for (g,) in steps]).square().sum()
    g, e = steps[-1][0], 1e-3
    expected = {
        ("before", "absolute"): g / (total + e).sqrt(),
        ("before", "largest"): g / (total * (1 + e)).sqrt(),
        ("after", "absolute"): g / (total.sqrt() + e),
        ("after", "largest"): g / (total.sqrt() * (1 + e)),
    }
    for (placement, mode), value in expected.items():
        config = {"placement": placement, "mode": mode, "damping": e, "window": window}
        assert oracles.relative_error(results(config, steps)[-1][0], value) < 1e-12


@pytest.mark.parametrize("window", [None, 30])
def test_disjoint_supports_are_adagrad(window: int | None) -> None:
    """One entry a gradient: the matrix is diagonal, and damping after the root is that of torch's AdaGrad."""
    generator = torch.Generator().manual_seed(1)
    steps = []
    for k in range(20):
        g = torch.zeros(6, dtype=torch.float64)
        g[int(torch.randint(6, (), generator=generator))] = float(randn(seed=k)) + 2.0
        steps.append([g])
    config = {"placement": "after", "mode": "absolute", "damping": 1e-4, "window": window}
    model = Tensors((6,))
    adagrad = from_config(model, {"method": "adagrad", "damping": 1e-4})
    for found, gradients in zip(results(config, steps), steps, strict=True):
        (expected,) = model.run(adagrad, gradients)
        assert oracles.relative_error(found[0], expected) < 1e-12


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("window", [None, 4])
def test_rotations_commute_with_the_step(placement: str, window: int | None) -> None:
    """U(Q g) = Q U(g), to which a diagonal method is a stranger."""
    Q, _ = torch.linalg.qr(randn(8, 8, seed=50))
    steps = [[randn(8, seed=k)] for k in range(6)]
    turned = [[Q @ g for g in gradients] for gradients in steps]
    config = {"placement": placement, "window": window, "damping": 1e-4}
    plain, found = (results(config, given)[-1][0] for given in (steps, turned))
    assert oracles.relative_error(found, Q @ plain) < 1e-10


def test_ggt_is_a_window_with_the_damping_after_the_root() -> None:
    steps = [[randn(3, 4, seed=k)] for k in range(9)]
    config = {"placement": "after", "mode": "absolute", "damping": 1e-3, "window": 5}
    model = Tensors((3, 4))
    ggt = from_config(model, {"method": "ggt", "damping": 1e-3, "window": 5, "beta1": 0.0})
    for found, gradients in zip(results(config, steps), steps, strict=True):
        (expected,) = model.run(ggt, gradients)
        assert oracles.relative_error(found[0], expected) < 1e-12


# --- what a window costs, and keeps ---------------------------------------------------------------------------------------
def test_a_window_holds_no_matrix_of_the_tensors_size() -> None:
    model = Tensors((100, 100))
    with pytest.raises(ValueError, match="10000 x 10000"):
        from_config(model, {"method": "full_adagrad"})
    maker: Any = from_config(model, {"method": "full_adagrad", "window": 3})
    for k in range(5):
        model.run(maker, [randn(100, 100, seed=k)])
    (block,) = maker.plan.blocks
    held = sum(x.numel() for part in (block.state, block.cache) for x in part.values())
    assert held <= 2 * (3 * 10_000 + 50)


def test_a_window_resumes_bitwise() -> None:
    steps = [[randn(3, 4, seed=k)] for k in range(8)]
    config = {"method": "full_adagrad", "window": 4, "decay": 0.9, "damping": 1e-3}
    whole = results(config, steps)[-1][0]
    model = Tensors((3, 4))
    maker: Any = from_config(model, config)
    for k, gradients in enumerate(steps):
        if k in (2, 6):
            saved = maker.state_dict()
            maker = from_config(model, config)
            maker.load_state_dict(saved)
        (found,) = model.run(maker, gradients)
    assert torch.equal(found, whole)


@pytest.mark.parametrize("window", [None, 3])
def test_parts_have_windows_of_their_own(window: int | None) -> None:
    steps = [[randn(6, 4, seed=k)] for k in range(7)]
    config = {"window": window, "damping": 1e-3}
    together = results({**config, "split": {"w.0": 3}}, steps)[-1][0]
    apart = results(config, [list(g.chunk(3)) for (g,) in steps])[-1]
    assert oracles.relative_error(together, torch.cat(apart)) < 1e-12


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("placement, mode", RULES)
def test_zero_gradients_stay_zero_and_finite(window: int | None, placement: str, mode: str) -> None:
    zeros, config = [torch.zeros(2, 2, dtype=torch.float64)], {"window": window, "placement": placement, "mode": mode}
    found = results(config, [zeros, zeros, [randn(2, 2)], zeros])
    assert torch.equal(found[0][0], zeros[0]) and torch.equal(found[3][0], zeros[0])
    assert found[2][0].isfinite().all() and found[2][0].norm() > 0


def test_single_precision_keeps_small_directions() -> None:
    """Inner products in double precision: a window tells singular values of 1e-5 of the largest, an average of squares none."""
    Q, _ = torch.linalg.qr(randn(6, 6, seed=3))
    rows = torch.diag(torch.logspace(0, -5, 6, dtype=torch.float64)) @ Q.T
    model = Tensors((6,)).float()
    errors = []
    for window in (6, None):
        maker = from_config(model, {"method": "full_adagrad", "window": window, "damping": 1e-12})
        for g in rows.float():
            (found,) = model.run(maker, [g])
        exact = root(list(rows), "before", "largest", 1e-12, None, None) @ rows[-1]
        errors.append(oracles.relative_error(found.double(), exact))
    assert errors[0] < 1e-2 and errors[1] > 0.1


# --- options --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("placement, mode", RULES)
def test_solves_are_their_operators(placement: Any, mode: Any) -> None:
    frame = Frame(2, (4,), frozenset(), torch.float64, torch.device("cpu"))
    for held, solver in (
        (Dense(), Eigh(power=-0.5, damping=0.1, placement=placement, mode=mode)),
        (Window(size=6, granularity="layer", scale="sum"), Gram(power=-0.5, damping=0.1, placement=placement, mode=mode)),
    ):
        state = held.init(frame)
        for k in range(6):
            held.update(state, Gradient(randn(2, 4, seed=k)), SUM)
        g = randn(2, 4, seed=9)
        P = solver.operator(held, state)
        found = solver.solve(held, solver.prepare(held, state, None), g)
        assert oracles.relative_error(found, (P @ g.unsqueeze(-1)).squeeze(-1)) < 1e-10
        C = held.to_dense(state)
        for member, expected in zip(P, C, strict=True):
            s, Q = torch.linalg.eigh(expected)
            powered = s if placement == "before" else s.sqrt()
            damped = powered + 0.1 * (powered.max() if mode == "largest" else 1.0)
            exact = Q @ torch.diag(damped ** (-0.5 if placement == "before" else -1.0)) @ Q.T
            assert oracles.relative_error(member, exact) < 1e-10


def test_damping_after_the_root_of_a_product() -> None:
    """(C^|p| + e)^-1 for any power and any factors whose eigenvalues multiply."""
    held = Kron()
    A, B = (X @ X.mT for X in (randn(1, 3, 5), randn(1, 2, 5, seed=1)))
    ones = torch.ones(1, dtype=torch.float64)
    state = {"left": B, "right": A, "left_mass": ones, "right_mass": ones}
    s, Q = torch.linalg.eigh(oracles.kron(B[0], A[0]))
    for power in (-0.5, -0.25, -1.0):
        solver = Eigh(power=power, damping=0.3, placement="after")
        exact = Q @ torch.diag(1 / (s**-power + 0.3)) @ Q.T
        assert oracles.relative_error(solver.operator(held, state)[0], exact) < 1e-10
        g = randn(1, 2, 3, seed=2)
        found = solver.solve(held, solver.prepare(held, state, None), g)
        assert oracles.relative_error(found.reshape(-1), exact @ g.reshape(-1)) < 1e-10


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (FullAdagradGradientConfig, {"window": 0}, "window"),
    (FullAdagradGradientConfig, {"window": 2.0}, "window"),
    (FullAdagradGradientConfig, {"placement": "inside"}, "placement"),
    (FullAdagradGradientConfig, {"mode": "trace"}, "mode"),
    (FullAdagradGradientConfig, {"window": 3, "max_dim": 10}, "max_dim=10 would have no effect"),
    (FullAdagradGradientConfig, {"window": 3, "damping": 0.0}, "damping"),
    (Gram, {"placement": "before"}, "placement='before': expected power=-0.5"),
    (Gram, {"placement": "before", "power": -0.5, "tail": "none"}, "placement='before'"),
    (Gram, {"mode": "largest", "tail": "none"}, "mode='largest': expected tail"),
    (Gram, {"mode": "largest", "scale_preserving": True}, "mode='largest'"),
    (Gram, {"mode": "trace"}, "mode='trace'"),
    (Eigh, {"placement": "after", "split": "each"}, "placement='after'"),
    (Eigh, {"placement": "between"}, "placement='between'"),
]


@pytest.mark.parametrize("make, options, match", REFUSED)
def test_what_does_not_fit_is_refused(make: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make(**options)


def test_inverses_by_the_largest_eigenvalue() -> None:
    """Gram(power=-1, mode="largest"): (C + e lambda_max)^-1."""
    held, rows = Window(size=4, granularity="layer", scale="sum"), randn(4, 6)
    state = held.init(Frame(1, (6,), frozenset(), torch.float64, torch.device("cpu")))
    for row in rows:
        held.update(state, Gradient(row[None]), SUM)
    C = rows.T @ rows
    exact = torch.linalg.inv(C + 0.1 * torch.linalg.eigvalsh(C)[-1] * torch.eye(6, dtype=torch.float64))
    solver, g = Gram(damping=0.1, mode="largest"), randn(1, 6, seed=8)
    assert oracles.relative_error(solver.operator(held, state)[0], exact) < 1e-10
    assert oracles.relative_error(solver.solve(held, solver.prepare(held, state, None), g)[0], exact @ g[0]) < 1e-10
