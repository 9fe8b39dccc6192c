"""Making a maker allocates its state and little besides; what a step holds is not more than what it was made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS
from gradmaker.curvature.recursive import _derivative_moment
from gradmaker.representations.base import Frame
from tests.live import Live

NAMED = [name for name in METHODS if name != "gradient"]
LONG = 9000
"""More than `max_dim`: a matrix of that side is 309 MiB."""
MODELS: dict[str, Callable[[], nn.Module]] = {
    "long embedding": lambda: nn.Embedding(LONG, 16),
    "long inputs": lambda: nn.Linear(LONG, 8),
    "long outputs": lambda: nn.Linear(8, LONG),
    "long vector": lambda: nn.LayerNorm(LONG),
    "sides that are held": lambda: nn.Linear(500, 400),
    "inputs that are held": lambda: nn.Linear(700, 8),
    "outputs that are held": lambda: nn.Linear(8, 700),
    "embedding that is held": lambda: nn.Embedding(600, 16),
    "one block": lambda: nn.Linear(24, 25),
    "stacked": lambda: nn.Sequential(*[nn.Linear(100, 100) for _ in range(8)]),
}
EASE = 1.3
SLACK = 1 << 18
"""Bytes: of what is smaller than this nothing is asked."""


def held(maker: Any) -> int:
    """Bytes of all state of a maker."""
    states = [s for b in maker.plan.blocks for s in (b.state, b.cache, b.grafting_state, b.average)]
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for s in states for x in s.values()}
    return sum(storages.values())


@pytest.mark.parametrize("method", NAMED)
def test_making_a_maker_allocates_its_state_alone(method: str) -> None:
    """No unit matrix, no copy, for any axis, is made and thrown away."""
    accepted = 0
    for name, make in MODELS.items():
        model, config = make(), METHODS[method].Config()
        with Live() as live:
            try:
                maker = METHODS[method](model, config)
            except ValueError:
                continue
        accepted += 1
        assert live.peak <= EASE * held(maker) + SLACK, f"{name}: {live.peak} bytes at once for {held(maker)} of state"
        assert live.now <= held(maker) + SLACK, f"{name}: {live.now} bytes stay for {held(maker)} of state"
    assert accepted, "refuses all models: add one that it accepts"


@pytest.mark.parametrize("side", [1, 7])
@pytest.mark.parametrize("value", [1.0, 0.5])
def test_unit_matrices_of_a_stack(side: int, value: float) -> None:
    frame = Frame(3, (side, side), frozenset(), torch.float64, torch.device("cpu"))
    with Live() as live:
        found = frame.unit(side, value)
    assert torch.equal(found, value * torch.eye(side, dtype=torch.float64).expand(3, -1, -1))
    assert live.peak == found.untyped_storage().nbytes() == 3 * side * side * 8


def test_recursion_ends_at_the_lowest_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """KFRA's factor of the outputs is pulled through every layer but the lowest, whose inputs may be many."""
    sides: list[int] = []

    def moment(*args: Any) -> Tensor:
        found = _derivative_moment(*args)
        sides.append(len(found))
        return found

    monkeypatch.setattr("gradmaker.curvature.recursive._derivative_moment", moment)
    inputs = 1200
    model = nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, 3))
    maker: Any = METHODS["kfra"](model, METHODS["kfra"].Config(max_dim=8))
    with Live() as live:
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, torch.randn(8, inputs)), torch.randint(3, (8,)))
        maker.forward_and_backward()
    assert sides == [3, 6]
    assert live.peak < 2.5 * 4 * inputs**2  # the moment of its inputs, and what is cut from it
