"""The state of a trust region."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from gradmaker.trust_region.quadratic import QuadraticModel

__all__ = ["Region"]


@dataclass(frozen=True)
class Region:
    """The present damping ``lambda``, the step that will adapt it, and the last step; immutable."""

    damping: float
    ratio: float | None = None
    """Last reduction ratio ``rho``; minus infinity where the model predicted no decrease, or the loss was not finite."""
    waiting: QuadraticModel | None = None  # of the step that adapts ``lambda``, once the weights have moved
    index: int = -1  # of that step
    last: Mapping[str, Tensor] = field(default_factory=dict)  # the last step, by name; empty before the first
