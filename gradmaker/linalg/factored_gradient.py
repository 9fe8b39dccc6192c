"""Gradients of matrices held by their rows, ``G = g^T a``: cheaper than ``G`` where a batch has fewer rows than sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradmaker.linalg.mode_products import apply_factors
from gradmaker.linalg.probes import probes

__all__ = ["FactoredGradient", "ProbedRows", "joined_rows", "transform_rows"]

CANCELLED = 1e-3
"""Share of ``|g|^2 |a|^2`` below which squares of ``G`` are formed: above, those by rows have lost three digits at most. Rows
without a common direction leave one over their number."""


@dataclass(frozen=True)
class FactoredGradient:
    """The gradient ``G = sum_r g_r a_r^T`` of a stack of matrices, which is not formed.

    Factors on the left of ``G`` multiply ``g``, those on its right multiply ``a``; `form` is the one product with all rows.
    """

    g: Tensor  # gradients of the outputs of a layer, carrying every scale of the loss  # (B, R, o)
    a: Tensor  # its inputs; a one in the last column where the bias is the last column of G  # (B, R, i)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of ``G``.  # (B, o, i)"""
        return self.g.shape[0], self.g.shape[2], self.a.shape[2]

    @property
    def count(self) -> int:
        """The number of rows ``R``."""
        return self.g.shape[1]

    @property
    def pays(self) -> bool:
        """Whether products of the rows with a matrix on each side take less than of ``G``: ``R (o^2 + i^2) < o i (o + i)``.

        ``form`` takes what the weight gradient takes, which need not be computed then.
        """
        _, o, i = self.shape
        return self.count * (o * o + i * i) < o * i * (o + i)

    def form(self) -> Tensor:
        """``G``.  # (B, o, i)"""
        return self.g.mT @ self.a

    def moment(self, axis: int) -> Tensor:
        """``G G^T`` (axis 0) or ``G^T G`` (axis 1), through the Gram matrix of the other rows.  # (B, o, o) or (B, i, i)"""
        X, Y = self.moment_halves(axis)
        return X @ Y

    def moment_halves(self, axis: int) -> tuple[Tensor, Tensor]:
        """Two matrices whose product is `moment`, to be multiplied into a statistic.  # (B, d, R), (B, R, d)"""
        mine, other = (self.g, self.a) if axis == 0 else (self.a, self.g)
        return mine.mT, (other @ other.mT) @ mine

    def columns(self, axis: int) -> Tensor:
        """``X`` with ``X X^T = G G^T`` (axis 0) or ``G^T G`` (axis 1), in at most ``R`` columns: a triangle of the other rows.

        # (B, o, c) or (B, i, c)
        """
        mine, other = (self.g, self.a) if axis == 0 else (self.a, self.g)
        triangle: Tensor = torch.linalg.qr(other.mT, mode="r")[1]
        return mine.mT @ triangle.mT

    def squared_norm(self) -> Tensor:
        """``|G|^2 = sum_rs (a_r . a_s) (g_r . g_s)``.  # (B,)"""
        return ((self.g @ self.g.mT) * (self.a @ self.a.mT)).sum((-2, -1))

    def length(self) -> Tensor:
        """``|G|``: by rows, or formed where these nearly cancel.  # (B,)"""
        if self.cancels():
            formed: Tensor = torch.linalg.vector_norm(self.form().flatten(1), dim=1)
            return formed
        return self.squared_norm().clamp(min=0).sqrt()

    def cancels(self) -> bool:
        """Whether squares of ``G`` by rows may lose digits to the rounding of ``|g|^2 |a|^2``: rows of a member nearly cancel.

        ``|G|^2`` is estimated by products with a few vectors of signs. True where a read of the host would wait.
        """
        if self.g.device.type != "cpu":
            return True
        V = probes(self.a.new_empty(1, 1, 1).expand(1, self.a.shape[2], -1).mT)  # (k, i)
        image = self.g.mT @ (self.a @ V.T)  # (B, o, k)
        size = image.square().sum((1, 2)) * (self.a.shape[2] / V.square().sum())
        whole = self.g.square().sum((1, 2)) * self.a.square().sum((1, 2))
        return not bool((size > CANCELLED * whole).all())

    def bound(self) -> Tensor:
        """``|g| |a|``, a bound on ``|G|``: finite where the rows are, and then ``G`` is too.  # ()"""
        g, a = (torch.dot(x, x).sqrt() for x in (self.g.reshape(-1), self.a.reshape(-1)))
        return g * a

    def scaled(self, factors: Tensor) -> FactoredGradient:
        """``G`` of each member multiplied by a factor.  # (B,)"""
        return replace(self, g=self.g * factors.view(-1, 1, 1))

    def to(self, dtype: torch.dtype) -> FactoredGradient:
        """The same rows in another dtype."""
        return replace(self, g=self.g.to(dtype), a=self.a.to(dtype))


def joined_rows(parts: Sequence[FactoredGradient]) -> FactoredGradient:
    """The sum of some gradients, with the rows of all."""
    if len(parts) == 1:
        return parts[0]
    return FactoredGradient(torch.cat([p.g for p in parts], 1), torch.cat([p.a for p in parts], 1))


@dataclass(frozen=True)
class ProbedRows(FactoredGradient):
    """A gradient by its rows, with independent noise of its shape."""

    noise: Tensor  # (B, o, i)


def transform_rows(factors: Sequence[Tensor | None], rows: FactoredGradient) -> FactoredGradient:
    """``F_1 G F_2^T`` by rows, `apply_factors` of the formed gradient; None, or no second factor, stands for the identity.

    factors: (B, d, d), (B, d) or tiled
    """
    sides = [rows.g, rows.a]
    for k, F in enumerate(factors):
        sides[k] = apply_factors([None, F], sides[k])
    return FactoredGradient(*sides)
