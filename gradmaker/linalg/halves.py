"""Products of which a half is known: of upper triangular matrices, and of a matrix with its own transpose.

torch has neither of BLAS's ``trmm`` and ``syrk``. Four blocks of rows leave out three eighths of the operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from gradmaker.linalg.mode_products import apply_factors

__all__ = ["apply_triangles", "moment", "subtract_product_"]

SMALLEST = 256
"""Sides below which, and devices other than a CPU where, one product is faster."""
BLOCKS = 4


def _halved(Q: Tensor, d: int) -> bool:
    return Q.ndim == 3 and d >= SMALLEST and Q.device.type == "cpu"


def _bands(d: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each block of rows."""
    return pairwise(d * k // BLOCKS for k in range(BLOCKS + 1))


def moment(x: Tensor) -> Tensor:
    """``x x^T``.  # (B, d, c) -> (B, d, d)"""
    d = x.shape[1]
    if not _halved(x, d):
        return x @ x.mT
    out = x.new_empty(len(x), d, d)
    for a, b in _bands(d):
        out[:, a:b, a:] = x[:, a:b] @ x[:, a:].mT
        out[:, b:, a:b] = out[:, a:b, b:].mT
    return out


def apply_triangles(factors: Sequence[Tensor | None], g: Tensor, transposed: bool = False) -> Tensor:
    """Mode products with upper triangular ``Q_k``, or with ``Q_k^T``; a factor may be a diagonal, or None for the identity.

    # g: (B, d_1, ..., d_m)
    """
    for axis, Q in enumerate(factors, start=1):
        if Q is None:
            continue
        if _halved(Q, Q.shape[1]) and axis in (1, g.ndim - 1):
            g = (_from_left if axis == 1 else _from_right)(Q, g, transposed)
        else:
            g = apply_factors([*[None] * (axis - 1), Q.mT if transposed and Q.ndim == 3 else Q], g)
    return g


def _from_left(Q: Tensor, g: Tensor, transposed: bool) -> Tensor:
    """``Q g`` or ``Q^T g`` along the first axis."""
    x = g.flatten(2) if g.ndim > 2 else g.unsqueeze(-1)
    bands = _bands(Q.shape[1])
    found = [Q[:, :b, a:b].mT @ x[:, :b] if transposed else Q[:, a:b, a:] @ x[:, a:] for a, b in bands]
    return torch.cat(found, 1).reshape(g.shape)


def _from_right(Q: Tensor, g: Tensor, transposed: bool) -> Tensor:
    """``g Q^T`` or ``g Q`` along the last axis."""
    x = g.reshape(len(g), -1, g.shape[-1])
    bands = _bands(Q.shape[1])
    found = [x[..., :b] @ Q[:, :b, a:b] if transposed else x[..., a:] @ Q[:, a:b, a:].mT for a, b in bands]
    return torch.cat(found, -1).reshape(g.shape)


def subtract_product_(out: Tensor, E: Tensor, Q: Tensor) -> Tensor:
    """``out -= E Q`` for upper triangular matrices.  # (B, d, d)"""
    if not _halved(Q, Q.shape[1]):
        return out.baddbmm_(E, Q, alpha=-1)
    for a, b in _bands(Q.shape[1]):
        out[:, a:b, a:].baddbmm_(E[:, a:b, a:], Q[:, a:, a:], alpha=-1)
    return out
