"""Tables as data: typed columns, rows of values, and how values are written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gradmaker.reporting.figure import Value, finite

Best = Literal["", "low", "high"]
Kind = Literal["row", "text", "number", "percent", "seconds", "bytes"]
KINDS = ("row", "text", "number", "percent", "seconds", "bytes")
SECONDS = ((3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
BYTES = ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))
ABSENT = "–"


@dataclass(frozen=True)
class Column:
    """A column of a table: which value of a row it shows, and how it is written.

    Args:
        key: where its values stand in the rows.
        title: heading; empty: the key.
        kind: row (its name, in its colour), text, number, percent (of a share: 0.975 is written 97.5 %), seconds or bytes (with
            the unit that fits). All but row and text sort by number.
        format: Python's format of the number; empty: that of the kind.
        unit: written behind a number.
        spread: key of a deviation in the same unit, written behind ±.
        best: whether the lowest or the highest value is marked; empty: none.
        help: what the column is, shown at its heading and below the table.
    """

    key: str
    title: str = ""
    kind: Kind = "number"
    format: str = ""
    unit: str = ""
    spread: str = ""
    best: Best = ""
    help: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"column {self.key!r}: kind={self.kind!r}: legal are {', '.join(KINDS)}")

    @property
    def numeric(self) -> bool:
        """Whether values are numbers, which stand at the right and sort by size."""
        return self.kind not in ("row", "text")

    def text(self, row: Mapping[str, Value]) -> str:
        """The value of a row as it is written. ValueError for one of another kind."""
        value = row.get(self.key)
        if value is None:
            return ABSENT
        if isinstance(value, str) == self.numeric:
            wanted = "a number" if self.numeric else "text"
            raise ValueError(f"column {self.key!r} (kind={self.kind!r}): {value!r} is not {wanted}")
        if isinstance(value, str):
            return value
        return self._number(value, row.get(self.spread) if self.spread else None)

    def _number(self, value: float, spread: Value) -> str:
        scale, unit, form = _form(self.kind, value)
        form, unit = self.format or form, self.unit or unit
        numbers = [number for number in (value, spread) if isinstance(number, float | int)]
        try:
            written = [f"{number if scale == 1.0 else number / scale:{form}}" for number in numbers]
        except ValueError:
            raise ValueError(f"column {self.key!r}: format={form!r} does not write {numbers}") from None
        return " ± ".join(written) + (f" {unit}" if unit else "")


@dataclass(frozen=True)
class Table:
    """Rows of values under typed columns; it sorts by a click on a heading and filters by text.

    Args:
        name: unique in a document.
        rows: values by the keys of the columns; None, no such key, and numbers that are not finite are written as a dash.
        marked: names of rows (in the column of kind row) that are references, on a tinted ground.
        collapsed: shown after a click on its title.
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Value]]
    caption: str = ""
    marked: Sequence[str] = ()
    collapsed: bool = False

    def __post_init__(self) -> None:
        rows = tuple({key: finite(value) for key, value in row.items()} for row in self.rows)
        object.__setattr__(self, "rows", rows)
        known = {key for column in self.columns for key in (column.key, column.spread) if key}
        for row in rows:
            if unknown := row.keys() - known:
                raise ValueError(f"table {self.name!r}: {', '.join(sorted(unknown))}: legal are {', '.join(sorted(known))}")
            for column in self.columns:
                column.text(row)

    def best(self, column: Column) -> float | None:
        """The value to mark in a column of at least two numbers."""
        values = [v for row in self.rows if isinstance(v := row.get(column.key), float | int)]
        if not column.best or len(values) < 2:
            return None
        return min(values) if column.best == "low" else max(values)


def _form(kind: Kind, value: float) -> tuple[float, str, str]:
    """Scale, unit and format of a value by its kind."""
    if kind == "percent":
        return 0.01, "%", ".1f"
    units = {"seconds": SECONDS, "bytes": BYTES}.get(kind)
    if units is None:
        return 1.0, "", ",d" if isinstance(value, int) else ",.0f" if 1e4 <= abs(value) < 1e9 else ".4g"
    scale, unit = next(((scale, unit) for scale, unit in units if abs(value) >= scale), units[-1])
    return scale, unit, ".3g"
