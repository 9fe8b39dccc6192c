"""Base classes of solvers that can do more than `prepare` and `solve`; the library recognises them by these."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.state import State
from gradmaker.solvers.base import Needed, Solver

__all__ = ["AppliesRows", "AveragesInBasis"]


class AppliesRows(Solver[Needed]):
    """A solver of matrices whose ``P`` multiplies a gradient on each side, so that it may multiply the rows instead."""

    @abstractmethod
    def solve_rows(self, representation: Needed, cache: State, rows: FactoredGradient) -> FactoredGradient | Tensor:
        """``P G`` by its rows, or formed where it has none; `solve` of the formed gradient gives the same."""


class AveragesInBasis(AppliesRows[Needed]):
    """A solver whose ``P`` is diagonal in a basis that its cache holds: gradients may be averaged in their coordinates."""

    @abstractmethod
    def coordinates(self, representation: Needed, cache: State, g: Tensor | FactoredGradient) -> Tensor:
        """``Q^T g``.  # (B, d_1, ..., d_m)"""

    @abstractmethod
    def solve_coordinates(self, cache: State, x: Tensor) -> Tensor:
        """``P g`` from ``x = Q^T g``; `solve` of the gradient gives the same.  # (B, d_1, ..., d_m)"""

    @abstractmethod
    def bases(self, cache: State) -> list[Tensor | None]:
        """``Q_k``; None for an axis that keeps the unit basis.  # each (B, d_k, d_k), or tiled"""
