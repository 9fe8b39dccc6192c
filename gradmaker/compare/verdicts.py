"""What a comparison says: paired tests between rows, steps and seconds to a target, and the front of metric against cost."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """A paired test (Student's t, over common seeds) of the metric of two rows; `shown` allows for the number of tests."""

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
