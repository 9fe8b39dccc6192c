"""Arrays ``C`` with ``C C^T = L`` of a held inverse ``L``: exact updates by new columns, and the spectrum of ``L``.

``C`` is known to its own digits, so that ``L`` keeps eigenvalues down to ``u^2 lambda_max`` in a precision of roundoff ``u``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradmaker.linalg.halves import moment

__all__ = ["array_spectrum", "array_update_"]

CUT = 1e-2
"""Eigenvalues of ``L`` below this share of the largest are taken from the array, where they keep their digits."""


def array_update_(C: Tensor, X: Tensor, scale: float = 1.0) -> None:
    """``C <- C'`` with ``C' C'^T = ((s^2 C C^T)^-1 + X X^T)^-1`` exactly, in place, by the form that takes fewer operations.

    scale: ``s``  # (B, d, d), (B, d, c)
    """
    if 2 * X.shape[-1] < C.shape[-1]:
        _update_by_columns_(C, X, scale)
    else:
        C.copy_(_triangularised(C * scale, X))


def _triangularised(C: Tensor, X: Tensor) -> Tensor:
    """The triangle of ``[[I, 0], [C^T X, C^T]]`` is ``[[*, *], [0, C'^T]]``: no subtraction and no inverse.

    Reference: the array form of recursive least squares, Kailath, Sayed, Hassibi, Linear Estimation 2000, section 12.3.
    """  # (B, d, d), (B, d, c) -> (B, d, d)
    d = C.shape[-1]
    if X.shape[-1] > d:
        X = torch.linalg.qr(X.mT, mode="r")[1].mT
    B, c = len(X), X.shape[-1]
    top = torch.cat([torch.eye(c, dtype=X.dtype, device=X.device).expand(B, c, c), X.new_zeros(B, c, d)], -1)
    rows = torch.cat([top, torch.cat([C.mT @ X, C.mT], -1)], -2)
    updated: Tensor = torch.linalg.qr(rows, mode="r")[1][:, c:, c:].mT
    return updated


def _update_by_columns_(C: Tensor, X: Tensor, scale: float) -> None:
    """``C' = C (I - W F^-T (F + I)^-1 W^T)``, ``W = C^T X``, ``F F^T = I + W^T W``: a square root of Woodbury's formula.

    ``F^T`` is the triangle of ``[W; I] = [U; V] F^T``, so that ``W^T W`` is not formed: ``W F^-T = U``, and
    ``(F + I)^-1 W^T = (I + V^T)^-1 U^T`` with ``V = F^-T`` of norm at most one.

    Reference: Andrews, AIAA Journal 1968 (square-root form of the Kalman filter).
    """  # (B, d, d), (B, d, c)
    d, c = X.shape[-2:]
    W = torch.cat([C.mT @ X if scale == 1 else (C.mT @ X).mul_(scale), X.new_zeros(len(X), c, c)], -2)
    W[:, d:].diagonal(dim1=-2, dim2=-1).fill_(1.0)
    Q, triangle = torch.linalg.qr(W)
    Q = Q * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # as of a triangle with a positive diagonal
    U, V = Q[:, :d], Q[:, d:].clone()
    V.diagonal(dim1=-2, dim2=-1).add_(1.0)
    right = torch.linalg.solve_triangular(V.mT, U.mT, upper=False)
    C.baddbmm_(C @ U, right, beta=scale, alpha=-scale)


def array_spectrum(C: Tensor) -> tuple[Tensor, Tensor]:
    """``C C^T = U diag(s) U^T``; NaN for a member where it fails.  # (B, d, d) -> (B, d), (B, d, d)

    LAPACK's SVD fails for some well-conditioned float32 matrices that it decomposes in float64.
    """
    try:
        return _graded(C) if C.device.type == "cpu" else _singular(C)
    except RuntimeError:  # one member fails the call for all: decompose them one at a time
        if len(C) > 1:
            spectra, bases = zip(*(array_spectrum(member) for member in C.split(1)), strict=True)
            return torch.cat(spectra), torch.cat(bases)
        if C.dtype == torch.float64:
            return torch.full_like(C[..., 0], torch.nan), torch.full_like(C, torch.nan)
        s2, U = array_spectrum(C.double())
        return s2.to(C.dtype), U.to(C.dtype)


def _singular(C: Tensor) -> tuple[Tensor, Tensor]:
    """The spectrum by the singular values of the array."""
    U, s, _ = torch.linalg.svd(C)
    return s.square(), U


def _graded(C: Tensor) -> tuple[Tensor, Tensor]:
    """The same by `eigh` of ``C C^T``, and below `CUT` by the singular values of ``C^T U`` for that part ``U`` of the basis.

    ``eigh`` is wrong by ``u lambda_max`` in an eigenvalue, but the angle between the two parts is as small as rounding, so
    that ``C^T U`` has the digits of ``C``: as exact as an SVD of ``C``, which takes twice as long. One host read: the size of
    the lower part, the largest of the stack.
    """
    s, U = torch.linalg.eigh(moment(C))
    k = int((s < CUT * s[..., -1:]).sum(-1).amax())
    if not k:
        return s, U
    triangle = torch.linalg.qr(C.mT @ U[..., :k], mode="r")[1]
    values, turned = torch.linalg.svd(triangle)[1:]
    s[..., :k] = values.square().flip(-1)
    U[..., :k] = U[..., :k] @ turned.mT.flip(-1)
    return s, U
