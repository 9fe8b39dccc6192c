"""Figures as data: axes, series of rows, heat maps. What cannot be drawn is refused when it is made."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Scale = Literal["linear", "log", "category"]
Mark = Literal["line", "step", "points", "bars"]
Value = float | str | None
SCALES = ("linear", "log", "category")
MARKS = ("line", "step", "points", "bars")


@dataclass(frozen=True)
class Axis:
    """An axis of a figure: title, scale, format of its numbers, limits.

    Args:
        scale: linear, log, or category for names, which stand in the order in which they are given.
        format: how numbers are written, in the language of d3-format, as ``.3~g`` or ``.1%``.
        limits: lowest and highest value; None: from the data.
        zero: whether a linear axis holds zero.
    """

    title: str
    scale: Scale = "linear"
    format: str = ""
    limits: tuple[float, float] | None = None
    zero: bool = False

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f"axis {self.title!r}: scale={self.scale!r}: legal are {', '.join(SCALES)}")

    def check(self, values: Sequence[Value], what: str) -> None:
        """ValueError for a value that has no place on the axis; None is a gap."""
        for value in values:
            if value is None:
                continue
            if isinstance(value, str) != (self.scale == "category"):
                wanted = "names" if self.scale == "category" else "numbers"
                raise ValueError(f"{what}: {value!r} on the axis {self.title!r}, which has {wanted} (scale={self.scale!r})")
            if not isinstance(value, str) and self.scale == "log" and value <= 0:
                raise ValueError(f"{what}: {value!r} on the log axis {self.title!r}: leave it out (None), or take a linear one")


@dataclass(frozen=True)
class Series:
    """The values of one row in a figure. Values that are not finite become None, a gap.

    Args:
        row: name of the row; it has the same colour in all figures and tables of a document. Empty: a grey line without a
            name, as a Pareto front.
        low, high: ends of a band along a line, or of the error bar of a point, on the axis of numbers.
        details: further values of each point, shown under the pointer.
        mark: line, step, points or bars; bars with a category as y lie, those of one category are stacked.
    """

    row: str
    x: Sequence[Value]
    y: Sequence[Value]
    low: Sequence[Value] | None = None
    high: Sequence[Value] | None = None
    details: Mapping[str, Sequence[Value]] = field(default_factory=dict)
    mark: Mark = "line"

    def __post_init__(self) -> None:
        if self.mark not in MARKS:
            raise ValueError(f"series {self.row!r}: mark={self.mark!r}: legal are {', '.join(MARKS)}")
        if (self.low is None) != (self.high is None):
            raise ValueError(f"series {self.row!r}: low and high belong together; give both or none")
        columns = {"x": self.x, "y": self.y, "low": self.low, "high": self.high, **self.details}
        lengths = {name: len(values) for name, values in columns.items() if values is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"series {self.row!r}: values of unequal lengths {lengths}")
        for name in ("x", "y", "low", "high"):
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(map(finite, values)))
        object.__setattr__(self, "details", {name: tuple(map(finite, values)) for name, values in self.details.items()})


@dataclass(frozen=True)
class Rule:
    """A straight line across a figure with a label, as a target at ``axis="y"`` or a refresh at ``axis="x"``."""

    value: float
    label: str = ""
    axis: Literal["x", "y"] = "y"


@dataclass(frozen=True)
class Figure:
    """Series of rows over two axes. ValueError for a name that names no file.

    Args:
        name: name of its files, as ``loss_steps``; unique in a document.
        caption: what is drawn and how it was measured.
        height: of the inner rectangle in pixels; where y is a category, 0: by the number of names.
    """

    name: str
    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    caption: str = ""
    rules: Sequence[Rule] = ()
    height: int = 0

    def __post_init__(self) -> None:
        check_name(self.name)
        if not any(None not in point for series in self.series for point in zip(series.x, series.y, strict=True)):
            raise ValueError(f"figure {self.name!r}: no series has a value: leave the figure out, and say why in a note")
        for series in self.series:
            what = f"figure {self.name!r}, series {series.row!r}"
            self.x.check(series.x, what)
            self.y.check(series.y, what)
            for values in (series.low or (), series.high or ()):
                (self.x if self.lying else self.y).check(values, what)

    @property
    def lying(self) -> bool:
        """Whether numbers lie along x and names along y."""
        return self.y.scale == "category"

    @property
    def lines(self) -> bool:
        """Whether rows are told apart by dashes, too."""
        return any(series.row and series.mark in ("line", "step") for series in self.series)

    @property
    def rows(self) -> list[str]:
        """The names of the rows, each once, as they appear."""
        return list(dict.fromkeys(series.row for series in self.series if series.row))


@dataclass(frozen=True)
class HeatMap:
    """A number for each pair of names; None is an empty field.

    Args:
        values: a list for each name of `y`, with a number for each name of `x`.
        quantity: what the numbers are, for the scale of colours.
        scale: of the colours, linear or log.
        limits: lowest and highest number of the scale; None: from the data.
    """

    name: str
    title: str
    x: Sequence[str]
    y: Sequence[str]
    values: Sequence[Sequence[float | None]]
    quantity: str
    caption: str = ""
    x_title: str = ""
    y_title: str = ""
    format: str = ".3~g"
    scale: Literal["linear", "log"] = "linear"
    limits: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        if [len(line) for line in self.values] != [len(self.x)] * len(self.y) or not self.x or not self.y:
            raise ValueError(f"heat map {self.name!r}: expected {len(self.y)} lists of {len(self.x)} numbers, for the names")
        if len(set(self.x)) < len(self.x) or len(set(self.y)) < len(self.y):
            raise ValueError(f"heat map {self.name!r}: a name stands twice on one axis: give each its own")
        axis = Axis(self.quantity, self.scale)
        for name, line in zip(self.y, self.values, strict=True):
            axis.check(line, f"heat map {self.name!r}, {name!r}")
        object.__setattr__(self, "values", tuple(tuple(map(finite, line)) for line in self.values))

    @property
    def rows(self) -> list[str]:
        """A heat map has no rows that are switched."""
        return []


def finite(value: Value) -> Value:
    """The value; None for nan and infinities."""
    return None if isinstance(value, float | int) and not math.isfinite(value) else value


def check_name(name: str) -> None:
    """ValueError for a name that is no file name on every system."""
    if not name or not name.replace("_", "").replace("-", "").isalnum() or not name.isascii():
        raise ValueError(f"figure name {name!r}: expected letters, digits, _ and - only: it names files")
