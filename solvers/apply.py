"""Application of a preconditioner that the state holds already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.state import State
from gradmaker.representations.capabilities import Preconditions
from gradmaker.representations.roles import PreconditionsRows, snapshot
from gradmaker.solvers.definition import Defined
from gradmaker.solvers.roles import AppliesRows

__all__ = ["Apply"]


@dataclass(frozen=True, kw_only=True)
class Apply(Defined[Preconditions], AppliesRows[Preconditions]):
    """``P g`` with the ``P`` that was fitted or updated directly.

    The cache is the state itself, as of the last refresh. It is never lost: a representation of this kind refuses what would
    make it infinite.

    Reference: Li, IEEE TNNLS 2018, arXiv:1512.04202; Liu, Nocedal, Math. Programming 1989.
    """

    implicit: ClassVar[bool] = True

    def prepare(self, representation: Preconditions, state: State, previous: State | None) -> State:
        return snapshot(representation, state)

    def operator(self, representation: Preconditions, state: State) -> Tensor:
        P: Tensor = torch.linalg.inv(representation.to_dense(state))
        return P

    def equation(self, representation: Preconditions, state: State, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """``C x = g``."""
        return representation.matvec(state, x), g

    def solve(self, representation: Preconditions, cache: State, g: Tensor) -> Tensor:
        P: Tensor = representation.apply(cache, g)
        return P

    def by_rows(self, representation: Preconditions) -> bool:
        return isinstance(representation, PreconditionsRows)

    def solve_rows(self, representation: Preconditions, cache: State, rows: FactoredGradient) -> FactoredGradient:
        assert isinstance(representation, PreconditionsRows)
        return representation.apply_rows(cache, rows)
