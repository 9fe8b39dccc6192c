"""Tracking of an eigenbasis by a step of orthogonal iteration, which is one of the QR algorithm, in place of a decomposition.

Batched functions of ``A`` symmetric and ``Q`` orthogonal, both (B, d, d).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradmaker.linalg.eigen import decompose_again, symmetrise

__all__ = ["off_diagonal", "orthonormal", "power_step", "rayleigh_quotients", "sort_axis", "sorted_eigenvectors", "staleness"]

ALIASED, PADDING = 512, 8
"""On a CPU, rows whose length is a multiple of `ALIASED` share the sets of a cache: with eight columns more, a QR of side 512
takes 5.4 ms in place of 8.5."""


def sorted_eigenvectors(A: Tensor) -> Tensor:
    """Eigenvectors of ``A``, the largest eigenvalue first; NaN where the decomposition failed.  # (B, d, d)"""
    _, Q, ok, _ = decompose_again(symmetrise(A))
    return torch.where(ok[:, None, None], Q, torch.nan).flip(-1)


def rayleigh_quotients(Q: Tensor, image: Tensor) -> Tensor:
    """``diag(Q^T A Q)``.  image: ``Q^T A``  # (B, d)"""
    return (Q.mT * image).sum(-1)


def off_diagonal(A: Tensor, Q: Tensor, image: Tensor | None = None) -> Tensor:
    """``|B - diag B|_F / |B|_F`` of ``B = Q^T A Q``: the relative error of ``A ~ Q diag(B) Q^T``.  # (B,)

    image: ``Q^T A``, where it is known
    """
    B = (Q.mT @ A if image is None else image) @ Q
    diagonal = torch.diag_embed(B.diagonal(dim1=-2, dim2=-1))
    size = torch.linalg.matrix_norm(B)
    ratio: Tensor = torch.linalg.matrix_norm(B - diagonal) / torch.where(size > 0, size, 1.0)
    return ratio


def staleness(A: Tensor, quotients: Tensor) -> Tensor:
    """`off_diagonal` by ``|B|_F = |A|_F``, without the products; what is less than the root of a roundoff is noise.

    quotients: ``diag B``  # (B, d, d), (B, d) -> (B,)
    """
    size, kept = torch.linalg.matrix_norm(A), torch.linalg.vector_norm(quotients, dim=-1)
    share = kept / torch.where(size > 0, size, 1.0)
    return torch.where(size > 0, (1 - share.square()).clamp(min=0), 0.0).sqrt()


def orthonormal(X: Tensor) -> Tensor:
    """The ``Q`` of a QR decomposition. LAPACK wants columns: a transposed view is not copied.  # (B, d, d)"""
    d = X.shape[-1]
    aliased = X.device.type == "cpu" and d % ALIASED == 0
    if aliased:
        X = torch.nn.functional.pad(X.mT, (0, PADDING, 0, PADDING)).mT
        X[..., d:, d:].diagonal(dim1=-2, dim2=-1).fill_(1)
    Q: Tensor = torch.linalg.householder_product(*torch.geqrf(X))
    return Q[..., :d, :d] if aliased else Q


def sort_axis(X: Tensor, order: Tensor, axis: int) -> Tensor:
    """A tensor with an axis in the order of each member.  # (B, ...), (B, d)"""
    if len(X) == 1:
        return X.index_select(axis, order[0])
    index = order.view(len(order), *[1] * (axis - 1), -1, *[1] * (X.ndim - axis - 1))
    return torch.take_along_dim(X, index, axis)


def power_step(A: Tensor, Q: Tensor, image: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``Q <- qr(A Q)`` after a sort of columns by ``diag(Q^T A Q)``, and that order, for statistics that are held in ``Q``.

    Without the sort, and but for signs, it is a step of the QR algorithm, ``Q^T A Q = Q_1 R_1``, ``Q <- Q Q_1``.

    image: ``Q^T A``, where it is known: the rows of a matrix are sorted twenty times faster than its columns

    Reference: Vyas et al., ICLR 2025, arXiv:2409.11321, algorithm 4.  # (B, d, d), (B, d)
    """
    image = Q.mT @ A if image is None else image
    order = rayleigh_quotients(Q, image).argsort(dim=-1, descending=True, stable=True)
    return orthonormal(sort_axis(image, order, 1).mT), order
