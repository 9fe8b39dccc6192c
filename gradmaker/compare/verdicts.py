"""What a comparison says: paired tests between rows, steps and seconds to a target, and the front of metric against cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, median, stdev

LEVEL = 0.05  # of all tests together, by Bonferroni
SAME = 3e-7  # spread of differences, relative to the values, below which they are equal: values are kept to eight digits


@dataclass(frozen=True)
class Difference:
    """A paired test (Student's t, over common seeds) of the metric of two rows; `shown` allows for the number of tests.

    Where all seeds differ by the same amount, as metrics of few examples do by chance, it is the sign test.
    """

    first: str
    second: str
    seeds: int
    mean: float
    deviation: float
    low: float
    high: float
    t: float
    p: float
    shown: bool
    reading: str


@dataclass(frozen=True)
class Reach:
    """The first evaluation of a row at which the metric is as good as the target: medians over seeds, None if not reached.

    Args:
        steps: None unless more than half of the seeds reached it.
        seconds: steps x median time of an interleaved step.
    """

    label: str
    target: float
    steps: float | None
    seconds: float | None
    reached: int
    seeds: int


@dataclass(frozen=True)
class Point:
    """A row as metric against cost; `front` if no other row is at least as good in both and better in one."""

    label: str
    metric: float
    cost: float
    front: bool


@dataclass(frozen=True)
class Sensitivity:
    """The metric of a row with one setting changed (`batch_size` or `interval`), all else as selected."""

    label: str
    parameter: str
    value: float
    metric: float | None
    deviation: float | None
    step_seconds: float | None
    status: str


def differences(ends: Mapping[str, Mapping[int, float]], higher: bool) -> list[Difference]:
    """Tests between all pairs of rows, from the values of each by seed; pairs with fewer than two common seeds are left out."""
    pairs = []
    for second, first in combinations(ends, 2):
        common = [seed for seed in ends[first] if seed in ends[second]]
        apart = [ends[first][seed] - ends[second][seed] for seed in common]
        if len(apart) > 1 and all(map(math.isfinite, apart)):
            rounding = SAME * max(abs(ends[label][seed]) for label in (first, second) for seed in common)
            pairs.append((first, second, apart, rounding))
    return [_tested(*pair, len(pairs), higher) for pair in pairs]


def _tested(first: str, second: str, apart: Sequence[float], rounding: float, tests: int, higher: bool) -> Difference:
    from scipy import stats

    mean, deviation, freedom = fmean(apart), stdev(apart), len(apart) - 1
    error = deviation / math.sqrt(len(apart))
    if deviation > rounding:
        t, wide = mean / error, error * float(stats.t.ppf(1 - LEVEL / 2, freedom))
        p = 2 * float(stats.t.sf(abs(t), freedom))
    else:  # a spread of zero is that of rounding, not of trainings
        t, wide, p = (0.0 if mean == 0 else math.copysign(math.inf, mean)), 0.0, (1.0 if mean == 0 else 0.5**freedom)
    shown = p < LEVEL / tests
    better, worse = (first, second) if (mean > 0) is higher else (second, first)
    reading = f"{better} is better than {worse}" if shown else "no difference is shown"
    return Difference(first, second, len(apart), mean, deviation, mean - wide, mean + wide, t, p, shown, reading)


def reach(
    label: str,
    target: float,
    curves: Sequence[tuple[Sequence[int], Sequence[float | None]]],
    step_seconds: float | None,
    higher: bool,
) -> Reach:
    """When the curves of a row, steps and values for every seed, come to the target."""
    firsts = [_first(marks, values, target, higher) for marks, values in curves]
    reached = [float(first) for first in firsts if first is not None]
    steps = median([math.inf if first is None else float(first) for first in firsts]) if firsts else math.inf
    known = steps if math.isfinite(steps) else None
    seconds = None if known is None or step_seconds is None else known * step_seconds
    return Reach(label, target, known, seconds, len(reached), len(firsts))


def common_target(ends: Sequence[Sequence[float | None]], higher: bool) -> float:
    """The best value that all rows with a majority of finished trainings have reached in most seeds; NaN without such a row.

    Args:
        ends: values by seed for every row, None for a training that did not finish.
    """
    reached = []
    for values in ends:
        ranked = sorted((value for value in values if value is not None and math.isfinite(value)), reverse=higher)
        if len(ranked) > len(values) // 2:
            reached.append(ranked[len(values) // 2])
    return (min if higher else max)(reached, default=math.nan)


def _first(marks: Sequence[int], values: Sequence[float | None], target: float, higher: bool) -> int | None:
    for mark, value in zip(marks, values, strict=False):
        if value is not None and (value >= target if higher else value <= target):
            return mark
    return None


def front(points: Sequence[tuple[str, float, float]], higher: bool) -> list[Point]:
    """Rows as (label, metric, cost), with those marked that no other row dominates."""
    signed = [(metric if higher else -metric, -cost) for _, metric, cost in points]

    def dominated(own: tuple[float, float]) -> bool:
        return any(other != own and other[0] >= own[0] and other[1] >= own[1] for other in signed)

    return [Point(*point, front=not dominated(own)) for point, own in zip(points, signed, strict=True)]
