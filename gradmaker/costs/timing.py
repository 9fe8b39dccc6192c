"""Time of each kind of step against SGD in the same process: means over whole windows of steps, medians over windows.

On a CPU it is the CPU time of the process, which other processes of a shared machine disturb least.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import ceil
from statistics import median
from time import perf_counter, process_time

import torch

__all__ = ["WINDOW", "Ratio", "Step", "Timed", "clock", "measure", "window"]

WINDOW = {"T10": 10}
"""Steps of a window, for kinds whose steps are not all alike: a whole period."""
LEAST = 0.05  # seconds of a window of equal steps
LONG = 3.0  # seconds of a step of which one window is enough
MOST = 10  # steps of such a window
REFERENCE = 5  # steps of SGD before and after

Step = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """A step over one of SGD, and milliseconds of both: medians over windows."""

    ratio: float
    ms: float
    sgd_ms: float
    windows: int
    steps: int  # of a window
    spread: float  # interquartile range of the ratios over their median

    def as_dict(self) -> dict[str, float]:
        """The values for JSON."""
        return {key: round(value, 5) for key, value in asdict(self).items()}


def clock(device: torch.device | str) -> Callable[[], float]:
    """A function that reads seconds: CPU time of this process, or wall time when the work queued on a CUDA device is done."""
    if torch.device(device).type != "cuda":
        return process_time

    def now() -> float:
        torch.cuda.synchronize(device)
        return perf_counter()

    return now


def window(step: Step, count: int, now: Callable[[], float] = process_time) -> float:
    """Seconds of a step: the mean of a window."""
    start = now()
    for _ in range(count):
        step()
    return (now() - start) / count


class Timed:
    """One kind of step: its window, and what was measured. The step before a window of equal steps warms the caches."""

    def __init__(self, kind: str, step: Step, now: Callable[[], float] = process_time) -> None:
        self.now = now
        self.step, self.count, self.alike = step, WINDOW.get(kind, 1), kind not in WINDOW
        window(step, 2 if self.alike else self.count, now)  # the first step of all kinds measures and refreshes
        one = window(step, 1, now) if self.alike else 0.0
        self.long = one > LONG
        if self.alike:
            self.count = min(MOST, max(1, ceil(LEAST / max(one, 1e-6))))
        self.found: list[tuple[float, float]] = []

    def turn(self, sgd: Step) -> None:
        """A window between two of SGD; only one of long steps."""
        if self.long and self.found:
            return
        before = self._warm(sgd, REFERENCE)
        own = self._warm(self.step, self.count) if self.alike else window(self.step, self.count, self.now)
        self.found.append((own, (before + self._warm(sgd, REFERENCE)) / 2))

    def _warm(self, step: Step, count: int) -> float:
        step()
        return window(step, count, self.now)

    def ratio(self) -> Ratio:
        """The medians of what was measured."""
        own, sgd = (median(values) for values in zip(*self.found, strict=True))
        ratios = sorted(a / b for a, b in self.found)
        quarter = len(ratios) // 4
        spread = (ratios[-1 - quarter] - ratios[quarter]) / median(ratios)
        return Ratio(median(ratios), 1e3 * own, 1e3 * sgd, len(ratios), self.count, spread)


def measure(
    steps: Mapping[str, Step], sgd: Step, windows: int, limit: float, least: int = 3, device: torch.device | str = "cpu"
) -> dict[str, Ratio]:
    """Ratios of all kinds of steps, interleaved.

    limit: wall seconds after which no further windows are begun, once every kind has `least` of them
    """
    start = perf_counter()
    now = clock(device)
    window(sgd, 3, now)
    timed = {kind: Timed(kind, step, now) for kind, step in steps.items()}
    for turn in range(windows):
        if turn >= least and perf_counter() - start > limit:
            break
        for each in timed.values():
            each.turn(sgd)
    return {kind: each.ratio() for kind, each in timed.items()}
