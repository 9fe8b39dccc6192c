"""Blocks and diagonal of a matrix that is given by its products with vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["form_blocks", "form_diagonal"]

CHUNK = 64
"""Number of columns whose products are computed at once: a bound on memory."""

LIMIT = 20_000
"""Largest number of products for one matrix."""

Matvec = Callable[[Tensor], Tensor]


def form_blocks(matvec: Matvec, like: Tensor) -> Tensor:
    """The blocks on the diagonal of ``C``, bitwise symmetric.  # (B P -> B P), like (B, P, P) -> (B, P, P)"""
    B, P = like.shape[:2]
    out = torch.empty(B * P, P, dtype=like.dtype, device=like.device)
    for rows, images in _images(matvec, B * P, like):
        own = images.reshape(len(rows), B, P)
        out[rows] = own[torch.arange(len(rows), device=like.device), rows // P]
    C = out.reshape(B, P, P)
    return (C + C.mT) / 2


def form_diagonal(matvec: Matvec, like: Tensor) -> Tensor:
    """The diagonal of ``C``.  # (B, *shape)"""
    out = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
    for rows, images in _images(matvec, like.numel(), like):
        out[rows] = images.gather(1, rows.unsqueeze(1)).squeeze(1)
    return out.reshape(like.shape)


def _images(matvec: Matvec, size: int, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of column indices, and these columns as rows. ValueError for more than `LIMIT`.  # (k,), (k, size)"""
    if size > LIMIT:
        raise ValueError(
            f"a block of {size} parameters takes {size} products with the curvature in every step, and at most {LIMIT} are "
            "allowed: leave the layer out with ignore=, or use a matrix-free method (hessian_free, ksd)"
        )
    for start in range(0, size, CHUNK):
        rows = torch.arange(start, min(start + CHUNK, size), device=like.device)
        unit = torch.zeros(len(rows), size, dtype=like.dtype, device=like.device)
        unit.scatter_(1, rows.unsqueeze(1), 1.0)
        yield rows, matvec(unit)
