"""Certificates of inverses and Cholesky factors: two fixed vectors in place of a full product, ``O(d^2)`` for ``O(d^3)``.

``V`` are two rows of signs, ``D = diag(A)``, and all is measured in the units of ``D``, so that axes of different scale
count alike. For an error matrix ``E``, the entry ``j`` of ``V E`` is a sum of ``E_ij`` with signs: a single wrong entry shows
in full, many of them by the length of their column, on average over the signs. The signs are fixed, so that a refresh is
repeatable; the errors of rounding and of a routine do not know them. An error is missed if it cancels in two random sums.

A certificate that refuses costs time alone: the caller decides by the full residual. So the tolerances are close to what
rounding gives: in float32 and float64, of sides 2 to 785, conditions 10 to 1e12, spectra that decay, rank-deficient with a
ridge, with one large eigenvalue, and axes of scales over four decades, right inverses show at most 1.5 units, and one wrong
entry of ``1e-3 (X_ii X_jj)^(1/2)`` at least 6 at a side of 785, 1e2 at 33. Right triangles show at most 20, and a wrong entry
``1e-3 A_jj^(1/2)`` at least 1e2, less only where rounding itself is as large (condition 1e6 in float32).

Reference: Freivalds 1979 (verification of products by random vectors); Higham 2002, chapters 10 and 14 (error bounds).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["LARGEST", "certify_inverse", "certify_triangle"]

LARGEST = 0.45
"""A residual from which on an inverse may be wrong by a factor of two: it is refused, whatever rounding explains."""
INVERSE = 4.0
"""Tolerance in units of ``u |D^(-1/2) A D^(-1/2)| |D^(1/2) X D^(1/2)|``, Frobenius norms."""
TRIANGLE = 50.0
"""Tolerance in units of ``u d^(1/2)``: a backward error, which no condition enters."""
GOLDEN = 0.6180339887498949


def _signs(A: Tensor) -> Tensor:
    """``V``.  # (1, 2, d)"""
    make = _equidistributed if type(A) is Tensor else _equidistributed.__wrapped__  # tensors without data are not kept
    return make(A.shape[-1], A.dtype, A.device)


@lru_cache(maxsize=256)
def _equidistributed(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Signs by a quadratic sequence modulo one, which is equidistributed (Weyl).  # (1, 2, d)"""
    phase = torch.arange(1, 2 * d + 1, dtype=torch.float64, device=device).square_().mul_(GOLDEN).frac_()
    return (1 - 2 * phase.round_()).to(dtype).view(1, 2, d)


def _worst(E: Tensor) -> Tensor:
    """The largest root mean square over the two vectors.  # (B, 2, d) -> (B,)"""
    return E.square().mean(1).amax(-1).sqrt()


def _norm(rows: Tensor) -> Tensor:
    """Estimate of the Frobenius norm of ``M`` by ``V M``.  # (B, 2, d) -> (B,)"""
    return rows.square().sum(-1).mean(-1).sqrt()


def certify_inverse(A: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """The residual of ``X = A^-1`` in units of its rows, ``max_j |V D^(-1/2) (A X - I) D^(1/2)|_j``, and where it is accepted.

    Non-finite entries make it non-finite, which is refused.  # symmetric (B, d, d) -> (B,), bool (B,)
    """
    V, s = _signs(A), A.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(1)  # (1, 2, d), (B, 1, d)
    W = torch.bmm(V / s, A)  # `@` takes four operators for one
    found = _worst(torch.bmm(W, X) * s - V)
    size = torch.maximum(_norm(torch.bmm(V * s, X) * s), (X.diagonal(dim1=-2, dim2=-1) * s.squeeze(1).square()).amax(-1))
    tolerance = INVERSE * (torch.finfo(A.dtype).eps / 2) * _norm(W / s) * size
    return found, found <= tolerance.clamp(max=LARGEST)


def certify_triangle(A: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    """The residual of ``(U^T U)^-1``, as of `certify_inverse`, and where it is accepted.

    What is judged is the backward error in units of rows and columns, ``max_j |V D^(-1/2) (U^T U - A) D^(-1/2)|_j``. The
    residual only must be within `LARGEST`: beyond, ``A`` is singular to working precision.  # (B, d, d) -> (B,), bool (B,)
    """
    V, s = _signs(A), A.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(1)
    scaled = V / s
    W = torch.bmm(scaled, A)
    wrong = _worst((torch.bmm(torch.bmm(scaled, U.mT), U) - W) / s)
    half = torch.linalg.solve_triangular(U.mT, W.mT, upper=False)
    found = _worst(torch.linalg.solve_triangular(U, half, upper=True).mT * s - V)
    tolerance = TRIANGLE * (torch.finfo(A.dtype).eps / 2) * A.shape[-1] ** 0.5
    return found, (wrong <= tolerance) & (found <= LARGEST)
