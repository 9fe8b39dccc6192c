"""What a block holds."""

from __future__ import annotations

from dataclasses import dataclass, field

from gradmaker.linalg.state import State

__all__ = ["Held"]


@dataclass(frozen=True)
class Held:
    """Statistic, cache, average of gradients, state of the grafting rule: of one block, each with the stack axis first."""

    state: State
    cache: State = field(default_factory=dict)
    average: State = field(default_factory=dict)
    grafting_state: State = field(default_factory=dict)
    ready: frozenset[str] = frozenset()  # sites for which the cache holds more than an empty statistic
    fresh: frozenset[str] = frozenset()  # sites whose first step this is and is left out
