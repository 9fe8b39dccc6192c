"""Methods for inverse roots of factors, by name. Solvers form the roots; they register here when they are imported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypeAlias

from torch import Tensor

from gradmaker.linalg.state import State

__all__ = ["ROOTINGS", "FactorRoot", "Rooting"]

FactorRoot: TypeAlias = Literal["eigh", "newton", "higher_order", "newton_schulz", "denman_beavers"]
"""Method for the inverse roots of factors that are held as matrices."""


class Rooting(Protocol):
    """Method for inverse roots of factors, as representations use it."""

    def prepare_factors(self, held: Sequence[Tensor], order: float, previous: State | None) -> State:
        """``root_k = (F_k + damping lambda_max(F_k) I)^(-1 / (2 order))``, with counts of failures and a diagnosis.

        # each (B, d, d) or (B, d)
        """


ROOTINGS: dict[FactorRoot, Callable[[float], Rooting]] = {}
"""Constructors by name, each from a damping; filled by `gradmaker.solvers`."""
