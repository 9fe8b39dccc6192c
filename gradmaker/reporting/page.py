"""The HTML page of a document: one file with its data, scripts and style, which reads nothing from the network."""

import base64
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import groupby
from typing import Any

from gradmaker.reporting.document import Block, Document
from gradmaker.reporting.extra import require_extra
from gradmaker.reporting.figure import Figure, HeatMap, Value
from gradmaker.reporting.look import PAGE
from gradmaker.reporting.palette import DARK, LIGHT, pattern
from gradmaker.reporting.table import Column, Table
from gradmaker.reporting.vega import VERSION, spec
from gradmaker.version import __version__

PACKAGE = "gradmaker.reporting"
LONG = 24  # letters of a text from which on it is broken into lines


@dataclass(frozen=True)
class Cell:
    """A cell as the template writes it."""

    text: str
    classes: str
    order: Value  # what it sorts by; None: its text
    slot: int | None


@dataclass(frozen=True)
class Row:
    """A row of cells."""

    cells: Sequence[Cell]
    marked: bool


def html(document: Document) -> str:
    """The page. ImportError where the extra is not installed."""
    require_extra()
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    slots = document.slots()
    return environment.get_template("page.html.j2").render(
        document=document,
        version=__version__,
        slots=slots,
        colours=list(zip(LIGHT, DARK, strict=True)),
        css=_source("page.css"),
        script=_source("page.js"),
        grouped=grouped,
        rows_of=lambda table: list(rows_of(table, slots)),
        dashes=lambda slot: " ".join(map(str, pattern(slot))),
        specs={figure.name: _embedded(spec(figure, slots, PAGE)) for figure in document.figures},
        bundles=bundles(document),
    )


def grouped(blocks: Iterable[Block]) -> list[tuple[str, list[Block]]]:
    """Neighbouring blocks of one kind; figures and heat maps are one kind."""
    kinds = groupby(blocks, lambda block: "figures" if isinstance(block, Figure | HeatMap) else type(block).__name__)
    return [(kind, list(members)) for kind, members in kinds]


def rows_of(table: Table, slots: Mapping[str, int]) -> Iterator[Row]:
    """The rows of a table as they are written."""
    best = {column.key: table.best(column) for column in table.columns}
    names = [column.key for column in table.columns if column.kind == "row"]
    for row in table.rows:
        cells = [_cell(column, row, best[column.key], slots) for column in table.columns]
        yield Row(cells, any(row.get(name) in table.marked for name in names))


def _cell(column: Column, row: Mapping[str, Value], best: float | None, slots: Mapping[str, int]) -> Cell:
    value = row.get(column.key)
    kind = "number" if column.numeric else column.kind
    is_best = best is not None and value == best
    slot = slots.get(str(value)) if column.kind == "row" else None
    order = ("" if value is None else value) if column.numeric else None
    text = column.text(row)
    looks = [kind, *(["best"] if is_best else []), *(["long"] if kind == "text" and len(text) > LONG else [])]
    return Cell(text, " ".join(looks), order, slot)


def bundles(document: Document) -> dict[str, str]:
    """The scripts that the document needs: Vega-Embed for figures, DataTables for tables; gzip, base64."""
    tables = any(isinstance(block, Table) for block in document.blocks)
    wanted = {"figures": bool(document.figures), "tables": tables}
    return {name: _bundle(name) for name, needed in wanted.items() if needed}


@cache
def _bundle(name: str) -> str:
    import vl_convert

    made = {
        "figures": lambda: vl_convert.javascript_bundle(snippet="window.vegaEmbed = vegaEmbed;", vl_version=VERSION),
        "tables": lambda: (files("itables") / "html" / "dt_bundle.js").read_text(encoding="utf-8"),
    }
    return base64.b64encode(gzip.compress(made[name]().encode(), 9, mtime=0)).decode("ascii")


def _source(name: str) -> str:
    return (files(PACKAGE) / name).read_text(encoding="utf-8")


def _embedded(value: Any) -> str:
    """JSON that may stand in a script element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
