"""A layer's share of the rows ``J`` of a batch, held as inputs and output gradients or multiplied out, with its products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from gradmaker.capture.one_hot import OneHot
from gradmaker.curvature.evidence import Outer
from gradmaker.linalg.factored_gradient import FactoredGradient

__all__ = ["FormedPart", "OuterPart", "Part"]


class Part(ABC):
    """A layer's share of some rows, in each of ``B`` blocks: ``H`` groups of its evidence side by side."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the layer's share of a vector.  # (B, H, rows, columns)"""

    @property
    @abstractmethod
    def count(self) -> int:
        """The number of rows ``N``."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """That of the rows."""

    @property
    def size(self) -> int:
        """Entries of a row, in one member of the stack."""
        return prod(self.shape[1:])

    @abstractmethod
    def rows(self) -> Tensor:
        """``J`` as a matrix.  # (B, N, P)"""

    def gram(self, other: Part) -> Tensor:
        """``J J'^T`` of two chunks of one layer.  # (B, N, N')"""
        J = self.rows()
        return J @ (J if other is self else other.rows()).mT

    @abstractmethod
    def project(self, v: Tensor) -> Tensor:
        """``J v``.  # (B, H, rows, columns) -> (B, N)"""

    @abstractmethod
    def combine(self, z: Tensor) -> Tensor:
        """``J^T z``.  # (B, N) -> (B, H, rows, columns)"""

    def weighted(self, z: Tensor) -> FactoredGradient | Tensor | None:
        """``J^T z`` by the rows of the layer, or formed where they are; None for groups and one-hot inputs.  # (1, N)"""
        return None

    def project_rows(self, rows: FactoredGradient) -> Tensor | None:
        """``J G`` by rows, where `weighted` has them and it is less work than with ``G``.  # (1, N)"""
        return None


@dataclass(frozen=True)
class FormedPart(Part):
    """Rows that are multiplied out."""

    formed: Tensor  # (B, N, H, rows, columns)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.formed.shape[0], *self.formed.shape[2:]

    @property
    def count(self) -> int:
        return self.formed.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.formed.dtype

    def rows(self) -> Tensor:
        return self.formed.flatten(2)

    def project(self, v: Tensor) -> Tensor:
        return (self.rows() @ v.flatten(1).unsqueeze(-1)).squeeze(-1)

    def combine(self, z: Tensor) -> Tensor:
        return (z.unsqueeze(1) @ self.rows()).view(self.shape)

    def weighted(self, z: Tensor) -> Tensor | None:
        return self.combine(z)[0] if self.shape[:2] == (1, 1) else None


@dataclass(frozen=True)
class OuterPart(Part):
    """Rows that are held as inputs and output gradients."""

    outer: Outer  # of G = B H groups
    stack: int  # B

    @property
    def shape(self) -> tuple[int, ...]:
        G, o = self.outer.gradients.shape[1], self.outer.gradients.shape[-1]
        i = self.outer.width + self.outer.bias
        return (self.stack, G // self.stack, *((i, o) if self.outer.transposed else (o, i)))

    @property
    def count(self) -> int:
        return self.outer.count

    @property
    def dtype(self) -> torch.dtype:
        return self.outer.gradients.dtype

    def gram(self, other: Part) -> Tensor:
        """By the way that takes less memory; a layer without calls is laid out flat."""
        N, M = self.count, other.count
        if not isinstance(other, OuterPart) or not self._same_layout(other):
            return super().gram(other)
        if N * self.outer.gradients.shape[3] * M * other.outer.gradients.shape[3] > prod(self.shape[2:]) * (N + M):
            return super().gram(other)
        return self.outer.gram(other.outer).view(*self.shape[:2], N, M).sum(1)

    def _same_layout(self, other: OuterPart) -> bool:
        """Whether both have one layout."""
        mine, its = self.outer, other.outer
        return (self.shape, mine.bias, mine.transposed) == (other.shape, its.bias, its.transposed)

    def rows(self) -> Tensor:
        return self.outer.rows().reshape(self.count, *self.shape[:2], -1).transpose(0, 1).flatten(2)

    def project(self, v: Tensor) -> Tensor:
        return self.outer.project(v.flatten(0, 1)).view(*self.shape[:2], -1).sum(1)

    def combine(self, z: Tensor) -> Tensor:
        z = z.unsqueeze(1).expand(-1, self.shape[1], -1).flatten(0, 1)
        return self.outer.combine(z).reshape(self.shape)

    def weighted(self, z: Tensor) -> FactoredGradient | None:
        own = self.outer
        if self.shape[:2] != (1, 1) or isinstance(own.inputs, OneHot):
            return None
        g, a = own.weighted(z).flatten(1, 2), own.inputs.flatten(1, 2)
        if own.bias:
            a = torch.cat([a, torch.ones_like(g[..., :1])], -1)
        return FactoredGradient(a, g) if own.transposed else FactoredGradient(g, a)

    def project_rows(self, rows: FactoredGradient) -> Tensor | None:
        own, (k, _, n, r, o) = self.outer, self.outer.gradients.shape
        less = rows.count * (own.width + k * o) < own.width * o
        plain = self.shape[:2] == (1, 1) and not own.transposed and not own.bias
        if not (plain and less and isinstance(own.inputs, Tensor)):
            return None
        products = own.gradients.flatten(0, 3) @ rows.g[0].mT  # (k n r, R)
        inputs = own.inputs[0].flatten(0, 1) @ rows.a[0].mT  # (n r, R)
        return (products.view(k, n * r, -1) * inputs).view(k * n, -1).sum(1).unsqueeze(0)
