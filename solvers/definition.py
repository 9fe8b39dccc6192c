"""Definitions: what ``P g`` is by the formula of a method, for checks beyond the dense matrix of `Solver.operator`."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, TypeVar

from torch import Tensor

from gradmaker.linalg.definition import along_axes
from gradmaker.linalg.factors import dense
from gradmaker.linalg.mode_products import kronecker_product
from gradmaker.linalg.state import State
from gradmaker.representations.capabilities import Unfolds
from gradmaker.representations.roles import widen
from gradmaker.solvers.base import Needed, Solver

__all__ = ["Defined", "DefinedByAxes"]

Unfolded = TypeVar("Unfolded", bound=Unfolds, contravariant=True)


class Defined(Solver[Needed]):
    """A solver whose ``P g`` can be checked where `operator` is too large, and up to what accuracy."""

    linear: ClassVar[bool] = True
    """Whether `solve` is linear: ``P`` does not depend on the gradient that it is applied to."""
    implicit: ClassVar[bool] = False
    """Whether `equation` multiplies ``x``, so that it holds up to the rounding of ``x`` times a condition number."""
    rounds_to_limit: ClassVar[int] = 1
    """Solves of one gradient after which a `limit` is reached."""

    @property
    def accuracy(self) -> float:
        """Relative error of ``P g`` at which its own stopping rule may end; 0 without one."""
        return 0.0

    @abstractmethod
    def equation(self, representation: Needed, state: State, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Two sides that are equal where ``x = P g``.

        state, g, x: in float64  # -> any shape, twice
        """

    def limit(self) -> Defined[Needed]:
        """Itself, with options under which a few steps from nothing reach what `operator` and `equation` say."""
        return self


class DefinedByAxes(Defined[Unfolded]):
    """A solver whose ``P`` is a Kronecker product of factors on the axes of an unfolded gradient."""

    @abstractmethod
    def axes(self, representation: Unfolded, state: State) -> list[Tensor]:
        """The factors of ``P``, from the definition.

        state: in float64  # each (B, d, d), (B, d) or tiled
        """

    def operator(self, representation: Unfolded, state: State) -> Tensor:
        return widen(representation, state, kronecker_product([dense(X) for X in self.axes(representation, state)]))

    def equation(self, representation: Unfolded, state: State, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, along_axes(self.axes(representation, state), representation.unfold(g)).reshape(g.shape)
