"""Searches that go on for long, and rules at their very bounds: against textbook recursions in float64."""

from __future__ import annotations

from math import ceil
from typing import Any

import pytest
import torch
from torch import Tensor

from gradmaker.curvature.products import Product
from gradmaker.representations.base import Fold
from gradmaker.solvers import CurveBall, Krylov, LevenbergMarquardt, Neumann, TruncatedCG
from tests import oracles
from tests.solvers.test_matrix_free import PLAIN_CG, Quadratic, absolute, matrix


def slow(d: int = 500, smallest: float = -4.0) -> tuple[Tensor, Tensor]:
    """A diagonal that conjugate gradients need hundreds of iterations for."""
    return torch.diag(torch.logspace(smallest, 0, d, dtype=torch.float64)), torch.ones(d, dtype=torch.float64)


def textbook(A: Tensor, g: Tensor, count: int) -> tuple[list[Tensor], list[float]]:
    """Iterates of conjugate gradients from zero, and ``phi = x^T A x / 2 - x^T g`` of each."""
    x, r, p = torch.zeros_like(g), g, g
    iterates, values = [], []
    for _ in range(count):
        step = (r @ r) / (p @ A @ p)
        x, before = x + step * p, r
        r = r - step * (A @ p)
        p = r + (r @ r) / (before @ before) * p
        iterates.append(x)
        values.append(float(x @ A @ x / 2 - x @ g))
    return iterates, values


def products(C: Tensor, g: Tensor, solver: TruncatedCG) -> int:
    """How many a solve takes."""
    problem, calls = Quadratic(C), [0]
    problem.representation.release(problem.state)

    def counted(v: Tensor) -> Tensor:
        calls[0] += 1
        return v @ C

    problem.representation.update(problem.state, Product(counted), Fold(0.0, 1.0, 1.0))
    solver.solve(problem.representation, solver.prepare(problem.representation, problem.state, None), g.unsqueeze(0))
    return calls[0]


# --- truncated conjugate gradients ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 3e-4, 1e-4, 1e-5])
def test_progress_is_measured_over_a_tenth_of_all_iterations(tolerance: float) -> None:
    """Ten of the first hundred, and ``ceil(i / 10)`` later on: with ten throughout the last stop 3, 4 and 6 too early."""
    C, g = slow()
    damping = 1e-7
    _, values = textbook(C + damping * torch.eye(len(g)).double(), g, 250)
    phi = [0.0, *values]

    def stops(i: int) -> bool:
        k = max(10, ceil(i / 10))
        return i > k and phi[i] < 0 and (phi[i] - phi[i - k]) / phi[i] < k * tolerance

    expected = next((i for i in range(1, 251) if stops(i)), 250)
    options: dict[str, Any] = {"damping": damping, "tolerance": tolerance, "iterations": 250}
    assert abs(products(C, g, TruncatedCG(**{**vars(PLAIN_CG), **options})) - expected) <= 1  # recursions round apart
    assert tolerance > 3e-4 or expected > 110


def test_iterates_that_are_kept_are_a_third_apart() -> None:
    """Each 1.3 times as late as the one before, rounded up; the last of all is kept too."""
    C, g = slow(60, -2.0)
    A = C + 0.1 * torch.eye(60).double()
    seen: list[Tensor] = []

    def loss(d: Tensor) -> Tensor:
        seen.append(-d)
        return d.square().sum()  # falls all the way back to the first

    options: dict[str, Any] = {"backtrack": True, "iterations": 22}
    found, _ = Quadratic(C, loss).solve(TruncatedCG(**{**vars(PLAIN_CG), **options}), g)
    iterates, _ = textbook(A, g, 22)
    asked = [1 + min(range(22), key=lambda j: float((iterates[j] - x).norm())) for x in seen if x.any()]
    assert sorted(set(asked)) == [1, 2, 3, 4, 6, 8, 11, 15, 20, 22]
    assert oracles.relative_error(found, iterates[0]) < 1e-10


@pytest.mark.parametrize("share, factor", [(0.25, 1.0), (0.75, 1.0), (0.2499, 1.5), (0.7501, 2 / 3)])
def test_a_ratio_on_a_bound_leaves_the_damping(share: float, factor: float) -> None:
    one = torch.ones(1, dtype=torch.float64)
    found = LevenbergMarquardt().adapt(3 * one, -share * one[0], -one[0])
    assert float(found) == pytest.approx(3 * factor, rel=1e-12)


@pytest.mark.parametrize("least, most, factor", [(2.5, 1e8, 2.5), (1e-8, 4.0, 4.0)])
def test_the_damping_keeps_its_bounds(least: float, most: float, factor: float) -> None:
    one, rule = torch.ones(1, dtype=torch.float64), LevenbergMarquardt(least=least, most=most)
    change = -one[0] if factor < 3 else one[0]
    assert float(rule.adapt(3 * one, change, -one[0])) == factor


# --- Krylov, Neumann, CurveBall -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_a_floor_is_a_share_of_the_largest_eigenvalue(scale: float, damping: float) -> None:
    C, g = matrix()
    C, damping, floor = scale * C, scale * damping, 0.3
    s, Q = torch.linalg.eigh(C)
    expected = Q @ ((Q.mT @ g) / (s.clamp(min=floor * float(s.max())) + damping))
    solver = Krylov(damping=damping, dimension=len(g), floor=floor, remember=False)
    x, _ = Quadratic(C).solve(solver, g)
    assert oracles.relative_error(x, expected) < 1e-8
    assert oracles.relative_error(solver.operator(Quadratic(C).representation, state(C))[0] @ g, expected) < 1e-10


def state(C: Tensor) -> Any:
    return Quadratic(C).state


@pytest.mark.parametrize("definite", [True, False])
@pytest.mark.parametrize("damping", [0.0, 0.7, 30.0])
def test_the_scale_of_a_series_has_a_margin_on_the_curvature_alone(damping: float, definite: bool) -> None:
    """``eta = 1 / (1.1 max |s| + damping)``: with no further term ``P g = eta g``, for ``g`` an eigenvector exactly."""
    C, _ = matrix(definite)
    s, Q = torch.linalg.eigh(C)
    top = int(s.abs().argmax())
    x, _ = Quadratic(C).solve(Neumann(damping=damping, terms=0), Q[:, top])
    assert oracles.relative_error(x, Q[:, top] / (1.1 * float(s.abs().max()) + damping)) < 1e-10
    x, _ = Quadratic(C).solve(Neumann(damping=damping, terms=3, repeats=4), Q[:, top])
    eta, value = 1 / (1.1 * float(s.abs().max()) + damping), float(s[top]) + damping
    assert oracles.relative_error(x, eta * sum((1 - eta * value) ** j for j in range(4)) * Q[:, top]) < 1e-10


@pytest.mark.parametrize("interval", [1, 2, 3, 5])
def test_the_damping_of_curveball_changes_at_the_end_of_an_interval(interval: int) -> None:
    C, g = matrix()
    loss = lambda d: d.norm()  # noqa: E731  # never as predicted: the damping grows
    for steps in range(1, 7):
        solver = CurveBall(damping=1.0, interval=interval, adapt=LevenbergMarquardt(grow=2.0))
        _, cache = Quadratic(C, loss).solve(solver, g, steps)
        assert float(cache["damping"]) == 2.0 ** (steps // interval)


def test_an_absolute_inverse_has_its_damping_outside() -> None:
    """Of an indefinite matrix in all dimensions: ``|C| + damping``, not ``|C + damping|``."""
    C, g = matrix(definite=False)
    x, _ = Quadratic(C).solve(Krylov(damping=0.2, dimension=len(g), remember=False), g)
    assert oracles.relative_error(x, absolute(C, 0.2) @ g) < 1e-8
