"""Kronecker products that are applied by the eigenvalues and bases of their factors at the last refresh."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from gradmaker.linalg.mode_products import apply_factors, kronecker_product
from gradmaker.linalg.state import State
from gradmaker.representations.base import Grain
from gradmaker.representations.roles import FactoredAxes

__all__ = ["HeldSpectra"]


class HeldSpectra(FactoredAxes):
    """Kronecker factors with held eigenpairs: ``C = F_1^e (x) ...``, ``F_k = Q_k diag(s_k) Q_k^T`` as of the last refresh.

    The state has ``values_k``, ``basis_k``, unless the factor is a diagonal, and the ``diagnosis`` of the refresh.
    """

    exponent: ClassVar[int]
    """The exponent ``e``: 1 for factors of ``C``, -1 for factors of its inverse."""

    @property
    def grain(self) -> Grain:
        return "tensor"

    def axes(self, state: State) -> range:
        """Indices of the axes."""
        return range(sum(name.startswith("values_") for name in state))

    def power(self, state: State, axis: int, exponent: float) -> Tensor:
        """``F_k^exponent``.  # (B, d, d) or (B, d)"""
        s, Q = state[f"values_{axis}"], state.get(f"basis_{axis}")
        return s**exponent if Q is None else (Q * s.unsqueeze(-2) ** exponent) @ Q.mT

    def to_dense(self, state: State) -> Tensor:
        """``C`` as of the last refresh.  # (B, P, P)"""
        return kronecker_product(self._factors(state))

    def matvec(self, state: State, v: Tensor) -> Tensor:
        return apply_factors(self._factors(state), self.unfold(v)).reshape(v.shape)

    def _factors(self, state: State) -> list[Tensor]:
        return [self.power(state, axis, self.exponent) for axis in self.axes(state)]

    # ---------------------------------------------------------------- Inverse
    def spectra(self, state: State) -> list[tuple[Tensor, Tensor | None]]:
        """Eigenpairs of the factors of ``C^-1``, as of the last refresh.  # (B, d), (B, d, d)"""
        return [(state[f"values_{k}"] ** -self.exponent, state.get(f"basis_{k}")) for k in self.axes(state)]

    def report(self, state: State, spectra: list[tuple[Tensor, Tensor | None]], damping: float) -> Tensor:
        """The diagnosis of each axis' last refresh, in units of the factors; it includes the damping.  # (B, m, 5)"""
        return state["diagnosis"]

    def unfold(self, g: Tensor) -> Tensor:
        """The gradient itself; a scalar parameter is a vector of length one.  # (B, d_1, ..., d_m)"""
        return g if g.ndim > 1 else g.unsqueeze(1)

    def order(self, factors: int) -> float:
        """One: ``C`` is the product of the factors."""
        return 1
