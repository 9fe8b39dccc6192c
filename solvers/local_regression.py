"""Solver by the sparse inverse of a directed Gaussian model: every entry is regressed on its parents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradmaker.linalg.fallbacks import keep_previous, try_all
from gradmaker.linalg.state import State
from gradmaker.representations.capabilities import Graphical
from gradmaker.solvers.base import InverseSolver
from gradmaker.solvers.cholesky import CholeskyInverse
from gradmaker.solvers.definition import Defined

__all__ = ["LocalRegression"]


@dataclass(frozen=True, kw_only=True)
class LocalRegression(InverseSolver[Graphical], Defined[Graphical]):
    """``P = (I - S)^T diag(1 / d) (I - S)`` with ``S`` and ``d`` the regressions of ``C + damping I`` on the parents.

    Two sparse products a step; a refresh inverts a ``q x q`` matrix for an entry with ``q`` parents, or divides by a number.
    A block whose refreshes have all failed gets ``g / damping``, the result for zero curvature.

    Reference: Grosse & Salakhutdinov, ICML 2015, section 4.2.
    """

    undamped: ClassVar[bool] = True

    def prepare(self, representation: Graphical, state: State, previous: State | None) -> State:
        inner, cross, own = representation.families(state)
        coefficients, failed = self._coefficients(inner, cross)
        # A Schur complement of C + damping I is at least the damping; a smaller value is rounding.
        residual = (own + self.damping - (coefficients * cross).sum(-1)).clamp(min=self.damping)
        finite = torch.isfinite(coefficients).all(-1) & torch.isfinite(residual) & (residual > 0)
        default = {"coefficients": own.new_zeros(()), "residual": own.new_tensor(self.damping or 1.0)}
        return keep_previous({"coefficients": coefficients, "residual": residual}, failed | ~finite.all(1), previous, default)

    def _coefficients(self, inner: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
        """``(C_pa,pa + damping I)^-1 C_pa,i``, and the members in which an inverse failed.  # (B, P, q), (B,)"""
        B, P, q, _ = inner.shape
        if q == 1:
            return torch.where(cross == 0, cross, cross / (inner[..., 0] + self.damping)), cross.new_zeros(B, dtype=torch.bool)
        stack = inner.reshape(B * P, q, q)
        ((inverse,),), failed = try_all(CholeskyInverse(1), [stack], [stack.new_full((B * P,), self.damping)])
        return (inverse.reshape(inner.shape) @ cross.unsqueeze(-1)).squeeze(-1), failed.reshape(B, P).any(1)

    def operator(self, representation: Graphical, state: State) -> Tensor:
        S, d = representation.regressions(state, self.damping)
        root = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device) - S
        P: Tensor = root.mT @ (root / d.unsqueeze(-1))
        return P

    def equation(self, representation: Graphical, state: State, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        inner, cross, own = representation.families(state)
        eye = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
        S = (torch.linalg.pinv(inner + self.damping * eye, hermitian=True) @ cross.unsqueeze(-1)).squeeze(-1)
        d = (own + self.damping - (S * cross).sum(-1)).clamp(min=self.damping)
        z = (g - representation.predict(S, g)) / d.reshape(g.shape)
        return x, z - representation.spread(S, z)

    def solve(self, representation: Graphical, cache: State, g: Tensor) -> Tensor:
        S = cache["coefficients"]
        z = (g - representation.predict(S, g)) / cache["residual"].reshape(g.shape)
        out: Tensor = z - representation.spread(S, z)
        return out
