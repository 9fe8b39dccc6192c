"""Evidence of a table with two uses: rows are looked up in it, and it is the weight of a linear head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Evidence, Outer

__all__ = ["Tied"]


@dataclass(frozen=True)
class Tied(Evidence):
    """Both uses of a table (V, d): ``J_kn = sum_r e_nr g_knr^T + sum_s h_kns a_ns^T``, with the one-hot tokens ``e``.

    It takes the place of `Outer` where a representation takes it. A use without a call in the pass is left out.
    """

    parts: tuple[Outer, ...]  # of the lookups, laid out as (V, d) too, and of the heads: (k, 1, n, ...), at least one

    @property
    def lookup(self) -> Outer | None:
        """The first sum."""
        return next((part for part in self.parts if part.transposed), None)

    @property
    def head(self) -> Outer | None:
        """The second sum."""
        return next((part for part in self.parts if not part.transposed), None)

    @property
    def count(self) -> int:
        """Number of rows ``N = k n``."""
        return self.parts[0].count

    def of_parts(self, change: Callable[[Outer], Outer]) -> Tied:
        """The same with another evidence for each use."""
        return Tied(tuple(map(change, self.parts)))

    def scaled(self, factors: Tensor) -> Tied:
        """The evidence with the gradient of each example multiplied by a factor.  factors: (n,)"""
        return self.of_parts(lambda part: part.scaled(factors))

    def rows(self) -> Tensor:
        return _sum([part.rows() for part in self.parts])

    def project(self, v: Tensor) -> Tensor:
        """``<J_N, v>``.  v: (1, V, d) -> (1, N)"""
        return _sum([part.project(v) for part in self.parts])

    def combine(self, z: Tensor) -> Tensor:
        """``sum_N z_N J_N``.  z: (1, N) -> (1, V, d)"""
        return _sum([part.combine(z) for part in self.parts])


def _sum(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
