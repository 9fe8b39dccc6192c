"""Documents as data: what is refused, what is written, JSON and back; the colours of rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import pytest

from gradmaker.reporting import Axis, Column, Document, Figure, HeatMap, Rule, Section, Series, Table
from gradmaker.reporting.palette import DARK, LIGHT, PAPER, pattern
from tests.reporting.sample import ROWS, document, summary

LOG = Axis("loss", "log")
NAMES = Axis("method", "category")


def figure(series: Series, x: Axis | None = None, y: Axis | None = None, name: str = "f") -> Figure:
    return Figure(name, "F", x or Axis("step"), y or Axis("loss"), [series])


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "lengths": (lambda: Series("a", [1, 2], [1]), r"series 'a': values of unequal lengths \{'x': 2, 'y': 1\}"),
    "lengths of details": (lambda: Series("a", [1], [1], details={"rate": []}), "unequal lengths"),
    "half a band": (lambda: Series("a", [1], [1], low=[0]), "low and high belong together"),
    "mark": (lambda: Series("a", [1], [1], mark="pie"), "mark='pie': legal are line, step, points, bars"),  # type: ignore[arg-type]
    "scale": (lambda: Axis("a", "sqrt"), "scale='sqrt': legal are linear, log, category"),  # type: ignore[arg-type]
    "zero on a log axis": (lambda: figure(Series("a", [1], [0.0]), y=LOG), "0.0 on the log axis 'loss': leave it out"),
    "band below zero on a log axis": (lambda: figure(Series("a", [1], [1], [-1], [1]), y=LOG), "-1 on the log axis"),
    "a name on an axis of numbers": (lambda: figure(Series("a", ["x"], [1])), "'x' on the axis 'step', which has numbers"),
    "a number on an axis of names": (lambda: figure(Series("a", [1], [1]), y=NAMES), "1 on the axis 'method', which has names"),
    "nothing to draw": (lambda: figure(Series("a", [1, 2], [math.nan, None])), "no series has a value"),
    "name of a file": (lambda: figure(Series("a", [1], [1]), name="a/b"), "expected letters, digits, _ and - only"),
    "heat map": (lambda: HeatMap("h", "H", ["a"], ["b", "c"], [[1.0]], "error"), "expected 2 lists of 1 numbers"),
    "names of a heat map": (lambda: HeatMap("h", "H", ["a", "a"], ["b"], [[1.0, 2.0]], "error"), "a name stands twice"),
    "log heat map": (lambda: HeatMap("h", "H", ["a"], ["b"], [[0.0]], "error", scale="log"), "0.0 on the log axis 'error'"),
    "kind": (lambda: Column("a", kind="date"), "kind='date': legal are row, text, number"),  # type: ignore[arg-type]
    "text for a number": (lambda: Table("t", "T", [Column("a")], [{"a": "1"}]), "'1' is not a number"),
    "a number for text": (lambda: Table("t", "T", [Column("a", kind="text")], [{"a": 1}]), "1 is not text"),
    "format": (lambda: Table("t", "T", [Column("a", format="d")], [{"a": 1.5}]), "format='d' does not write"),
    "column": (lambda: Table("t", "T", [Column("a")], [{"b": 1}]), "b: legal are a"),
    "answer": (lambda: Document("D", [], []), "no answer"),
    "names": (lambda: Document("D", ["a"], [Section("S", [summary(), summary()])]), "summary: more than one table or figure"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_shown_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("column", "row", "text"),
    [
        (Column("a"), {"a": 0.123456}, "0.1235"),
        (Column("a"), {"a": 123456}, "123,456"),
        (Column("a"), {"a": 123456.7}, "123,457"),
        (Column("a"), {}, "–"),
        (Column("a"), {"a": math.nan}, "–"),
        (Column("a"), {"a": math.inf}, "–"),
        (Column("a", format=".1f", unit="dB"), {"a": 3}, "3.0 dB"),
        (Column("a", kind="percent"), {"a": 0.975}, "97.5 %"),
        (Column("a", kind="percent", format=".2f", spread="s"), {"a": 0.975, "s": 0.002}, "97.50 ± 0.20 %"),
        (Column("a", kind="percent", spread="s"), {"a": 0.975, "s": None}, "97.5 %"),
        (Column("a", kind="seconds"), {"a": 0.0034}, "3.4 ms"),
        (Column("a", kind="seconds"), {"a": 7200}, "2 h"),
        (Column("a", kind="seconds", spread="s"), {"a": 2.0, "s": 0.5}, "2 ± 0.5 s"),
        (Column("a", kind="seconds"), {"a": 0.0}, "0 µs"),
        (Column("a", kind="bytes"), {"a": 3 * 2**20}, "3 MiB"),
        (Column("a", kind="text"), {"a": "b"}, "b"),
    ],
)
def test_values_as_they_are_written(column: Column, row: dict[str, float | str | None], text: str) -> None:
    table = Table("t", "T", [column], [row])
    assert column.text(table.rows[0]) == text


def test_the_best_value() -> None:
    table = summary()
    accuracy, time = table.columns[1], table.columns[2]
    assert table.best(accuracy) == pytest.approx(0.976) and table.best(time) == 1e-3
    assert table.best(table.columns[3]) is None
    assert replace(table, rows=table.rows[:1]).best(accuracy) is None


def test_json_and_back() -> None:
    made = document()
    text = made.to_json()
    again = Document.from_json(text)
    assert again.to_json() == text and again.slots() == made.slots()
    assert [type(block) for block in again.blocks] == [type(block) for block in made.blocks]
    assert again.figures[1].rules == (Rule(0.95, "target"), Rule(2.0, "twice", "x"))  # type: ignore[union-attr]
    assert "NaN" not in text and "Infinity" not in text


def test_json_of_something_else() -> None:
    text = document().to_json()
    with pytest.raises(ValueError, match="format=2: this version reads format 1"):
        Document.from_json(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="format=None"):
        Document.from_json("[]")
    with pytest.raises(ValueError, match="expected a Document, found Text"):
        Document.from_json(json.dumps({"format": 1, "$type": "Text", "paragraphs": []}))
    with pytest.raises(ValueError, match="'Poem': no part of a document"):
        Document.from_json(json.dumps({"format": 1, "$type": "Poem"}))


def test_a_row_has_one_colour() -> None:
    slots = document().slots()
    assert list(slots)[:20] == ROWS and list(slots.values()) == list(range(22))


# --- colours --------------------------------------------------------------------------------------------------------------
def linear(colour: str) -> list[float]:
    values = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    return [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]


def oklab(colour: str) -> list[float]:
    """Ottosson, "A perceptual color space for image processing", 2020."""
    r, g, b = linear(colour)
    long, medium, short = (
        math.cbrt(0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b),
        math.cbrt(0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b),
        math.cbrt(0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b),
    )
    return [
        0.2104542553 * long + 0.7936177850 * medium - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * medium + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * medium - 0.8086757660 * short,
    ]


def contrast(one: str, other: str) -> float:
    """WCAG 2.1."""
    lights = sorted(sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear(c), strict=True)) for c in (one, other))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


@pytest.mark.parametrize(("colours", "paper"), [(LIGHT, PAPER[0]), (DARK, PAPER[1])])
def test_twenty_colours_are_told_apart(colours: tuple[str, ...], paper: str) -> None:
    """From each other, 0.02 being just noticeable in OKLab, and from the paper, as WCAG asks of graphics."""
    assert len(set(colours)) == 20
    assert min(math.dist(oklab(one), oklab(other)) for one, other in combinations(colours, 2)) > 0.1
    assert min(contrast(colour, paper) for colour in colours) > 2.95


def test_dashes_besides() -> None:
    assert [pattern(slot) for slot in (0, 6, 7, 19)] == [[], [], [6, 3], [2, 2]]
