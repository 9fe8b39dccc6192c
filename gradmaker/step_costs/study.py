"""A study of costs: rows x subjects x batch sizes, with its files."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradmaker.compare.cost import machine
from gradmaker.compare.errors import InputError
from gradmaker.compare.rows import Row
from gradmaker.step_costs.cell import Cell, How, measured
from gradmaker.step_costs.subjects import Subject
from gradmaker.version import __version__

__all__ = ["JSON", "Costs", "read", "study"]

FORMAT = 1
JSON = "cost.json"


@dataclass
class Costs:
    """The cells of a study, and how they were measured."""

    machine: dict[str, Any]
    setting: dict[str, Any]
    cells: list[Cell] = field(default_factory=list)

    @property
    def rows(self) -> list[str]:
        """Labels of rows, in their order."""
        return list(dict.fromkeys(cell.row for cell in self.cells))

    @property
    def subjects(self) -> list[str]:
        """Labels of subjects, in their order."""
        return list(dict.fromkeys(cell.subject for cell in self.cells))

    @property
    def intervals(self) -> list[str]:
        """Intervals of measurements and refreshes, as in the cells."""
        return list(dict.fromkeys(T for cell in self.cells for T in cell.ms))

    def of(self, subject: str, row: str) -> list[Cell]:
        """The cells of a row that were measured, by batch size."""
        found = [c for c in self.cells if (c.subject, c.row, c.status) == (subject, row, "measured")]
        return sorted(found, key=lambda cell: cell.batch_size)

    def write(self, out: Path) -> None:
        """Write the JSON file, atomically."""
        content = {
            "format": FORMAT,
            "machine": self.machine,
            "setting": self.setting,
            "cells": [cell.as_dict() for cell in self.cells],
        }
        fresh = out / f"{JSON}.new"
        fresh.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(fresh, out / JSON)

    def merged(self, other: "Costs") -> "Costs":
        """The cells of both; those of `self` go before. InputError for two machines or settings, whose times differ."""
        if (ours := _comparable(self)) != (theirs := _comparable(other)):
            raise InputError(f"the two are not comparable: {ours} and {theirs}")
        known = {_key(cell) for cell in self.cells}
        return Costs(self.machine, self.setting, [*self.cells, *(cell for cell in other.cells if _key(cell) not in known)])


def _key(cell: Cell) -> tuple[str, str, int]:
    return cell.subject, cell.row, cell.batch_size


def _comparable(costs: Costs) -> dict[str, Any]:
    return {**costs.machine, "date": "", **costs.setting, "rows": {}}


def read(path: Path) -> Costs:
    """The study of a JSON file. InputError for any other file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] == FORMAT and "cells" in content:
            return Costs(content["machine"], content["setting"], [Cell.from_dict(cell) for cell in content["cells"]])
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{str(path)!r} is no costs of this version")


def study(
    rows: Sequence[Row],
    subjects: Sequence[Subject],
    sizes: Sequence[int],
    how: How,
    out: Path,
    on_cell: Callable[[Cell], None] = lambda cell: None,
) -> Costs:
    """Measure all rows on all subjects at all batch sizes; cells that the folder has of the same rows and setting are kept."""
    setting = {"gradmaker": __version__, "device": how.device, "intervals": list(how.intervals), "floors": how.floors}
    configs = {row.label: row.describe() for row in rows}
    costs = Costs(machine(how.device), {**setting, "rows": configs})
    known = _known(out, costs)
    out.mkdir(parents=True, exist_ok=True)
    for subject, size, row in _cells(rows, subjects, sizes):
        cell = known.get((subject.label, row.label, size))
        if cell is None or cell.status != "measured":
            cell = measured(row, subject, size, how)
        costs.cells.append(cell)
        costs.write(out)
        on_cell(cell)
    return costs


def _cells(rows: Sequence[Row], subjects: Sequence[Subject], sizes: Sequence[int]) -> Iterator[tuple[Subject, int, Row]]:
    return ((subject, size, row) for subject in subjects for size in sizes for row in rows)


def _known(out: Path, costs: Costs) -> dict[tuple[str, str, int], Cell]:
    """Cells of the folder that were measured in the same way, of rows that are the same."""
    if not (out / JSON).exists():
        return {}
    before = read(out / JSON)
    if _comparable(before) != _comparable(costs):
        return {}
    same = {label for label, config in costs.setting["rows"].items() if before.setting["rows"].get(label) == config}
    return {_key(cell): cell for cell in before.cells if cell.row in same}
