"""What a block does to a statistic on its clocks, for tests that have a representation alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from gradmaker.curvature.evidence import Evidence
from gradmaker.linalg.state import State
from gradmaker.representations.base import Fold, Representation
from gradmaker.representations.roles import OwnOrder

__all__ = ["follow", "take"]


def take(representation: Representation, state: State, evidence: Evidence, fold: Fold, index: int, due: bool = True) -> None:
    """One step: evidence enters, and what is slow is renewed, before, in between or after.  index: of the step"""
    first = index == 0
    representation.update(state, evidence, replace(fold, first=first, refresh=due or first, index=index))
    if (due or first) and not isinstance(representation, OwnOrder):
        representation.refresh(state)


def follow(
    representation: Representation,
    state: State,
    evidence: Iterable[Evidence],
    fold: Fold,
    interval: int = 1,
    warmup: int = 0,
    begin: int = 0,
) -> State:
    """Steps from ``begin`` on, with a refresh at every ``interval``-th, and at all before ``warmup``."""
    for index, each in enumerate(evidence, begin):
        take(representation, state, each, fold, index, index % interval == 0 or index < warmup)
    return state
