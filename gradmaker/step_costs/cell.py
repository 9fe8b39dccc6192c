"""One row at one size: time of a step by parts and by interval, memory, FLOPs, and what was predicted."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from typing import Any

from gradmaker.compare.cost import REFERENCE, is_reference, peak_of
from gradmaker.compare.errors import InputError
from gradmaker.compare.rows import Row
from gradmaker.costs.floor import Floor, record
from gradmaker.costs.timing import WINDOW, Ratio, measure
from gradmaker.step_costs.predicted import Predicted, predicted
from gradmaker.step_costs.steps import INTERVALS, KINDS, Made, clocks_of, make, with_intervals
from gradmaker.step_costs.subjects import Subject

__all__ = ["PARTS", "Cell", "How", "Part", "measured"]

PARTS = {
    "passes": ("sgd",),
    "application": ("plain", "sgd"),
    "statistics": ("measuring", "plain"),
    "refresh": ("all", "measuring"),
}
"""The kind of step that has a part, and the one that lacks it."""
SGD = REFERENCE
PERIODIC, PERIOD = next(iter(WINDOW.items()))
"""The kind of step that is timed over whole periods, and its interval."""


@dataclass(frozen=True)
class Part:
    """Milliseconds of a part, those of its products and decompositions alone, and its FLOPs."""

    ms: float
    flops: float
    floor_ms: float | None = None


@dataclass
class Cell:
    """What was found of a row at a size.

    Args:
        status: `measured`, or `refused` with a message.
        ms, ratio: of a step, by interval of measurements and refreshes; the ratio is to plain SGD beside it.
        state_bytes: what maker and optimizer hold from one step to the next.
        predicted_ms: of the cost model, by interval.
    """

    subject: str
    row: str
    batch_size: int
    width: int | None = None
    status: str = "measured"
    message: str = ""
    parts: dict[str, Part] = field(default_factory=dict)
    sgd_ms: float = 0.0
    ms: dict[str, float] = field(default_factory=dict)
    ratio: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    memory_ratio: float | None = None
    state_bytes: int = 0
    predicted_ms: dict[str, float] = field(default_factory=dict)
    predicted_held: int = 0
    predicted_peak: int = 0
    unpredicted: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "Cell":
        """The reverse of `as_dict`."""
        return cls(**{**given, "parts": {name: Part(**part) for name, part in given["parts"].items()}})

    @property
    def floor_ratio(self) -> float | None:
        """All parts of a step that measures and refreshes, over the floors of these."""
        floors = [part.floor_ms for part in self.parts.values()]
        total = sum(floor for floor in floors if floor is not None)
        return sum(part.ms for part in self.parts.values()) / total if total > 0 and None not in floors else None


@dataclass(frozen=True)
class How:
    """How cells are measured: intervals that are reported, windows, seconds of a cell, and whether floors are timed."""

    intervals: tuple[int, ...] = (1, 10, 100)
    windows: int = 7
    seconds: float = 4.0
    floors: bool = True
    device: str = "cpu"


def measured(row: Row, subject: Subject, size: int, how: How) -> Cell:
    """Measure a row; one that its method or torch refuses is a cell that says why."""
    cell = Cell(subject.label, row.label, size, subject.width)
    try:
        clocks = clocks_of(row, subject, how.device)
        foretold = predicted(row, subject, size, how.intervals, how.device)
        _time(cell, row, clocks, subject, how)
        _memory(cell, row, clocks, subject, how)
    except (InputError, ValueError, TypeError, RuntimeError, MemoryError) as error:  # it ends this cell alone
        cell.status, cell.message = "refused", " ".join(f"{type(error).__name__}: {error}".split())[:400]
        return cell
    _note(cell, foretold)
    return cell


def _note(cell: Cell, foretold: Predicted) -> None:
    cell.predicted_ms = {str(T): round(ms, 4) for T, ms in (foretold.ms or {}).items()}
    cell.predicted_held, cell.predicted_peak, cell.unpredicted = foretold.held, foretold.peak, foretold.reason


def kinds_of(clocks: Sequence[str]) -> tuple[str, ...]:
    """The kinds of steps that a row with these options has."""
    has = [name in clocks for name in INTERVALS]
    if all(has):
        return tuple(KINDS)
    return ("plain", "all") if any(has) else ("all",)


def parts_of(kinds: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The parts of a row; those that its kinds of steps cannot tell apart are one."""
    if len(kinds) == len(KINDS):
        return PARTS
    if "plain" in kinds:
        return {name: PARTS[name] for name in ("passes", "application")} | {"statistics and refresh": ("all", "plain")}
    return {"passes": PARTS["passes"], "all that is added": ("all", "sgd")}


def _time(cell: Cell, row: Row, clocks: tuple[str, ...], subject: Subject, how: How) -> None:
    """Milliseconds of all kinds of steps, interleaved with SGD, and of parts as their differences."""
    kinds = kinds_of(clocks)
    own = SGD if is_reference(row) else row
    clocked = {kind: KINDS[kind] for kind in kinds} | ({PERIODIC: (PERIOD, PERIOD)} if "plain" in kinds else {})
    steps = {
        kind: make(with_intervals(own, clocks, *every), subject, cell.batch_size, how.device) for kind, every in clocked.items()
    }
    sgd = make(SGD, subject, cell.batch_size, how.device)
    try:
        found = measure({**steps, "sgd": sgd}, sgd, how.windows, how.seconds, device=how.device)
        floors = _floors({**{kind: steps[kind] for kind in kinds}, "sgd": sgd}, how.floors)
        cell.state_bytes = steps[kinds[-1]].state_bytes()
    finally:
        for each in (*steps.values(), sgd):
            each.close()
    cell.parts = {name: _part(found, floors, how.floors, *of) for name, of in parts_of(kinds).items()}
    cell.sgd_ms = round(found["sgd"].ms, 5)
    for T in how.intervals:
        cell.ms[str(T)] = round(_at(T, {kind: ratio.ms for kind, ratio in found.items()}), 5)
        cell.ratio[str(T)] = 1.0 if is_reference(row) else round(_at(T, {kind: one.ratio for kind, one in found.items()}), 5)


def _at(interval: int, found: Mapping[str, float]) -> float:
    """A step at an interval, of steps of each kind; what is done once between refreshes is in a period of ten steps."""
    if interval == 1 or "plain" not in found:
        return found["all"]
    once = PERIOD * found[PERIODIC] - (PERIOD - 1) * found["plain"] - found["all"]
    return found["plain"] + (found["all"] - found["plain"] + once) / interval


def _floors(steps: Mapping[str, Made], timed: bool) -> dict[str, Floor]:
    """FLOPs, and seconds of the products where they are timed, of each kind of step."""
    made = {}
    for name, step in steps.items():
        recorded = record(step)
        made[name] = recorded.floor() if timed else Floor({"all": 1e9 * recorded.gflop()})
    return made


def _part(found: Mapping[str, Ratio], floors: Mapping[str, Floor], timed: bool, kind: str, without: str = "") -> Part:
    """What one kind of step has more than another."""

    def difference(value: Mapping[str, float]) -> float:
        return round(value[kind] - (value[without] if without else 0.0), 5)

    ms = difference({name: ratio.ms for name, ratio in found.items()})
    flops = round(difference({name: sum(floor.flops.values()) for name, floor in floors.items()}))
    return Part(ms, flops, difference({name: 1e3 * floor.total for name, floor in floors.items()}) if timed else None)


def _memory(cell: Cell, row: Row, clocks: tuple[str, ...], subject: Subject, how: How) -> None:
    """Peak bytes of building the row and of two steps that measure and refresh, and their ratio to SGD."""
    reference = _peak_of_sgd(subject, cell.batch_size, how.device)
    own = with_intervals(row, clocks, 1, 1)
    cell.peak_bytes = reference if is_reference(row) else _peak(own, subject, cell.batch_size, how.device)
    if cell.peak_bytes and reference:
        cell.memory_ratio = round(cell.peak_bytes / reference, 5)


@lru_cache(maxsize=1)  # rows of one size are measured one after the other
def _peak_of_sgd(subject: Subject, size: int, device: str) -> int | None:
    return _peak(SGD, subject, size, device)


def _peak(row: Row, subject: Subject, size: int, device: str) -> int | None:
    return peak_of(partial(_two_steps, row, subject, size, device), device)


def _two_steps(row: Row, subject: Subject, size: int, device: str) -> None:
    gc.collect()
    made = make(row, subject, size, device)
    for _ in range(2):
        made()
    made.close()
