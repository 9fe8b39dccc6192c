"""Triangular factors ``A = U^T U`` in place of inverses: their factorisation, products with ``A^-1``, and when they pay."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from gradmaker.linalg.fallbacks import none_of

__all__ = ["apply_inverse", "factor", "holds_triangle", "inverse_of", "triangle_of_inverse"]

PADDED, PADDING = 256, 8
"""At sides that are multiples of 256, columns share cache lines: Cholesky takes 0.31, 2.3, 4.6 ms at 256, 512, 768, and 0.14,
0.8, 3.0 at 264, 520, 792 (float32, one CPU core)."""
SMALLEST = 64
"""Sides below which two triangular solves cost more in calls than in arithmetic."""
SOLVES_FOR_INVERSE = 2.0
"""Measured in float32 on one CPU core, for ``R`` rows: what an inverse takes over a triangle, in units of ``d / R`` pairs of
solves over products: 5.6 ms against 0.44 at ``d = 785``, 1.9 against 0.23 at 512, both for 128 rows."""


def holds_triangle(interval: int | None, side: int, rows: int, device: torch.device) -> bool:
    """Whether ``U`` is held, not ``A^-1``, by the time of both over the steps that one refresh serves.

    Two solves with ``U`` take longer than one product with ``A^-1``, which takes another ``2/3 d^3`` to form.

    interval: that number of steps; None: unknown, or many. side: ``d``. rows: an upper bound of the vectors of a solve
    """
    steps = inf if interval is None else interval
    return device.type == "cpu" and side >= SMALLEST and steps * rows < SOLVES_FOR_INVERSE * side


def factor(A: Tensor) -> tuple[Tensor, Tensor]:
    """``U``, contiguous, with zeros below the diagonal, and LAPACK's ``info``, 0 where it exists.  # (B, d, d), (B,)"""
    B, d = A.shape[:2]
    if A.device.type != "cpu" or d % PADDED:
        L, info = torch.linalg.cholesky_ex(A)
        return L.mT.contiguous(), info  # a view: LAPACK's matrices are in column order
    padded = A.new_zeros(B, d + PADDING, d + PADDING)
    padded[:, :d, :d] = A
    padded.diagonal(dim1=-2, dim2=-1)[:, d:] = 1
    L, info = torch.linalg.cholesky_ex(padded)
    return L[:, :d, :d].mT.contiguous(), info


def apply_inverse(U: Tensor, g: Tensor, axis: int) -> Tensor:
    """``g x_axis A^-1``, by two triangular solves from the right, as rows are contiguous.  # (B, d, d), (B, d_1, ..., d_m)"""
    moved = g.movedim(axis, -1)
    x = moved.reshape(len(g), -1, U.shape[-1])
    half = torch.linalg.solve_triangular(U, x, upper=True, left=False)
    whole: Tensor = torch.linalg.solve_triangular(U.mT, half, upper=False, left=False)
    return whole.reshape(moved.shape).movedim(-1, axis).contiguous()


def inverse_of(U: Tensor, positive: Tensor) -> Tensor:
    """``A^-1``; the identity for members without a triangle, for which LAPACK raises.  # (B, d, d), bool (B,)"""
    if not none_of(~positive):
        U = torch.where(positive[:, None, None], U, torch.eye(U.shape[-1], dtype=U.dtype, device=U.device))
    return torch.cholesky_inverse(U.mT)


def triangle_of_inverse(X: Tensor) -> Tensor:
    """``U`` with ``(U^T U)^-1 = X``, in float64; zero where ``X`` is.  # (B, d, d)"""
    s, Q = torch.linalg.eigh(X.double())
    least = s.amax(-1, keepdim=True).abs() * torch.finfo(X.dtype).eps / 2
    root = torch.where(least > 0, torch.maximum(s, least).rsqrt(), 0.0).unsqueeze(-1) * Q.mT
    R: Tensor = torch.linalg.qr(root)[1]
    return (R * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-1)).to(X.dtype)
