"""Base class of solvers that apply a power to each Kronecker factor separately."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gradmaker.linalg.state import State
from gradmaker.solvers.base import Needed, PowerSolver

__all__ = ["FactorSolver"]


@dataclass(frozen=True, kw_only=True)
class FactorSolver(PowerSolver[Needed]):
    """``(F_1 (x) ... (x) F_m)^(power / order)`` from factors, or from their square roots, given as a list."""

    @abstractmethod
    def prepare_factors(self, held: Sequence[Tensor], order: float, previous: State | None) -> State:
        """`prepare` from the factors, in the form of the capability.  # each (B, d, d) or (B, d)"""

    def refuse_order(self, order: float) -> str | None:
        """The reason why the solver has no power ``power / order`` of a factor; None if it has."""
        return None
