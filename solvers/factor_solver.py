"""Solvers that treat every factor by itself: their part that is given the factors, whoever holds them."""

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
    """``(F_1 (x) ... (x) F_m)^(power / order)`` from factors, or from their square roots, that may be held anywhere."""

    @abstractmethod
    def prepare_factors(self, held: Sequence[Tensor], order: float, previous: State | None) -> State:
        """`prepare`, given the factors in the form in which the capability holds them.  # each (B, d, d) or (B, d)"""

    def refuse_order(self, order: float) -> str | None:
        """Why there is no such power of a factor; None if there is one."""
        return None
