"""What a trust region knows from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from gradmaker.trust_region.quadratic import QuadraticModel

__all__ = ["Region"]


@dataclass(frozen=True)
class Region:
    """The damping ``lambda`` as it is now, the step by which it will be judged, and the last step; never written to."""

    damping: float
    ratio: float | None = None
    """``rho`` of the last time; minus infinity where the model predicted no decrease, or the loss was not finite."""
    waiting: QuadraticModel | None = None  # of the step that ``lambda`` is judged by, once the weights have moved
    index: int = -1  # of that step
    last: Mapping[str, Tensor] = field(default_factory=dict)  # the last step, by name; empty before the first
