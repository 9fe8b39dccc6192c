"""The tensors of a block."""

from __future__ import annotations

from dataclasses import dataclass, field

from gradmaker.linalg.state import State

__all__ = ["Held"]


@dataclass(frozen=True)
class Held:
    """Statistic, cache, average of gradients and state of the grafting rule of one block, each with the stack axis first."""

    state: State
    cache: State = field(default_factory=dict)
    average: State = field(default_factory=dict)
    grafting_state: State = field(default_factory=dict)
    ready: frozenset[str] = frozenset()  # sites for which the cache is of a statistic with evidence
    fresh: frozenset[str] = frozenset()  # sites in their first step, which is left out
    implicit: bool = False  # the cache is what the solver prepares from the statistic, and is not held
    current: bool = False  # the cache was prepared from this statistic, and no member failed

    def versions(self) -> tuple[int, ...]:
        """Counters of the writes into the statistic."""
        return tuple(x._version for x in self.state.values())
