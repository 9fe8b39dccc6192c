"""Damping: how much is added to a curvature before it is inverted, and how it is shared between factors.

``lambda`` is absolute (Tikhonov, in units of the curvature, so that ``C + lambda I`` is what is inverted) or, where a solver
says ``relative``, a fraction of the largest eigenvalue. Ridges are returned, never added to a statistic.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Literal, TypeAlias

import torch
from torch import Tensor

__all__ = ["Split", "average_trace", "check_choice", "check_interval", "equal_ridges", "pi_ridges"]

Split: TypeAlias = Literal["exact", "pi", "each"]
"""``exact``: ``F_1 (x) F_2 + lambda I``; ``pi``: a ridge on every factor by `pi_ridges`; ``each``: lambda on every factor."""


def check_interval(field: str, value: float, low: float, high: float, *, closed: bool = False) -> None:
    """Refuse a number outside ``(low, high)``, or ``[low, high)`` when ``closed``."""
    if not isfinite(value) or not (low <= value if closed else low < value) or not value < high:
        raise ValueError(f"{field} = {value!r}: legal are numbers in {'[' if closed else '('}{low:g}, {high:g})")


def check_choice(field: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a word that is not in the list."""
    if value not in choices:
        raise ValueError(f"{field} = {value!r}: legal are {', '.join(map(repr, choices))}")


def average_trace(F: Tensor) -> Tensor:
    """``tr F / dim F`` of full or diagonal factors.  # (B, d, d) or (B, d) -> (B,)"""
    return (F if F.ndim == 2 else F.diagonal(dim1=-2, dim2=-1)).mean(-1)


def pi_ridges(factors: Sequence[Tensor], share: Tensor | float) -> list[Tensor]:
    """Factored Tikhonov: ``r_k = share t_k / t``, with ``t_k = tr F_k / d_k`` and ``t`` the geometric mean of the ``t_k``.

    For two factors ``t_1 / t = pi`` and ``t_2 / t = 1 / pi``. ``share`` is ``lambda^(order / m)``: what each factor takes when
    all have one scale. A trace that is zero or not finite leaves no scale to compare: then ``pi = 1``.

    Reference: Martens, Grosse, ICML 2015, arXiv:1503.05671, section 6.3; k factors as in kfac-jax.  # -> m of (B,)
    """
    t = torch.stack([average_trace(F) for F in factors])  # (m, B)
    usable = (torch.isfinite(t) & (t > 0)).all(0)
    balance = torch.where(usable, t / t.log().mean(0).exp(), 1.0)
    return list(balance * share)


def equal_ridges(factors: Sequence[Tensor], damping: float) -> list[Tensor]:
    """``lambda`` on every factor.  # -> m of (B,)"""
    return [F.new_full(F.shape[:1], damping) for F in factors]
