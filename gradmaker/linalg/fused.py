"""Fused element-wise operators of torch, private ones: each is tried once for a dtype, and None where torch has no such one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["LARGEST", "adagrad", "adam", "has_adagrad", "has_adam"]

LARGEST = 1e4
"""Largest entry of a gradient for `adam`: the gradient cancels against itself to ``1e-16`` of it, beside a step of size 1."""
_SAMPLES = (1.0, -3.0, 0.0, 1e-3, 2.5, -7.0, 0.5, 4.0, -1e-4, 9.0, 6.0, -0.25, 7.0, 8.0, -2.0, 5.0, 3.0)
"""More than a vector of the processor, and no multiple of one."""
_LATE = torch.tensor(1e9)  # a count of steps at which torch's own bias corrections are 1


def adam(
    g: list[Tensor], m: list[Tensor], v: list[Tensor], *, beta1: float, beta2: float, factor: float, damping: float
) -> None:
    """``m <- beta1 m + (1 - beta1) g``, ``v <- beta2 v + (1 - beta2) g^2``, ``g <- factor m / (sqrt(v) + damping)``, at once.

    To be called where `has_adam` is true. The weights that torch's operator would move are the gradient itself, and its weight
    decay, with the rate ``-factor``, is one that takes them to zero first.
    """
    operator: Any = getattr(torch, "_fused_adamw_")  # noqa: B009  # no part of torch's types
    late = [_LATE] * len(g)
    rate = {"lr": -factor, "weight_decay": -1 / factor, "beta1": beta1, "beta2": beta2, "eps": damping}
    operator(g, g, m, v, [], late, **rate, amsgrad=False, maximize=False)


def adagrad(g: list[Tensor], s: list[Tensor], damping: float) -> list[Tensor]:
    """``s <- s + g^2``, and returns ``g / (sqrt(s) + damping)``; to be called where `has_adagrad` is true."""
    operator: Any = getattr(torch, "_fused_adagrad_")  # noqa: B009
    found = [torch.zeros_like(x) for x in g]
    operator(found, g, s, [_LATE] * len(g), lr=-1.0, lr_decay=0.0, weight_decay=0.0, eps=damping, maximize=False)
    return found


@cache
def has_adam(dtype: torch.dtype) -> bool:
    """Whether `adam` does what it says with tensors of this dtype on a CPU."""

    def tried(g: Tensor) -> tuple[Tensor, ...]:
        x, m, v = g.clone(), g.flip(0), g.roll(1).square()
        adam([x], [m], [v], beta1=0.9, beta2=0.99, factor=0.7, damping=1e-3)
        return x, m, v

    def formed(g: Tensor) -> tuple[Tensor, ...]:
        m, v = 0.9 * g.flip(0) + 0.1 * g, 0.99 * g.roll(1).square() + 0.01 * g.square()
        return 0.7 * m / (v.sqrt() + 1e-3), m, v

    return _same(tried, formed, dtype)


@cache
def has_adagrad(dtype: torch.dtype) -> bool:
    """Whether `adagrad` does what it says with tensors of this dtype on a CPU."""

    def tried(g: Tensor) -> tuple[Tensor, ...]:
        s = g.roll(1).square()
        return (*adagrad([g.clone()], [s], 1e-3), s)

    def formed(g: Tensor) -> tuple[Tensor, ...]:
        s = g.roll(1).square() + g.square()
        return g / (s.sqrt() + 1e-3), s

    return _same(tried, formed, dtype)


def _same(
    tried: Callable[[Tensor], tuple[Tensor, ...]], formed: Callable[[Tensor], tuple[Tensor, ...]], dtype: torch.dtype
) -> bool:
    """Whether an operator and its formula agree; not where the operator is missing, or takes other arguments."""
    g = torch.tensor(_SAMPLES, dtype=dtype, device="cpu")
    try:
        found = tried(g)
    except (AttributeError, TypeError, RuntimeError):
        return False
    tolerance = 16 * torch.finfo(dtype).eps
    pairs = zip(found, formed(g), strict=True)
    return all(bool(torch.isclose(a, b, rtol=tolerance, atol=tolerance).all()) for a, b in pairs)
