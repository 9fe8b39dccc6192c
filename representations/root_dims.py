"""Shampoo's factors held by their square roots, which lose half the digits of a condition number, not all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Evidence, Gradient
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.mode_products import mode_matrix
from gradmaker.linalg.state import State
from gradmaker.representations.base import Fold
from gradmaker.representations.kronecker import KronDims

__all__ = ["RootKronDims"]


@dataclass(frozen=True)
class RootKronDims(KronDims):
    """`KronDims` by square roots, ``H_k = R_k^T R_k``: ``R <- R of QR([sqrt(beta) R; sqrt(alpha) mat_k(G)^T])``.

    ``R_k`` is upper triangular. ``H_k`` is never formed where a solver takes ``R_k`` (`SvdRoot`): eigenvalues down to
    ``u^2 lambda_max`` survive in a precision of unit roundoff ``u``, where ``H_k`` itself keeps those above ``u lambda_max``.
    A diagonal factor is held by its root too.

    Reference: Golub & Van Loan, Matrix Computations, section 6.5 (updating a QR factorisation).
    """

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        assert isinstance(evidence, Gradient)
        G = self.unfold(evidence.gradient)
        for axis in range(G.ndim - 1):
            _add_root_(state[f"factor_{axis}"], mode_matrix(G, axis).mT, fold)
        fold.weigh_(state["mass"])

    def update_rows(self, state: State, rows: FactoredGradient, fold: Fold) -> None:
        """The triangle of the other rows takes the place of their Gram matrix: ``G G^T = (T g)^T (T g)`` with ``a^T = Q T``."""
        for axis, (mine, other) in enumerate(((rows.g, rows.a), (rows.a, rows.g))):
            T = torch.linalg.qr(other.mT, mode="r")[1]
            _add_root_(state[f"factor_{axis}"], T @ mine, fold)
        fold.weigh_(state["mass"])

    # ---------------------------------------------------------------- RootFactored, and so Factored
    def factor_roots(self, state: State) -> list[Tensor]:
        """``R_k``, bias-corrected.  # (B, d_k, d_k), or (B, d_k) when diagonal"""
        mass = torch.where(state["mass"] > 0, state["mass"], 1.0).sqrt()
        axes = sum(name.startswith("factor_") for name in state)
        found = [state[f"factor_{axis}"] for axis in range(axes)]
        found = [R / mass.view(-1, *[1] * (R.ndim - 1)) for R in found]
        return [R / c for R, c in zip(found, self._lengths(found), strict=True)] if self.balanced else found

    def _lengths(self, roots: list[Tensor]) -> list[Tensor]:
        """The divisor of ``R_k`` where factors are balanced, ``tr(H_k)^(share / 2)``.  # (B, 1, 1) or (B, 1)"""
        share = 1 - self.order(len(roots)) / len(roots)
        norms = [torch.linalg.vector_norm(R, dim=tuple(range(1, R.ndim)), keepdim=True) for R in roots]
        return [torch.where(n > 0, n, 1.0) ** share for n in norms]

    def factors(self, state: State) -> list[Tensor]:
        """``R_k^T R_k``.  # (B, d_k, d_k), or (B, d_k) when diagonal"""
        return [R.square() if R.ndim == 2 else R.mT @ R for R in self.factor_roots(state)]


def _add_root_(R: Tensor, rows: Tensor, fold: Fold) -> None:
    """``R^T R <- beta R^T R + alpha rows^T rows`` in place.  # (B, d, d), or (B, d) when diagonal; (B, n, d)"""
    kept, new = R * fold.beta**0.5, rows * fold.alpha**0.5
    if R.ndim == 2:
        R.copy_(torch.linalg.vector_norm(torch.cat([kept.unsqueeze(-2), new], -2), dim=-2))
    else:
        R.copy_(torch.linalg.qr(torch.cat([kept, new], -2), mode="r")[1])
