"""The two unknowns of a rescaled step near their borders, and which step adapted damping judges, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmaker.solvers.levenberg_marquardt import AdaptiveDamping
from gradmaker.trust_region.damping_state import due, judged
from gradmaker.trust_region.region import Region
from gradmaker.trust_region.rescaling import PARALLEL, minimise


def pair(cosine: float, sizes: tuple[float, float] = (1.0, 1.0)) -> tuple[Tensor, Tensor]:
    """Slopes and a matrix whose directions have this angle."""
    a, b = sizes
    A = torch.tensor([[a * a, a * b * cosine], [a * b * cosine, b * b]], dtype=torch.float64)
    return torch.tensor([-0.7, 0.4], dtype=torch.float64), A


@pytest.mark.parametrize("sizes", [(1.0, 1.0), (1e-4, 30.0), (1e6, 1e-3)])
@pytest.mark.parametrize("cosine", [0.0, -0.5, 0.9, 0.999, -0.9999, 0.999999])
def test_directions_that_are_nearly_parallel_count_as_two(cosine: float, sizes: tuple[float, float]) -> None:
    b, A = pair(cosine, sizes)
    w, expected = minimise(b, A), -torch.linalg.solve(A, b)
    assert float(((w - expected) / expected).abs().max()) < 1e-8


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_parallel_directions_count_as_one(sign: float) -> None:
    """Below the square of the sine the second is left out."""
    b, A = pair(sign * (1 - PARALLEL / 4))
    assert minimise(b, A).tolist() == [pytest.approx(0.7), 0.0]
    two = pair(sign * (1 - 4 * PARALLEL))
    assert minimise(*two)[1] != 0


@pytest.mark.parametrize(
    "b, A, expected",
    [
        ([-0.7, 0.4], [[2.0, 0.5], [0.5, 0.0]], [0.35, 0.0]),  # a second one without curvature
        ([-0.7, 0.4], [[0.0, 0.0], [0.0, 1.0]], [1.0, 0.0]),  # a first one without curvature
        ([-0.7, float("nan")], [[2.0, 0.5], [0.5, 1.0]], [1.0, 0.0]),
        ([-0.7], [[2.0]], [0.35]),
        ([-0.7], [[0.0]], [1.0]),
    ],
)
def test_what_has_no_minimum(b: list[float], A: list[list[float]], expected: list[float]) -> None:
    assert minimise(torch.tensor(b).double(), torch.tensor(A).double()).tolist() == pytest.approx(expected)


# --- adapted damping ------------------------------------------------------------------------------------------------------
class Model:
    """A quadratic model with given numbers: the loss fell by ``fall``, the model predicted ``slope + curvature / 2``."""

    def __init__(self, fall: float = 1.0, slope: float = -2.0, curvature: float = 2.0, moved: float = 1.0) -> None:
        self.fall, self.slope, self.curvature = fall, slope, curvature
        self.moved = {nn.Parameter(torch.zeros(1)): torch.tensor([moved]).double()}
        self.asked = 0

    def displacement(self) -> Any:
        return self.moved

    def expand(self, directions: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.asked += 1
        one = torch.ones(1).double()
        return 5 * one[0], self.slope * one, self.curvature * one.unsqueeze(0)

    def loss_now(self) -> Tensor:
        return torch.tensor(5 - self.fall).double()


def waiting(model: Model, step: int = 0) -> Region:
    return Region(8.0, waiting=model, index=step)  # type: ignore[arg-type]


def rule(**options: Any) -> AdaptiveDamping:
    return AdaptiveDamping(interval=1, omega=0.5, **options)


def test_a_step_is_judged_once_another_begins() -> None:
    """Not while it goes on, and once."""
    model = Model()
    region = waiting(model, 3)
    assert judged(rule(), region, 3) is region and model.asked == 0
    after = judged(rule(), region, 4)
    assert (after.damping, after.ratio, after.waiting) == (4.0, pytest.approx(1.0), None) and region.damping == 8.0
    assert judged(rule(), after, 5) is after


@pytest.mark.parametrize(
    "fall, penalised, value",
    [
        (0.76, False, 4.0), (0.74, False, 8.0), (0.26, False, 8.0), (0.24, False, 16.0), (-1.0, False, 16.0),
        (float("nan"), False, 16.0), (0.76, True, 16.0),  # predicts an increase: -2 + 1 + 8 / 2
    ],
)  # fmt: skip
def test_both_bounds_of_the_ratio(fall: float, penalised: bool, value: float) -> None:
    assert judged(rule(penalised=penalised), waiting(Model(fall)), 1).damping == value


def test_the_penalty_is_a_half_of_damping_times_the_square() -> None:
    """``-6 + 1 + 8 / 2 = -1``: a fall by one is what was predicted."""
    after = judged(rule(penalised=True), waiting(Model(1.0, slope=-6.0)), 1)
    assert after.ratio == pytest.approx(1.0) and after.damping == 4.0


def test_weights_that_have_not_moved_say_nothing() -> None:
    after = judged(rule(), waiting(Model(moved=0.0)), 1)
    assert after.damping == 8.0 and after.ratio is None


@pytest.mark.parametrize("interval, steps", [(1, [0, 1, 2, 3, 4, 5]), (2, [1, 3, 5]), (3, [2, 5]), (6, [5])])
def test_the_last_step_of_an_interval(interval: int, steps: list[int]) -> None:
    assert [step for step in range(6) if due(AdaptiveDamping(interval=interval), step)] == steps
