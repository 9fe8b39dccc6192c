"""The options of a block, beside its parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradmaker.grafting import Grafting
from gradmaker.precision import Precision

__all__ = ["RARE", "BlockOptions"]

RARE = 3
"""Steps between refreshes from which it pays to turn an average with its basis, which takes as many products as projecting it
in two steps."""


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """The options of a config that a block reads; see `GradientConfig`. Blocks with equal options may share a stack."""

    method: str = "method"
    """Name of the method in the plan: each method has its own clocks."""
    decay: float | None = None
    averaging: str = "corrected"
    beta1: float = 0.0
    nesterov_average: bool = False
    grafting: Grafting | None = None
    max_dim: int = 8192
    dtype: torch.dtype | None = None
    precision: Precision = Precision()
    slow_part: bool = False
    """Whether the refresh clock is for a slow part of statistics, and blocks without one refresh at every measurement."""
    turns_average: bool = False
    """Whether an average of gradients may be held in the basis of a solver, and turn with it: refreshes are `RARE` or rarer."""
