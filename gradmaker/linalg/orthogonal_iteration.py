"""Tracking of an eigenbasis by a step of orthogonal iteration, or of the QR algorithm, in place of a decomposition.

Batched functions of ``A`` symmetric and ``Q`` orthogonal, both (B, d, d).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradmaker.linalg.eigen import decompose_again, symmetrise

__all__ = ["off_diagonal", "power_step", "qr_steps", "sorted_eigenvectors"]


def sorted_eigenvectors(A: Tensor) -> Tensor:
    """Eigenvectors of ``A``, the largest eigenvalue first; NaN where the decomposition failed.  # (B, d, d)"""
    _, Q, ok, _ = decompose_again(symmetrise(A))
    return torch.where(ok[:, None, None], Q, torch.nan).flip(-1)


def off_diagonal(A: Tensor, Q: Tensor) -> Tensor:
    """``|B - diag B|_F / |B|_F`` of ``B = Q^T A Q``: the relative error of ``A ~ Q diag(B) Q^T``.  # (B,)"""
    B = Q.mT @ A @ Q
    diagonal = torch.diag_embed(B.diagonal(dim1=-2, dim2=-1))
    size = torch.linalg.matrix_norm(B)
    ratio: Tensor = torch.linalg.matrix_norm(B - diagonal) / torch.where(size > 0, size, 1.0)
    return ratio


def power_step(A: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """``Q <- qr(A Q)`` after a sort of columns by ``diag(Q^T A Q)``, and that order, for statistics that are held in ``Q``.

    Reference: Vyas et al., ICLR 2025, arXiv:2409.11321, algorithm 4.  # (B, d, d), (B, d)
    """
    order = (Q * (A @ Q)).sum(-2).argsort(dim=-1, descending=True, stable=True)
    Q = torch.take_along_dim(Q, order.unsqueeze(-2), -1)
    return torch.linalg.qr(A @ Q)[0], order


def qr_steps(A: Tensor, Q: Tensor, tolerance: float, steps: int = 1) -> Tensor:
    """``B = Q^T A Q = Q_1 R_1``, ``Q <- Q Q_1``, ``B <- R_1 Q_1``, while `off_diagonal` of ``B`` exceeds the tolerance.

    Each member of the stack stops on its own.

    Reference: Eschenhagen et al., 2025, arXiv:2506.03595, section 4 (the criterion).  # (B, d, d)
    """
    for _ in range(steps):
        stale = (off_diagonal(A, Q) > tolerance)[:, None, None]
        Q = torch.where(stale, Q @ torch.linalg.qr(Q.mT @ A @ Q)[0], Q)
    return Q
