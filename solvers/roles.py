"""Base classes of solvers that can do more than `prepare` and `solve`; the library recognises them by these."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.state import State
from gradmaker.representations.roles import FactoredAxes
from gradmaker.solvers.base import Needed, Solver

__all__ = ["AppliesRows", "AveragesInBasis", "HeldInForms", "Remade", "SolvesOwn"]


class AppliesRows(Solver[Needed]):
    """A solver of matrices whose ``P`` multiplies a gradient on each side, so that it may multiply the rows instead."""

    def by_rows(self, representation: Needed) -> bool:
        """Whether `solve_rows` serves this representation."""
        return isinstance(representation, FactoredAxes)

    @abstractmethod
    def solve_rows(self, representation: Needed, cache: State, rows: FactoredGradient) -> FactoredGradient | Tensor:
        """``P G``, by rows or formed; `solve` of the formed gradient gives the same."""


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


class SolvesOwn(Solver[Needed]):
    """A solver for the very gradient that the rows of the statistic make up, which need not be computed for it."""

    @abstractmethod
    def solve_own(self, representation: Needed, state: State, cache: State) -> Tensor | list[FactoredGradient | Tensor] | None:
        """``P g``, or that of each layer, by rows or formed, ``g`` the gradient of the step whose evidence is in ``state``.

        None where the rows are not known to make it up, or the cache is of another step.
        """


class Remade(Solver[Needed]):
    """A solver whose cache is a function of the statistic alone where no member has failed: `prepare` makes it again."""


class HeldInForms(Solver[Needed]):
    """A solver that holds a factorisation in one of several forms, as intervals, sides and the device decide."""

    @abstractmethod
    def converted(self, saved: State, like: State) -> State:
        """A saved cache of some members in the form of another; unchanged where it is in that form already.

        like: a cache of the form that is wanted
        """
