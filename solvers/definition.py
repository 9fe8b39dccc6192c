"""Solvers with an equation that defines ``P g``, to check solutions where the dense ``P`` of `Solver.operator` is too large."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, TypeVar

from torch import Tensor

from gradmaker.linalg.factors import dense
from gradmaker.linalg.mode_products import kronecker_product
from gradmaker.linalg.powers import along_axes
from gradmaker.linalg.state import State
from gradmaker.representations.capabilities import Unfolds
from gradmaker.representations.roles import widen
from gradmaker.solvers.base import Needed, Solver

__all__ = ["Defined", "DefinedByAxes"]

Unfolded = TypeVar("Unfolded", bound=Unfolds, contravariant=True)


class Defined(Solver[Needed]):
    """A solver with an equation that ``x = P g`` satisfies, and the accuracy to which `solve` satisfies it."""

    linear: ClassVar[bool] = True
    """Whether `solve` is linear in the gradient."""
    implicit: ClassVar[bool] = False
    """Whether `equation` multiplies ``x`` by a matrix, so that its error is the rounding of ``x`` times a condition number."""
    rounds_to_limit: ClassVar[int] = 1
    """Number of calls of `solve` with one gradient after which `limit` has converged."""

    @property
    def accuracy(self) -> float:
        """Relative error of ``P g`` that the stopping rule allows; 0 for a direct solver."""
        return 0.0

    @abstractmethod
    def equation(self, representation: Needed, state: State, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides of an equation whose solution is ``x = P g``.

        state, g, x: in float64  # -> two tensors of one shape
        """

    def limit(self) -> Defined[Needed]:
        """The solver with options under which a few steps from an empty cache converge to `operator` and `equation`."""
        return self


class DefinedByAxes(Defined[Unfolded]):
    """A solver whose ``P`` is a Kronecker product with a factor for each axis of the unfolded gradient."""

    @abstractmethod
    def axes(self, representation: Unfolded, state: State) -> list[Tensor]:
        """The Kronecker factors of ``P``, from the definition.

        state: in float64  # each (B, d, d), (B, d) or tiled
        """

    def operator(self, representation: Unfolded, state: State) -> Tensor:
        return widen(representation, state, kronecker_product([dense(X) for X in self.axes(representation, state)]))

    def equation(self, representation: Unfolded, state: State, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, along_axes(self.axes(representation, state), representation.unfold(g)).reshape(g.shape)
