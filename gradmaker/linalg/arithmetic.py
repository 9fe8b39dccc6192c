"""Precision of a maker's arithmetic, and a test for finite values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["plain_arithmetic", "sums_to_finite"]


def plain_arithmetic(model: nn.Module) -> torch.autocast:
    """Context in which a maker computes: without the user's autocast."""
    return torch.autocast(next(model.parameters()).device.type, enabled=False)


def sums_to_finite(value: Tensor) -> Tensor:
    """Whether all elements are finite, by their sum, which needs no mask.  # () bool"""
    return value.detach().sum(dtype=torch.promote_types(value.dtype, torch.float32)).isfinite()
