"""How factors are rooted, by name. What forms the roots are solvers, which enter themselves here when they are imported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypeAlias

from torch import Tensor

from gradmaker.linalg.state import State

__all__ = ["ROOTINGS", "FactorRoot", "Rooting"]

FactorRoot: TypeAlias = Literal["eigh", "newton", "higher_order", "newton_schulz", "denman_beavers"]
"""How factors are rooted that are held as they are."""


class Rooting(Protocol):
    """Forms inverse square roots."""

    def prepare_factors(self, held: Sequence[Tensor], order: float, previous: State | None) -> State:
        """``root_k = (F_k + damping lambda_max(F_k) I)^(-1 / (2 order))``, with failures counted and a diagnosis.

        # each (B, d, d) or (B, d)
        """


ROOTINGS: dict[FactorRoot, Callable[[float], Rooting]] = {}
"""From a damping, by name: filled by `gradmaker.solvers`."""
