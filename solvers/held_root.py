"""Solver for representations that hold inverse square roots of their factors, because their statistics need them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.powers import along_axes
from gradmaker.linalg.roots import apply_roots, apply_roots_to_rows, held_roots
from gradmaker.linalg.state import State
from gradmaker.representations.capabilities import Rooted
from gradmaker.solvers.base import spectral_power
from gradmaker.solvers.definition import Defined
from gradmaker.solvers.roles import AppliesRows

__all__ = ["HeldRoot"]


@dataclass(frozen=True, kw_only=True)
class HeldRoot(Defined[Rooted], AppliesRows[Rooted]):
    """``C^(-1/2) g = g x_1 X_1 x_2 X_2 ...`` with the ``X_k`` that the representation holds.

    The cache refers to the roots. The representation damps and refreshes them and handles failures.

    Reference: Duvvuri, Dhillon & Hsieh 2024, submission ``caspr_adaptive`` to AlgoPerf v0.5.
    """

    implicit: ClassVar[bool] = True

    @property
    def exponent(self) -> float:
        return -0.5

    def prepare(self, representation: Rooted, state: State, previous: State | None) -> State:
        return dict(representation.rooted(state))

    def operator(self, representation: Rooted, state: State) -> Tensor:
        C: Tensor = representation.to_dense(state)
        return spectral_power((C + C.mT) / 2, 0.0, self.exponent)

    def equation(self, representation: Rooted, state: State, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """``P C x = g``."""
        roots = held_roots(representation.rooted(state))
        return along_axes(roots, representation.unfold(representation.matvec(state, x))).reshape(g.shape), g

    def solve(self, representation: Rooted, cache: State, g: Tensor) -> Tensor:
        return apply_roots(cache, representation.unfold(g)).reshape(g.shape)

    def solve_rows(self, representation: Rooted, cache: State, rows: FactoredGradient) -> FactoredGradient:
        return apply_roots_to_rows(cache, rows)
