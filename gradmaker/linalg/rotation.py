"""Coordinates of gradients in a basis ``Q = Q_1 (x) Q_2 (x) ... (x) Q_m``, from the gradient or from its rows, and back.

A basis has a factor for each axis, (B, d, d) or tiled; None stands for the unit basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.factors import transpose, turn
from gradmaker.linalg.mode_products import apply_factors

__all__ = ["coordinates", "from_coordinates", "rotate_rows", "turned"]


def coordinates(bases: Sequence[Tensor | None], g: Tensor | FactoredGradient) -> Tensor:
    """``Q^T g``; the rows of a factored gradient are rotated, and formed in the basis.  # (B, d_1, ..., d_m)"""
    if isinstance(g, FactoredGradient):
        return rotate_rows(bases, g).form()
    return apply_factors([None if Q is None else transpose(Q) for Q in bases], g)


def rotate_rows(bases: Sequence[Tensor | None], rows: FactoredGradient) -> FactoredGradient:
    """``Q_1^T G Q_2`` by rows."""
    left, right = bases
    return replace(
        rows,
        g=rows.g if left is None else turn(rows.g, left),
        a=rows.a if right is None else turn(rows.a, right),
    )


def from_coordinates(bases: Sequence[Tensor | None], x: Tensor) -> Tensor:
    """``Q x``.  # (B, d_1, ..., d_m)"""
    return apply_factors(bases, x)


def turned(x: Tensor, before: Sequence[Tensor | None], after: Sequence[Tensor | None]) -> Tensor:
    """Coordinates in one basis from those in another: ``Q'^T Q x``.  # (B, d_1, ..., d_m)

    Two products for each axis whose basis is another tensor: never more than by the overlaps ``Q_k'^T Q_k``.
    """
    changed = [P is not Q for P, Q in zip(before, after, strict=True)]
    x = from_coordinates([P if own else None for P, own in zip(before, changed, strict=True)], x)
    return coordinates([Q if own else None for Q, own in zip(after, changed, strict=True)], x)
