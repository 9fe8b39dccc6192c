"""CASPR: whole runs, its three forms, the power means between Shampoo and full-matrix AdaGrad."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from gradmaker import from_config
from gradmaker.curvature import Gradient
from gradmaker.representations import KronDims, KronSum
from gradmaker.representations.base import Fold, Frame
from gradmaker.solvers import AxisMean, Eigh
from tests import models, oracles
from tests.kronecker_reference import Reference, inverse_root, moments, on_axis
from tests.methods.test_kronecker_dims import SCHEDULE, convolution, gradients, run
from tests.methods.test_trajectories import compare


class Caspr:
    """The dense matrix ``[(1/k) sum_i I (x) H_i^(-1/2p) (x) I]^p`` for two axes, axis by axis for more."""

    def __init__(self, ridge: float, decay: float | None, p: int) -> None:
        self.ridge, self.decay, self.p, self.history = ridge, decay, p, list[Tensor]()

    def __call__(self, g: Tensor, m: Tensor, step: int) -> Tensor:
        self.history.append(g)
        roots = [inverse_root(moments(self.history, k, self.decay), self.ridge, -1 / (2 * self.p)) for k in range(g.ndim)]
        if g.ndim == 2:
            L, R = roots
            X = (oracles.kron(L, torch.eye(len(R), dtype=L.dtype)) + oracles.kron(torch.eye(len(L), dtype=L.dtype), R)) / 2
            return (torch.linalg.matrix_power(X, self.p) @ m.reshape(-1)).reshape(m.shape)
        for _ in range(self.p):
            terms = [on_axis(X, m, axis) for axis, X in enumerate(roots)]
            m = torch.stack(terms).sum(0) / len(terms)
        return m


ROWS: dict[str, tuple[Any, Any, dict[str, Any], float]] = {
    "default": (models.mlp, lambda: Caspr(1e-6, 0.999, 2), {}, 5e-3),
    "sum": (models.mlp, lambda: Caspr(1e-6, None, 2), {"decay": None, "grafting": "none"}, 0.05),
    "mean": (
        models.mlp,
        lambda: Caspr(1e-6, 0.9, 1),
        {"decay": 0.9, "p": 1, "grafting": "none", "nesterov_average": False},
        0.02,
    ),
    "fourth": (models.mlp, lambda: Caspr(1e-4, 0.9, 4), {"decay": 0.9, "p": 4, "damping": 1e-4, "beta1": 0.0}, 5e-3),
    "merged": (convolution, lambda: Caspr(1e-4, 0.9, 2), {"decay": 0.9, "damping": 1e-4}, 5e-3),
    "order_4": (convolution, lambda: Caspr(1e-4, 0.9, 2), {"merge": "none", "decay": 0.9, "damping": 1e-4}, 5e-3),
    "blocks": (models.mlp, lambda: Caspr(1e-6, 0.9, 2), {"block_size": 3, "decay": 0.9, "start_step": 4}, 5e-3),
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("root, tolerance", [("eigh", 1e-7), ("newton", 1e-4), ("svd", 1e-7)])
def test_thirty_steps(row: str, root: str, tolerance: float) -> None:
    make, rule, options, lr = ROWS[row]
    case = make()
    maker = from_config(case.model, {"method": "caspr", "root": root, **SCHEDULE, **options})
    used = {"merge": "to_2d", "grafting": "adam", "beta1": 0.9, "nesterov_average": True, **options}
    names = {"block_size": "block", "start_step": "start"}
    own = {names.get(k, k): v for k, v in used.items() if k not in ("decay", "p", "damping")}
    compare(case, maker, Reference(rule, **own), lr, tolerance)


def state_of(representation: Any, steps: list[Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = representation.init(
        Frame(1, tuple(steps[0].shape), frozenset(), torch.float64, torch.device("cpu"))
    )
    for g in steps:
        representation.update(state, Gradient(g.unsqueeze(0)), Fold(1.0, 1.0, 1.0, summed=True))
    return state


def X(p: int | None, steps: list[Tensor], ridge: float = 1e-8) -> Tensor:
    """The dense preconditioner; p = 0 for Shampoo."""
    representation: Any = KronDims() if p == 0 else KronSum(p)
    solver: Any = Eigh(power=-0.5, damping=ridge, split="each", mode="largest") if p == 0 else AxisMean(damping=ridge)
    state = state_of(representation, steps)
    shape, cache = steps[0].shape, solver.prepare(representation, state, None)
    units = torch.eye(steps[0].numel(), dtype=torch.float64)
    return torch.stack([solver.solve(representation, cache, e.reshape(1, *shape)).reshape(-1) for e in units], 1)


def problems(shape: tuple[int, ...], seed: int) -> dict[str, list[Tensor]]:
    """Five kinds of gradients."""
    T = 6
    noise, other = gradients(*shape, steps=T, seed=seed), gradients(*shape, steps=T, seed=seed + 100)
    scales = [torch.logspace(0, -2, d, dtype=torch.float64) for d in shape]
    kronecker = noise
    for axis, s in enumerate(scales):
        kronecker = [on_axis(torch.diag(s), g, axis) for g in kronecker]
    low = [
        g * 0
        + sum(torch.ones_like(g) * g.flatten()[k] for k in range(2))
        + torch.outer(g.flatten()[:1], g.flatten()).view_as(g)
        for g in noise
    ]
    commuting = []
    for k in range(T):
        g = torch.zeros(shape, dtype=torch.float64)
        for j in range(min(shape)):
            g[(j,) * len(shape)] = 1.0 + 0.3 * ((k + j) % 3)
        commuting.append(g)
    additive = [
        on_axis(torch.diag(scales[0]), g, 0) + on_axis(torch.diag(scales[1]), h, 1) for g, h in zip(noise, other, strict=True)
    ]
    return {"noise": noise, "kronecker": kronecker, "low": low, "commuting": commuting, "additive": additive}


def smallest(A: Tensor) -> float:
    return float(torch.linalg.eigvalsh((A + A.T) / 2)[0])


def full(steps: list[Tensor], ridge: float, shape: tuple[int, ...]) -> Tensor:
    """``sqrt(r) (A + r e)^-1/2``, ``e`` the smaller ridge of the axes: above all power means."""
    A = torch.stack([torch.outer(g.reshape(-1), g.reshape(-1)) for g in steps]).sum(0)
    r = max(int(torch.linalg.matrix_rank(g.movedim(k, 0).flatten(1))) for g in steps for k in range(g.ndim))
    tops = [float(torch.linalg.eigvalsh(moments(steps, k, None))[-1]) for k in range(len(shape))]
    return (r**0.5) * oracles.matrix_power(A + r * ridge * min(tops) * torch.eye(len(A), dtype=A.dtype), -0.5)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 3)])
@pytest.mark.parametrize("kind", ["noise", "kronecker", "low", "commuting", "additive"])
def test_the_loewner_chain(shape: tuple[int, ...], kind: str) -> None:
    """Shampoo <= X(16) <= X(4) <= X(2) <= X(1) <= sqrt(r) (A + ..)^-1/2."""
    for seed in range(6):
        ridge, steps = 1e-3, problems(shape, seed)[kind]
        chain = [X(p, steps, ridge) for p in (0, 16, 4, 2, 1)] + [full(steps, ridge, shape)]
        size = float(torch.linalg.matrix_norm(chain[-1], 2))
        for low, high in pairwise(chain):
            assert smallest(high - low) >= -1e-10 * size


def test_the_chain_needs_the_rank() -> None:
    steps = problems((3, 3), 0)["commuting"]
    bare = full(steps, 1e-3, (3, 3)) / 3**0.5
    assert smallest(bare - X(1, steps, 1e-3)) < -1e-4


def test_three_forms_are_one() -> None:
    steps = gradients(3, 4)
    L, R = (inverse_root(moments(steps, k, None), 1e-6, -0.25) for k in (0, 1))
    G = steps[-1]
    expanded = (L @ L @ G + 2 * L @ G @ R + G @ R @ R) / 4
    J = (L @ G + G @ R) / 2
    dense = X(2, steps, 1e-6) @ G.reshape(-1)
    assert oracles.relative_error((L @ J + J @ R) / 2, expanded) < 1e-14
    assert oracles.relative_error(dense.reshape(3, 4), expanded) < 1e-12


def test_difference_from_shampoo_is_a_square() -> None:
    steps = gradients(3, 4)
    L, R = (inverse_root(moments(steps, k, None), 1e-6, -0.25) for k in (0, 1))
    D = (oracles.kron(L, torch.eye(4, dtype=L.dtype)) - oracles.kron(torch.eye(3, dtype=L.dtype), R)) / 2
    assert oracles.relative_error(X(2, steps, 1e-6) - X(0, steps, 1e-6), D @ D) < 1e-9


def test_mean_of_the_sides() -> None:
    steps = [[g] for g in gradients(3, 4)]
    options = {"grafting": "none", "decay": None, "preconditioner_interval": 1}
    left, right = (run({"method": "one_sided", "side": side, **options}, steps)[0] for side in ("left", "right"))
    caspr = run({"method": "caspr", "p": 1, "beta1": 0.0, **options}, steps)[0]
    assert oracles.relative_error(caspr, (left + right) / 2) < 1e-12


def test_large_p_is_nearly_shampoo_and_inf_is() -> None:
    steps = gradients(3, 4)
    assert oracles.relative_error(X(64, steps), X(0, steps)) < 0.02
    options = {"grafting": "none", "decay": 0.95, "preconditioner_interval": 1, "beta1": 0.0, "damping": 1e-6}
    lists = [[g] for g in steps]
    assert torch.equal(
        run({"method": "caspr", "p": "inf", **options}, lists)[0], run({"method": "shampoo", **options}, lists)[0]
    )


@pytest.mark.parametrize("p", [1, 2, 3, None])
def test_operator_and_dense_matrix_agree(p: int | None) -> None:
    for shape in ((3, 4), (2, 3, 2), (3,)):
        steps = gradients(*shape)
        solver, representation = AxisMean(damping=1e-3), KronSum(p)
        state = state_of(representation, steps)
        assert oracles.relative_error(X(p, steps, 1e-3), solver.operator(representation, state)[0]) < 1e-11
    state = state_of(KronSum(p), gradients(3, 4, steps=9))
    exact = AxisMean(damping=0.0).operator(KronSum(p), state)[0]
    assert oracles.relative_error(oracles.matrix_power(KronSum(p).to_dense(state)[0], -0.5), exact) < 1e-6


def test_isotropic_factors_have_a_closed_form() -> None:
    state = state_of(KronSum(2), gradients(2, 3))
    state["factor_0"], state["factor_1"] = (
        16.0 * torch.eye(2, dtype=torch.float64)[None],
        81.0 * torch.eye(3, dtype=torch.float64)[None],
    )
    P = AxisMean(damping=0.0).operator(KronSum(2), state)[0]
    torch.testing.assert_close(P, ((1 / 2 + 1 / 3) / 2) ** 2 * torch.eye(6, dtype=torch.float64))


def test_axis_statistics_are_nearest() -> None:
    """Lemma 3.1: no perturbation of (1/n) sum G G^T brings L (x) I nearer to A."""
    steps = gradients(3, 4)
    A = torch.stack([torch.outer(g.reshape(-1), g.reshape(-1)) for g in steps]).sum(0)
    L, eye = moments(steps, 0, None) / 4, torch.eye(4, dtype=torch.float64)
    best = (A - oracles.kron(L, eye)).norm()
    for E in gradients(3, 3, steps=50, seed=7):
        assert (A - oracles.kron(L + 1e-3 * (E + E.T), eye)).norm() > best


def test_regret_is_below_shampoos_and_the_preconditioner_falls() -> None:
    steps = [on_axis(torch.diag(torch.logspace(0, -1, 3, dtype=torch.float64)), g, 0) for g in gradients(3, 4, steps=20)]
    absolute = [
        X(2, [*steps[:t], *[1e-1 * e.reshape(3, 4) for e in torch.eye(12, dtype=torch.float64)]], 0.0) for t in (5, 10, 20)
    ]
    for older, newer in pairwise(absolute):
        assert smallest(older - newer) >= -1e-10
    caspr, shampoo = (torch.linalg.inv(X(p, steps, 1e-6)).trace() for p in (2, 0))
    assert caspr <= shampoo


def test_square_roots_are_held_where_they_are_asked_for() -> None:
    steps = gradients(4, 3)
    plain, by_roots = KronSum(2), KronSum(2, square_roots=True)
    one, other = state_of(plain, steps), state_of(by_roots, steps)
    for H, R, formed in zip(plain.summands(one), by_roots.summand_roots(other), by_roots.summands(other), strict=True):
        torch.testing.assert_close(R.mT @ R, H, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(formed, H, rtol=1e-12, atol=1e-12)
        assert torch.equal(R, R.triu())
    reason = AxisMean(root="svd").refuse(plain)
    assert reason is not None and "square_roots=True" in reason and AxisMean(root="svd").refuse(by_roots) is None
    g = gradients(4, 3, steps=1, seed=9)[0].unsqueeze(0)
    eigh, svd = AxisMean(damping=1e-4), AxisMean(damping=1e-4, root="svd")
    found = svd.solve(by_roots, svd.prepare(by_roots, other, None), g)
    torch.testing.assert_close(found, eigh.solve(plain, eigh.prepare(plain, one, None), g), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "infinity", True])
def test_wrong_p(wrong: Any) -> None:
    if wrong is True:
        pytest.skip("True is one")
    with pytest.raises(ValueError, match="p="):
        from_config(models.mlp().model, {"method": "caspr", "p": wrong})
