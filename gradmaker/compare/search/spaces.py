"""What a search varies: an option with its values, or a range."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradmaker.compare.errors import InputError
from gradmaker.options.suggestions import did_you_mean

KEYS = ("low", "high", "log", "int", "points")
POINTS = 3  # of a range in a grid


@dataclass(frozen=True)
class Space:
    """An option and what it may be: one of `values`, or a number from `low` to `high`."""

    name: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False
    points: int = POINTS

    def at(self, u: float) -> Any:
        """The value at a place of the unit interval."""
        if self.values:
            return self.values[min(int(u * len(self.values)), len(self.values) - 1)]
        if self.log:
            value = math.exp(math.log(self.low) + u * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + u * (self.high - self.low)
        return round(value) if self.integer else float(f"{value:.4g}")

    def grid(self) -> tuple[Any, ...]:
        """The values of a grid: all, or so many points from end to end."""
        if self.values:
            return self.values
        return tuple(dict.fromkeys(self.at(k / max(1, self.points - 1)) for k in range(self.points)))


def parse_space(name: str, given: Any) -> Space:
    """A space from a list of values, or from a mapping with low and high. InputError for any other."""
    if isinstance(given, (list, tuple)) and given:
        return Space(name, values=tuple(given))
    if not isinstance(given, Mapping):
        raise InputError(f"space of {name}: expected a list of values, or {{low: ..., high: ..., log: true}}, got {given!r}")
    if unknown := [key for key in given if key not in KEYS]:
        raise InputError(f"space of {name}: {unknown[0]!r}: {did_you_mean(str(unknown[0]), KEYS)}")
    low, high, log = given.get("low"), given.get("high"), bool(given.get("log", False))
    if not all(isinstance(end, (int, float)) and math.isfinite(end) for end in (low, high)) or low >= high:  # type: ignore[operator]
        raise InputError(f"space of {name}: low={low!r}, high={high!r}: expected two numbers, the lower one first")
    if log and low <= 0:  # type: ignore[operator]
        raise InputError(f"space of {name}: low={low!r}: a logarithmic range begins above 0")
    points = given.get("points", POINTS)
    if not isinstance(points, int) or points < 2:
        raise InputError(f"space of {name}: points={points!r}: expected an integer of at least 2")
    return Space(name, (), float(low), float(high), log, bool(given.get("int", False)), points)  # type: ignore[arg-type]
