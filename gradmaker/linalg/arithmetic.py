"""Precision of a maker's arithmetic, and a test for finite values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["norms", "plain_arithmetic", "sums_to_finite", "total"]


def plain_arithmetic(model: nn.Module) -> torch.autocast:
    """Context in which a maker computes: without the user's autocast."""
    return torch.autocast(next(model.parameters()).device.type, enabled=False)


def sums_to_finite(value: Tensor) -> Tensor:
    """Whether all elements are finite, by their sum, which needs no mask.  # () bool"""
    return value.detach().sum(dtype=torch.promote_types(value.dtype, torch.float32)).isfinite()


def total(value: Tensor) -> Tensor:
    """A number that is finite where all elements are, by their sum: of one real element itself.  # ()"""
    if value.is_complex():
        return torch.where(sums_to_finite(value), 0.0, torch.nan)
    if value.numel() == 1 and value.layout is torch.strided:
        return value.detach().reshape(())
    return value.detach().sum(dtype=torch.promote_types(value.dtype, torch.float32))


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The norms of dense real tensors, in float32 or better, each of its own: a large one may overflow.  # () each"""
    wide = [torch.promote_types(t.dtype, torch.float32) for t in tensors]
    found: list[Tensor] = [torch.empty(0)] * len(tensors)
    for dtype in dict.fromkeys(wide):
        places = [j for j, own in enumerate(wide) if own is dtype]
        for j, norm in zip(places, torch._foreach_norm([tensors[j] for j in places], 2, dtype=dtype), strict=True):
            found[j] = norm
    return found
