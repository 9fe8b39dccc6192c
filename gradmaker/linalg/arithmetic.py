"""In what precision a maker computes, and what is finite in it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["plain_arithmetic", "sums_to_finite"]


def plain_arithmetic(model: nn.Module) -> torch.autocast:
    """The maker's own mathematics runs outside of the user's autocast."""
    return torch.autocast(next(model.parameters()).device.type, enabled=False)


def sums_to_finite(value: Tensor) -> Tensor:
    """Whether all elements are finite, without a mask of them.  # () bool"""
    return value.detach().sum(dtype=torch.promote_types(value.dtype, torch.float32)).isfinite()
