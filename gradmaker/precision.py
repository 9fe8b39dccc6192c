"""The dtypes of a block: of its statistic, of the roots of it, and of their products with gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradmaker.linalg.state import State
from gradmaker.triple import Triple

__all__ = ["Precision"]

REPORTS = ("diagnosis",)
"""Entries of a cache that report on the refresh and are not applied: they keep the statistic's dtype."""


@dataclass(frozen=True)
class Precision:
    """dtypes of the refresh and of the application; None: that of the statistic, which itself is never changed.

    A float32 statistic knows its eigenvalues to ``u lambda_max``, ``u = 6e-8``; a root that is taken in float64 loses no more.
    What is applied may be coarser, at an error of up to ``u kappa^(1/p)`` for the root ``p`` of a statistic of condition
    ``kappa``: at the customary damping of 1e-6 that is 31 roundoffs for ``p = 4``, an eighth in bfloat16, and 1000 for the
    ``p = 2`` of vectors.

    Reference: Anil et al. 2020, arXiv:2002.09018, section 5 (roots in double precision); Shi et al. 2023, arXiv:2309.06497
    (Distributed Shampoo, its dtypes of factors and of roots).
    """

    roots: torch.dtype | None = None
    application: torch.dtype | None = None

    def prepare(self, triple: Triple, state: State, previous: State | None, held: torch.dtype) -> State:
        """The cache of a refresh.  held: dtype of the statistic"""
        if self == Precision():
            return triple.solver.prepare(triple.representation, state, previous)
        raised = {name: _cast(x, self.roots or held) for name, x in state.items()}
        cache = triple.solver.prepare(triple.representation, raised, previous)
        return {name: _cast(x, held if name in REPORTS else self.application or held) for name, x in cache.items()}

    def solve(self, triple: Triple, cache: State, g: Tensor) -> Tensor:
        """``P g``.  # (B, *shape)"""
        if self.application is None:
            return triple.solver.solve(triple.representation, cache, g)
        return triple.solver.solve(triple.representation, cache, g.to(self.application)).to(g.dtype)

    def coarsest(self, held: torch.dtype) -> torch.dtype:
        """The dtype that limits the accuracy of ``P g``.  held: dtype of the statistic"""
        used = (held, self.roots or held, self.application or held)
        return max(used, key=lambda dtype: torch.finfo(dtype).eps)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x
