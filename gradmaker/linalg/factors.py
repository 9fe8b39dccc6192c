"""Kronecker factors in three forms: dense (B, d, d), diagonal (B, d), or tiled, with square blocks along the diagonal.

A tiled factor is (B, d, b) with ``b < d``: row ``i`` holds the row of its block, which begins at ``i - i % b``. The last block
may be smaller; entries to its right are zero. A side of length ``d`` takes ``d b`` entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradmaker.linalg.moments import add_moment_

__all__ = [
    "add",
    "average_trace",
    "blocks",
    "conjugate",
    "dense",
    "diagonal_of",
    "for_members",
    "identity",
    "is_tiled",
    "join",
    "join_vector",
    "map_blocks",
    "rayleigh",
    "split",
    "split_vector",
    "tile_width",
    "transpose",
    "turn",
    "widest",
]


def is_tiled(F: Tensor) -> bool:
    """Whether a factor is held in tiled form."""
    return F.ndim == 3 and F.shape[1] > F.shape[2]


def tile_width(size: int, limit: int | None) -> int:
    """Block width that cuts a side into the fewest, nearly equal blocks within the limit; the side itself if it is within."""
    return size if limit is None or size <= limit else -(-size // -(-size // limit))


def blocks(F: Tensor) -> list[tuple[slice, Tensor]]:
    """The rows and a view of every block; for a dense or diagonal factor, one block.  # (B, b, b) or (B, d)"""
    if not is_tiled(F):
        return [(slice(0, F.shape[1]), F)]
    d, b = F.shape[1:]
    rows = [slice(start, min(start + b, d)) for start in range(0, d, b)]
    return [(r, F[:, r, : r.stop - r.start]) for r in rows]


# ------------------------------------------------------------------ tiled factors as stacks of square matrices, and back
def split(F: Tensor) -> list[Tensor]:
    """A tiled factor as a stack of its full blocks, member by member, and the smaller one if any.  # (B m, b, b), (B, r, r)"""
    B, d, b = F.shape
    m, r = divmod(d, b)
    rest = [F[:, m * b :, :r]] if r else []
    return [F[:, : m * b].reshape(B * m, b, b), *rest]


def join(pieces: Sequence[Tensor], d: int) -> Tensor:
    """The inverse of `split`.  # (B, d, b)"""
    full, *rest = pieces
    b = full.shape[-1]
    B = len(full) // (d // b)
    out = full.reshape(B, -1, b)
    return torch.cat([out, *(torch.nn.functional.pad(x, (0, b - x.shape[-1])) for x in rest)], 1)


def split_vector(v: Tensor, F: Tensor) -> list[Tensor]:
    """A vector of the axis, cut as the blocks of ``F``.  # (B, d) -> (B m, b), (B, r)"""
    B, d, b = F.shape
    m, r = divmod(d, b)
    return [v[:, : m * b].reshape(B * m, b), *([v[:, m * b :]] if r else [])]


def join_vector(pieces: Sequence[Tensor], B: int) -> Tensor:
    """The inverse of `split_vector`.  # (B, d)"""
    return torch.cat([x.reshape(B, -1) for x in pieces], 1)


def map_blocks(function: Callable[[Tensor], Tensor], F: Tensor) -> Tensor:
    """Apply a function of square matrices to every block.  # (B, d, d) or tiled"""
    return join([function(x) for x in split(F)], F.shape[1]) if is_tiled(F) else function(F)


def widest(function: Callable[..., Tensor], F: Tensor, *vectors: Tensor | None) -> Tensor:
    """The maximum over the blocks of each member of a function of square matrices and vectors of the axis.  # (B,)"""
    if not is_tiled(F):
        return function(F, *vectors)
    cut = [[None] * len(split(F)) if v is None else (split(v) if v.ndim == 3 else split_vector(v, F)) for v in vectors]
    found = [function(*each).reshape(len(F), -1).amax(1) for each in zip(split(F), *cut, strict=True)]
    return torch.stack(found).amax(0)


# ------------------------------------------------------------------ operations on every form
def dense(F: Tensor) -> Tensor:
    """The factor as a dense matrix.  # (B, d, d)"""
    if F.ndim == 2:
        return torch.diag_embed(F)
    if not is_tiled(F):
        return F
    out = F.new_zeros(*F.shape[:2], F.shape[1])
    for rows, block in blocks(F):
        out[:, rows, rows] = block
    return out


def identity(F: Tensor) -> Tensor:
    """The unit matrix in the form of a factor.  # (d,), (d, d) or (d, b)"""
    if F.ndim == 2:
        return F.new_ones(F.shape[1])
    d, b = F.shape[1:]
    out = F.new_zeros(d, b)
    rows = torch.arange(d, device=F.device)
    out[rows, rows % b] = 1
    return out


def transpose(F: Tensor) -> Tensor:
    """``F^T``."""
    return F if F.ndim == 2 else map_blocks(lambda x: x.mT, F)


def diagonal_of(F: Tensor) -> Tensor:
    """The diagonal.  # (B, d)"""
    if F.ndim == 2:
        return F
    if not is_tiled(F):
        return F.diagonal(dim1=-2, dim2=-1)
    rows = torch.arange(F.shape[1], device=F.device)
    return F[:, rows, rows % F.shape[2]]


def add(F: Tensor, G: Tensor) -> Tensor:
    """``F + G`` for factors of one form, or where ``G`` is a diagonal."""
    if F.ndim == G.ndim:
        return F + G
    rows, out = torch.arange(F.shape[1], device=F.device), F.clone()
    out[:, rows, rows % F.shape[2]] += G
    return out


def average_trace(F: Tensor) -> Tensor:
    """``tr F / dim F``.  # (B,)"""
    return diagonal_of(F).mean(-1)


def conjugate(Q: Tensor, v: Tensor) -> Tensor:
    """``Q diag(v) Q^T``.  # Q dense or tiled, (B, d) -> as Q"""
    if not is_tiled(Q):
        out = torch.empty(Q.shape, dtype=Q.dtype, device=Q.device)
        add_moment_(out, (Q * v.unsqueeze(-2)).mT, Q.mT, beta=0, alpha=1)
        return out
    return join([conjugate(q, w) for q, w in zip(split(Q), split_vector(v, Q), strict=True)], Q.shape[1])


def rayleigh(F: Tensor, Q: Tensor) -> Tensor:
    """Rayleigh quotients ``diag(Q^T F Q)``; F and Q in the same form.  # (B, d)"""
    if not is_tiled(F):
        return (Q * (F @ Q)).sum(-2)
    return torch.cat([(q * (f @ q)).sum(-2) for (_, f), (_, q) in zip(blocks(F), blocks(Q), strict=True)], 1)


def turn(x: Tensor, Q: Tensor) -> Tensor:
    """``x Q`` along the last axis; coordinates that ``x`` lacks at its end are zero.  # (G, ..., i), (G, d, d) or tiled"""
    flat, i = x.flatten(1, -2), x.shape[-1]
    found = [flat[..., rows] @ block[:, : max(min(rows.stop, i) - rows.start, 0)] for rows, block in blocks(Q)]
    return torch.cat(found, -1).reshape(*x.shape[:-1], Q.shape[1])


def for_members(x: Tensor, S: Tensor) -> Tensor:
    """One number for each member of a stack, as a view that multiplies their tensors.  # (B,), (B, ...) -> (B, 1, ...)"""
    return x.view(-1, *[1] * (S.ndim - 1))
