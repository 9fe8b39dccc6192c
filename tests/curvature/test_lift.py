"""Noise that lifts what a probe met: every entry of a block that is not zero throughout, zeros included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gradmaker.curvature.probe import _lifted


@dataclass
class Step:
    """Draws by name."""

    part: int = 0

    def generator(self, name: str, device: torch.device) -> torch.Generator:
        return torch.Generator(device).manual_seed(len(name))


def test_zeros_of_a_block_are_lifted_with_the_rest() -> None:
    step: Any = Step()
    h = torch.zeros(3, 4, 5, dtype=torch.float64)
    h[0, 1, 2], h[1] = 2.0, 3.0
    found = _lifted(step, "name", h, 1e-3)
    moved = (found - h).abs()
    assert bool((moved[:2] > 0).all()) and not moved[2].any()
    assert float(moved[:2].max()) < 6e-3 and torch.equal(_lifted(step, "name", h, 0.0), h)
