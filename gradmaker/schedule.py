"""Schedules and clocks of measurements and refreshes. Integers only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from gradmaker.options.checks import check_count

__all__ = ["FAR", "SCHEDULES", "Clock", "Clocks", "Linear", "Schedule", "Stepped", "as_schedule"]


FAR = 2**40
"""A step at which no schedule changes any more."""


class Schedule(ABC):
    """An interval that may change with the step."""

    @abstractmethod
    def interval(self, step: int) -> int:
        """Steps from an update at ``step`` to the next one."""


@dataclass(frozen=True)
class Every(Schedule):
    """The same interval throughout."""

    steps: int

    def interval(self, step: int) -> int:
        return self.steps


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """From ``first`` to ``last`` over ``total`` steps, then ``last``."""

    first: int
    last: int
    total: int

    def __post_init__(self) -> None:
        for name in ("first", "last", "total"):
            check_count(name, getattr(self, name), 1)

    def interval(self, step: int) -> int:
        share = min(step, self.total) / self.total
        return max(1, round(self.first + (self.last - self.first) * share))


@dataclass(frozen=True, kw_only=True)
class Stepped(Schedule):
    """The interval of the latest milestone: ``{0: 1, 100: 10}``."""

    milestones: Mapping[int, int]

    def __post_init__(self) -> None:
        if not isinstance(self.milestones, Mapping) or 0 not in self.milestones:
            raise ValueError(f"milestones={self.milestones!r}: expected intervals by step, with one for step 0")
        for at, interval in self.milestones.items():
            if not isinstance(at, int) or isinstance(at, bool) or at < 0:
                raise ValueError(f"milestones={self.milestones!r}: {at!r} is not a step, an integer of at least 0")
            check_count(f"milestones[{at}]", interval, 1)

    def __hash__(self) -> int:  # a dict has none
        return hash(tuple(sorted(self.milestones.items())))

    def interval(self, step: int) -> int:
        return self.milestones[max(at for at in self.milestones if at <= step)]


SCHEDULES: dict[str, type[Schedule]] = {"Linear": Linear, "Stepped": Stepped}


def as_schedule(name: str, value: int | Schedule) -> Schedule:
    """A schedule from a number or a schedule."""
    if isinstance(value, Schedule):
        return value
    check_count(name, value, 1)
    return Every(value)


class Clock:
    """A clock of updates: due at step 0, at every step before ``warmup``, then after each interval."""

    def __init__(self, schedule: Schedule, warmup: int) -> None:
        self.schedule, self.warmup = schedule, warmup
        self.begun, self.next = 0, 0  # the current interval is [begun, next)
        self.ticks = 0  # number of updates that were due

    def copy(self) -> Clock:
        """A copy, which ticks on its own."""
        made = Clock.__new__(Clock)
        made.__dict__.update(self.__dict__)
        return made

    def tick(self, step: int) -> bool:
        """Whether an update is due at ``step``; to be called once for each step, in order."""
        if step < self.next:
            return False
        self.begun, self.ticks = step, self.ticks + 1
        self.next = step + (1 if step + 1 < self.warmup else self.schedule.interval(step))
        return True

    def retry(self, step: int) -> None:
        """Make an update due at ``step``: an earlier one brought no evidence."""
        self.next = step

    def force(self, step: int, due: bool) -> None:
        """Make an update due at ``step``, of all blocks at once, or none before long."""
        self.schedule, self.warmup = Every(1), 0
        self.begun, self.next = (step, step) if due else (-1, step + FAR)

    def due(self, step: int, share: float) -> bool:
        """Whether ``step`` is the one at offset ``share`` (0 <= share < 1) of the current interval."""
        return step < self.warmup or step == self.begun + int(share * (self.next - self.begun))


class Clocks:
    """The clocks of one method of a plan: of its measurements and of its refreshes."""

    def __init__(self, curvature: int | Schedule, preconditioner: int | Schedule, warmup: int, refreshes: bool = True) -> None:
        """refreshes: whether every step of the warm-up is a refresh, too"""
        self.measure = Clock(as_schedule("", curvature), warmup)
        self.refresh = Clock(as_schedule("", preconditioner), warmup if refreshes else 0)

    def copy(self) -> Clocks:
        """A copy of both clocks."""
        made = Clocks.__new__(Clocks)
        made.measure, made.refresh = self.measure.copy(), self.refresh.copy()
        return made

    def dump(self) -> dict[str, dict[str, int]]:
        """The state of both clocks."""
        named = {"measure": self.measure, "refresh": self.refresh}
        return {name: {"begun": clock.begun, "next": clock.next, "ticks": clock.ticks} for name, clock in named.items()}

    def load(self, saved: Mapping[str, Mapping[str, int]]) -> None:
        """Restore the state that `dump` returned."""
        for clock, period in ((self.measure, saved["measure"]), (self.refresh, saved["refresh"])):
            clock.begun, clock.next, clock.ticks = (int(period[key]) for key in ("begun", "next", "ticks"))
