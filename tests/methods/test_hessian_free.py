"""Hessian-free optimization as published: line search, warm start, preconditioner, a batch of its own for the curvature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradmaker import from_config
from gradmaker.solvers import LevenbergMarquardt, TruncatedCG
from tests import models, oracles
from tests.models import Case
from tests.passes.test_products import dense, step, trainable
from tests.solvers.test_matrix_free import PLAIN_CG, Quadratic, gradient, matrix


def cg(**options: Any) -> TruncatedCG:
    return TruncatedCG(**{**vars(PLAIN_CG), **options})


# --- line search ------------------------------------------------------------------------------------------------------------
def first_length(loss: Callable[[Tensor], float], g: Tensor, x: Tensor) -> float:
    """Armijo's rule by hand."""
    for k in range(60):
        eta = 0.8**k
        if loss(-eta * x) <= loss(torch.zeros_like(x)) - 0.01 * eta * float(g @ x):
            return eta
    return 0.0


@pytest.mark.parametrize("steepness", [0.0, 1.0, 30.0, 1e4])
def test_line_search_is_armijos(steepness: float) -> None:
    """The model is right but for a quartic: the steeper that is, the shorter the step."""
    C, g = matrix()

    def loss(d: Tensor) -> Tensor:
        return d @ C @ d / 2 + g @ d + steepness * d.square().sum().square()

    full, _ = Quadratic(C).solve(cg(), g)
    found, cache = Quadratic(C, loss).solve(cg(line_search=True), g)
    eta = first_length(lambda d: float(loss(d)), g, full)
    assert (eta == 1) == (steepness == 0) and eta > 0 and int(cache["rejected"]) == 0
    assert oracles.relative_error(found, eta * full) < 1e-12


def test_sufficient_decrease_is_a_hundredth() -> None:
    """A loss that falls by a little less, or a little more, than a hundredth of what its slope promises."""
    C, g = matrix()
    full, _ = Quadratic(C).solve(cg(), g)
    for share, taken in ((0.0099, 0), (0.0101, 1)):
        found, cache = Quadratic(C, lambda d, share=share: share * (g @ d)).solve(cg(line_search=True), g)
        assert oracles.relative_error(found, taken * full) < 1e-12 and int(cache["rejected"]) == 1 - taken


def test_a_rejected_step_is_zero_and_goes_on() -> None:
    """No length lowers the loss: nothing is done, the damping grows, the next start is kept."""
    C, g = matrix()
    solver = cg(line_search=True, adapt=LevenbergMarquardt(), warm=0.9)
    found, cache = Quadratic(C, lambda d: d.norm()).solve(solver, g, 2)
    assert not found.any() and int(cache["rejected"]) == 2 and int(cache["failures"]) == 0
    assert float(cache["damping"]) == pytest.approx(0.1 * 1.5**2) and cache["solution"].any()


def test_the_damping_follows_the_full_step() -> None:
    """At the full step stands a wall, so that the search takes 0.8 of it, for which the model would be right."""
    C, g = matrix()
    full, _ = Quadratic(C).solve(cg(), g)

    def loss(d: Tensor) -> Tensor:
        wall = (d + full).norm() < 1e-9 * full.norm()
        return d @ C @ d / 2 + g @ d + (g @ full if wall else 0.0)

    found, cache = Quadratic(C, loss).solve(cg(line_search=True, adapt=LevenbergMarquardt()), g)
    assert oracles.relative_error(found, 0.8 * full) < 1e-12 and float(cache["damping"]) == pytest.approx(0.15)


def test_no_loss_no_search() -> None:
    C, g = matrix()
    assert torch.equal(Quadratic(C).solve(cg(line_search=True), g)[0], Quadratic(C).solve(cg(), g)[0])


# --- warm start -------------------------------------------------------------------------------------------------------------
def test_the_next_start_is_the_last_iterate() -> None:
    """Not the one that backtracking took, nor what the line search has left of it (Martens 2010, section 4.6)."""
    C, g = matrix()
    A = C + 0.1 * torch.eye(len(g), dtype=torch.float64)
    first = g * (g @ g) / (g @ A @ g)
    solver = cg(backtrack=True, line_search=True, iterations=60)
    found, cache = Quadratic(C, lambda d: (d + first / 2).square().sum()).solve(solver, g)
    assert float(found.norm()) <= float(first.norm())
    assert oracles.relative_error(cache["solution"][0], torch.linalg.solve(A, g)) < 1e-9


# --- preconditioner ---------------------------------------------------------------------------------------------------------
ONE = {"method": "hessian_free", "damping": 0.3, "iterations": 1, "warm": 0.0, "backtrack": False, "adapt": False}


def mean_of_squares(case: Case, reduction: str) -> Tensor:
    """(1/M) sum_n g_n^2 with g_n the sum of the loss terms of example n, M terms; without the 1/M for a sum. By a loop."""
    total = torch.zeros_like(oracles.parameter_vector(case.model))
    for x, t in zip(case.x.split(1), case.t.split(1), strict=True):
        loss = F.cross_entropy(case.model(x), t, reduction="sum")
        g = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, trainable(case), materialize_grads=True)])
        total += g.square()
    return total / case.t.numel() if reduction == "mean" else total


def one_iteration(case: Case, D: Tensor) -> Tensor:
    """Of preconditioned CG from zero, at M = (D + lambda)^0.75."""
    g, A = gradient(case), dense(case, "ggn") + 0.3 * torch.eye(len(D), dtype=torch.float64)
    p = g / (D + 0.3) ** 0.75
    return (g @ p) / (p @ A @ p) * p


NETWORKS: dict[str, Callable[[], Case]] = {
    "mlp": models.mlp,
    "convolution": lambda: models.convolution(2, groups=2),
    "embedding": models.embedding_mean,
    "layer_norm": models.normed,
    "bare_scale": models.bare_scale,
    "positions": models.tagger,
    "unused": models.unused,
    "tied": models.tied,
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("squares", ["examples", "batch"])
def test_preconditioner_is_the_published_one(name: str, reduction: str, squares: str) -> None:
    """Martens 2010, section 4.7: of the squares of the gradients of examples; the batch's square is the documented other."""
    case = NETWORKS[name]()
    case = case._replace(loss=lambda y, t: F.cross_entropy(y, t, reduction=reduction))
    D = mean_of_squares(case, reduction) if squares == "examples" else gradient(case).square()
    found = step(from_config(case.model, {**ONE, "squares": squares, "line_search": False}), case)
    assert oracles.relative_error(found, one_iteration(case, D)) < 1e-9


def test_preconditioner_of_micro_batches() -> None:
    """Their squares add up by weight, and the ones of masked examples are left out."""
    case = models.mlp()
    case = case._replace(t=case.t.index_fill(0, torch.tensor([1]), -100))
    kept = [0, 2, 3, 4, 5]
    D = mean_of_squares(case._replace(x=case.x[kept], t=case.t[kept]), "mean")
    expected = one_iteration(case, D)
    assert oracles.relative_error(step(from_config(case.model, {**ONE, "line_search": False}), case), expected) < 1e-9
    maker: Any = from_config(case.model, {**ONE, "line_search": False})
    case.model.zero_grad(set_to_none=True)
    for rows, weight in (([0, 1, 2], 2 / 5), ([3, 4, 5], 3 / 5)):
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(case.model, case.x[rows]), case.t[rows])
        maker.accumulate(weight)
    maker.precondition()
    assert oracles.relative_error(oracles.gradient_vector(case.model), expected) < 1e-9


def test_an_unrecognised_loss_has_squares_as_well() -> None:
    case = models.mlp_gaussian()
    huber = case._replace(loss=lambda y, t: F.huber_loss(y, t, delta=0.4, reduction="none").sum() / len(t))
    maker: Any = from_config(case.model, {**ONE, "line_search": False, "curvature": "Hessian"})
    rows = [
        torch.autograd.grad(huber.loss(case.model(x), t), trainable(case))
        for x, t in zip(case.x.split(1), case.t.split(1), strict=True)
    ]
    D = torch.stack([torch.cat([g.reshape(-1) for g in row]).square() for row in rows]).mean(0)
    g, H = gradient(huber), dense(huber, "hessian")
    p = g / (D + 0.3) ** 0.75
    curved = p @ H @ p + 0.3 * p @ p
    expected = (g @ p) / curved * p if curved > 0 else p
    assert oracles.relative_error(step(maker, huber), expected) < 1e-9
