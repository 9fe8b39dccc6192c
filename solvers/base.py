"""The solver axis: how ``P g = C^power g`` is obtained from a representation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from gradmaker.representations.base import State

__all__ = ["Solver"]


class Solver(ABC):
    """Turns a statistic into a preconditioned gradient: `prepare` now and then, `solve` at every step.

    Subclasses are frozen dataclasses. Neither method writes to ``state``. Every tensor of a cache leads with the stack axis.
    """

    needs: ClassVar[type]
    """The capability protocol that a representation must have."""
    definite: ClassVar[bool] = True
    """Whether ``C`` has to be positive semidefinite."""

    @property
    @abstractmethod
    def exponent(self) -> float:
        """The power of ``C`` that `solve` applies: -1, -1/2, ..."""

    def refuse(self, representation: Any) -> str | None:
        """Why this very solver cannot serve a representation that has the capability; None if it can."""
        return None

    @abstractmethod
    def prepare(self, representation: Any, state: State, previous: State | None) -> State:
        """Factorise, root or invert. ``previous`` is the last cache: what a failed block falls back to."""

    @abstractmethod
    def solve(self, representation: Any, cache: State, g: Tensor) -> Tensor:
        """``P g``.  # (B, *shape)"""
