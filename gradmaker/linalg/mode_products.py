"""Mode products of stacks of tensors with one factor for each axis, unfoldings, Kronecker products.

A factor is (B, d, d), or (B, d) when only its diagonal is kept, or tiled, see `gradmaker.linalg.factors`. ``vec`` is
row-major everywhere.

Reference: Kolda, Bader, SIAM Review 2009, section 2.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from gradmaker.linalg.factors import blocks, dense, is_tiled
from gradmaker.linalg.moments import add_moment_
from gradmaker.linalg.writes import Writer, at_once

__all__ = ["add_product_", "apply_factors", "kronecker_product", "mode_matrix"]

NARROW = 32
"""Number of columns below which a batch of products is slower than one product with the axis moved to the front: 2 to 4 times
for the axes of 3 of a convolution (CPU)."""


def apply_factors(factors: Sequence[Tensor | None], g: Tensor) -> Tensor:
    """Mode products ``g x_1 F_1 x_2 F_2 ...``, the same as ``(F_1 (x) F_2 (x) ...) vec(g)``; None stands for the identity.

    Axis by axis: factors are square, so that every order takes ``D sum_k d_k`` multiplications.

    factors: (B, d_m, d_m), (B, d_m) or tiled; g: (B, d_1, ..., d_m) -> the same shape
    """
    for axis, F in enumerate(factors, start=1):
        if F is not None:
            g = _apply_factor(F, g, axis)
    return g


def mode_matrix(g: Tensor, axis: int) -> Tensor:
    """The unfolding ``mat_k(g)``: an axis as rows, all others as columns.  # (B, d_1, ..., d_m) -> (B, d_k, D / d_k)"""
    return g.movedim(axis + 1, 1).reshape(len(g), g.shape[axis + 1], -1)


def add_product_(H: Tensor, X: Tensor, Y: Tensor, beta: float, alpha: float, write: Writer = at_once) -> None:
    """``H <- beta H + alpha X Y`` in place, where that is symmetric, or the diagonal of it.

    # (B, d, d) or (B, d); (B, d, n), (B, n, d)
    """
    if H.ndim == 2:
        write(H.mul_, beta)
        write(H.add_, (X * Y.mT).sum(-1), alpha=alpha)
    else:
        add_moment_(H, X.mT, Y, beta, alpha, write)


def _apply_factor(F: Tensor, g: Tensor, axis: int) -> Tensor:
    if is_tiled(F):
        return torch.cat([_apply_factor(block, g[(slice(None),) * axis + (rows,)], axis) for rows, block in blocks(F)], axis)
    B, shape = g.shape[0], g.shape
    if F.ndim == 2:
        return g * F.view(B, *[1] * (axis - 1), -1, *[1] * (g.ndim - axis - 1))
    before, d, after = prod(shape[1:axis]), shape[axis], prod(shape[axis + 1 :])
    if after == 1 and d >= NARROW:  # from the right: from the left these would be matrix-vector products
        return (g.reshape(B, -1, d) @ F.mT).reshape(shape)
    x = g.reshape(B, before, d, after)
    if before == 1 or after >= NARROW:
        return (F.unsqueeze(1) @ x).reshape(shape)
    return (F @ x.transpose(1, 2).reshape(B, d, -1)).reshape(B, d, before, after).transpose(1, 2).reshape(shape)


def kronecker_product(factors: Sequence[Tensor]) -> Tensor:
    """The dense Kronecker product ``F_1 (x) F_2 (x) ...``.  # (B, P, P)"""
    out, *rest = [dense(F) for F in factors]
    for F in rest:
        out = torch.einsum("bij,bkl->bikjl", out, F).reshape(F.shape[0], out.shape[1] * F.shape[1], -1)
    return out
