"""Oracles for methods on axes that are not part of another table, in float64."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest
import torch
from torch import Tensor

from gradmaker.curvature import Gradient
from gradmaker.representations import AlternatingInverse, CrossDims, InverseDims
from gradmaker.representations.base import Fold, Frame
from gradmaker.solvers import PolarFactor, PositiveRoot
from gradmaker.solvers.polar_factor import MUON, polar_express, polar_factor
from tests import oracles
from tests.kronecker_reference import moments, unfolded
from tests.methods.test_kronecker_dims import gradients, run
from tests.refreshing import take

CPU = torch.device("cpu")
AT_ONCE: dict[str, Any] = {"grafting": "none", "preconditioner_interval": 1, "warmup_steps": 0}


def frame(*shape: int) -> Frame:
    return Frame(1, shape, frozenset(), torch.float64, CPU)


# --- 4.2, 4.4: order one, order three, domination -------------------------------------------------------------------------
@pytest.mark.parametrize("decay", [None, 0.9])
def test_shampoo_of_a_vector_is_full_matrix_adagrad(decay: float | None) -> None:
    steps = [[g] for g in gradients(6, steps=9)]
    config = {"damping": 1e-6, "decay": decay, **AT_ONCE}
    one, other = run({"method": "shampoo", **config}, steps)[0], run({"method": "full_adagrad", **config}, steps)[0]
    assert oracles.relative_error(one, other) < 1e-10


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 3)])
def test_axes_dominate_the_full_statistic(shape: tuple[int, ...]) -> None:
    """``A <= r H_k`` beside identities, ``A + r eps <= r prod_k (H_k + eps)^(1/m)``, ``r`` the geometric mean of the ranks."""
    for seed in range(10):
        steps, eps, m = gradients(*shape, steps=3, seed=seed), 1e-3, len(shape)
        A = torch.stack([torch.outer(g.reshape(-1), g.reshape(-1)) for g in steps]).sum(0)
        ranks = [max(int(torch.linalg.matrix_rank(unfolded(g, axis))) for g in steps) for axis in range(m)]
        factors = [moments(steps, axis, None) for axis in range(m)]
        product, r = torch.ones(1, 1, dtype=torch.float64), float(torch.tensor(ranks).prod()) ** (1 / m)
        for axis, H in enumerate(factors):
            eyes = [torch.eye(d, dtype=torch.float64) for d in shape]
            alone = reduce(oracles.kron, [H if k == axis else eyes[k] for k in range(m)])
            assert torch.linalg.eigvalsh(ranks[axis] * alone - A)[0] > -1e-10
            product = oracles.kron(product, oracles.matrix_power(H + eps * eyes[axis], 1 / m))
        assert torch.linalg.eigvalsh(r * product - A - r * eps * torch.eye(len(A), dtype=A.dtype))[0] > -1e-10


def test_left_of_a_gradient_is_right_of_its_transpose() -> None:
    steps = [[g] for g in gradients(5, 3)]
    turned = [[g.T.contiguous()] for (g,) in steps]
    left = run({"method": "one_sided", "side": "left", **AT_ONCE}, steps)[0]
    right = run({"method": "one_sided", "side": "right", **AT_ONCE}, turned)[0]
    assert torch.equal(left, right.T)


# --- 4.10: a vector -------------------------------------------------------------------------------------------------------
def test_alternating_with_one_axis_is_the_star_by_the_frobenius_norm() -> None:
    """From the identity and with each root at once: ``L <- L - L S L / (1 + |S L|_F)``, then ``L^(1/2) g``."""
    one = AlternatingInverse(damping=0.0, start=None)
    other = InverseDims(denominator="fro", ridge=1.0, relative=False, unit=True)
    states = one.init(frame(5)), other.init(frame(5))
    for index, g in enumerate(gradients(5, steps=12)):
        for representation, state in zip((one, other), states, strict=True):
            take(representation, state, Gradient(g.unsqueeze(0)), Fold(1.0, 1.0, 1.0, summed=True), index)
        found = [PositiveRoot().prepare(r, s, None)["root_0"] for r, s in zip((one, other), states, strict=True)]
        assert oracles.relative_error(*found) < 1e-10


# --- 4.12: ranges and the polar factor ------------------------------------------------------------------------------------
def spread(lowest: float, rows: int = 96, columns: int = 128) -> Tensor:
    """A matrix whose singular values are spread evenly over the logarithm, the largest one."""
    U, _, Vh = torch.linalg.svd(torch.randn(rows, columns, dtype=torch.float64), full_matrices=False)
    return (U * torch.logspace(0, torch.tensor(lowest).log10().item(), rows, dtype=torch.float64)) @ Vh


RANGES: dict[str, tuple[Any, dict[float, tuple[float, float]]]] = {
    "muon": ((MUON,) * 5, {1e-1: (0.68, 1.13), 1e-3: (0.18, 1.20)}),
    "polar_express_5": (polar_express(1e-3, 5), {1e-1: (0.88, 1.12), 1e-3: (0.36, 1.12)}),
    "polar_express_8": (polar_express(1e-3, 8), {1e-1: (1.0, 1.0), 1e-3: (0.997, 1.0)}),
}


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("dtype, slack", [(torch.float64, 1e-2), (torch.bfloat16, 3e-2)])
def test_ranges_of_matrices(name: str, dtype: torch.dtype, slack: float) -> None:
    """Stated figures, for singular values over one and over three orders of magnitude."""
    quintics, figures = RANGES[name]
    for lowest, (low, high) in figures.items():
        s = torch.linalg.svdvals(polar_factor(spread(lowest)[None].to(dtype), quintics)[0].double())
        assert low - slack <= s.min() and s.max() <= high + slack, (lowest, float(s.min()), float(s.max()))


def test_ten_steps_reach_small_singular_values() -> None:
    """Down to 1e-4 of the largest, as property 10 asks: within 6e-3 of ``U V^T`` in the spectral norm."""
    G = spread(1e-4, 12, 16)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    X = PolarFactor(method="polar_express", steps=10, lowest=1e-4).solve(Unfolded(), {}, G[None])[0]
    assert torch.linalg.matrix_norm(X - U @ Vh, ord=2) <= 6e-3


class Unfolded:
    """A matrix as it is."""

    def unfold(self, g: Tensor) -> Tensor:
        return g


# --- 4.13: the fixed point ------------------------------------------------------------------------------------------------
def swept(samples: list[Tensor], sweeps: int) -> tuple[Tensor, Tensor]:
    """The factors after so many passes over all samples, renewed at the end of each: half of the old, half of the new mean."""
    N = len(samples)
    representation = CrossDims(start=1.0)
    state = representation.init(frame(*samples[0].shape))
    for _ in range(sweeps):
        for j, g in enumerate(samples):
            fold = Fold(0.5 if j == 0 else 1.0, 0.5 / N, 0.5 if j == 0 else 0.0)
            representation.update(state, Gradient(g.unsqueeze(0)), fold)
        representation.refresh(state)
    return state["factor_0"][0], state["factor_1"][0]


def test_the_fixed_point_of_kl_factors_is_stationary() -> None:
    """``S_1 = E[G S_2^-1 G^T] / n`` and ``S_2 = E[G^T S_1^-1 G] / m`` to 1e-6: there the gradient of the divergence is zero."""
    samples = [torch.diag(torch.tensor([3.0, 1.0, 0.3]).double()) @ g for g in gradients(3, 4, steps=40)]
    A, B = (s.requires_grad_() for s in swept(samples, 60))
    divergence = 4 * torch.logdet(A) + 3 * torch.logdet(B)
    for g in samples:
        divergence = divergence + (torch.linalg.solve(A, g) @ torch.linalg.inv(B) * g).sum() / len(samples)
    for factor, slope in zip((A, B), torch.autograd.grad(divergence, (A, B)), strict=True):
        assert (factor @ slope).abs().max() < 1e-6  # in units of the factor
    assert A.detach().diagonal().max() > 5 * A.detach().diagonal().min()  # far from where it started


def test_only_the_product_of_kl_factors_has_a_scale() -> None:
    """``S_1 c``, ``S_2 / c``: the next refresh makes them equal again, and the direction is the same."""
    representation, found = CrossDims(), []
    for c in (1.0, 37.0):
        state = representation.init(frame(3, 4))
        steps = gradients(3, 4, steps=6)
        for t, g in enumerate(steps):
            if t == 5:
                for name, share in (("factor_0", c), ("factor_1", 1 / c)):
                    state[name].mul_(share)
                for axis, share in ((0, c), (1, 1 / c)):
                    state[f"values_{axis}"].mul_(share)
            take(representation, state, Gradient(g.unsqueeze(0)), Fold(0.9, 0.1, 0.1), t)
        solver = PositiveRoot()
        found.append(solver.solve(representation, solver.prepare(representation, state, None), steps[-1].unsqueeze(0)))
        means = [state[f"factor_{axis}"][0].diagonal().mean() for axis in (0, 1)]
        assert oracles.relative_error(*means) < 1e-12
    assert oracles.relative_error(*found) < 1e-10
