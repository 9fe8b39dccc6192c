"""The K-FAC inverse of all layers, as the preconditioner of conjugate gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from gradmaker.curvature.products import Factors, Layers
from gradmaker.linalg.state import State
from gradmaker.representations.base import Fold, Frame
from gradmaker.representations.kronecker import Kron
from gradmaker.solvers.cholesky import Cholesky

__all__ = ["LayerInverse"]

HELD = Kron()

Inverse: TypeAlias = tuple[State, tuple[int, ...]]


class LayerInverse:
    """``v -> M^-1 v`` with ``M = (B + r_B I) (x) (A + r_A I)`` for each layer and ``r_A r_B = lambda``; see `Cholesky`.

    A layer without factors gets ``v / lambda``.

    Reference: Martens & Grosse, ICML 2015, arXiv:1503.05671, section 6.3, for the damping.
    """

    def __init__(self, batches: Sequence[tuple[float, Layers]], damping: float) -> None:
        """batches: the factors of each micro-batch, with its weight"""
        self.damping, self.solver = damping, Cholesky(damping=damping)
        self.sizes = batches[0][1].sizes
        self.inverses = [self._invert([(w, held.factors[k]) for w, held in batches]) for k in range(len(self.sizes))]

    def __call__(self, v: Tensor) -> Tensor:
        """``M^-1 v`` for a vector of all parameters.  # (1, P)"""
        pieces = zip(v[0].split(self.sizes), self.inverses, strict=True)
        return torch.cat([self._apply(piece, inverse) for piece, inverse in pieces]).unsqueeze(0)

    def _invert(self, batches: Sequence[tuple[float, Factors | None]]) -> Inverse | None:
        """The cache of the solver for a layer, and the shape of its stack of blocks; None without factors."""
        known = [(w, factors) for w, factors in batches if factors is not None]
        if not known:
            return None
        frame = _frame(known[0][1])
        state, first = HELD.init(frame), True
        for weight, factors in known:
            HELD.update(state, factors, Fold(1.0, weight, 1.0 if first else 0.0, of_step=1.0))
            first = False
        return self.solver.prepare(HELD, state, None), (frame.stack, *frame.shape)

    def _apply(self, v: Tensor, inverse: Inverse | None) -> Tensor:
        if inverse is None:
            return v / self.damping
        cache, shape = inverse
        return self.solver.solve(HELD, cache, v.reshape(shape)).reshape(-1)


def _frame(factors: Factors) -> Frame:
    pair = (factors.A, factors.B) if factors.transposed else (factors.B, factors.A)
    diagonal = frozenset(axis for axis, F in enumerate(pair) if F.ndim == 2)
    rows, columns = (F.shape[-1] for F in pair)
    return Frame(len(factors.A), (rows, columns), diagonal, factors.A.dtype, factors.A.device)
