"""`gradmaker show`: a report written again from its JSON, and two merged."""

import json
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

import typer

from gradmaker.commands.options import Out
from gradmaker.compare.comparison import write as write_comparison
from gradmaker.compare.errors import InputError
from gradmaker.compare.result import Comparison
from gradmaker.compare.store import RESULTS
from gradmaker.fidelity.result import Fidelity
from gradmaker.step_costs.pages import write as write_costs
from gradmaker.step_costs.study import JSON as COST, read as read_costs

__all__ = ["show"]

FIDELITY = "fidelity.json"
NAMES = (RESULTS, COST, FIDELITY)
"""Files of a report's folder that it can be written from."""


def show(
    paths: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Folders of reports, or their JSON files.")],
    out: Out = None,
) -> None:
    """Write a report again from its JSON, without a measurement; of several, one report of the rows of all.

    Without --out, one report is written where it lies; several are written to runs/merged. Comparisons are merged if they share
    task, model, budget, batch size and machine; costs if they share machine and intervals, fidelities (of other
    batches, seeds or steps) if they share reference, layers and approximations.

    \b
    gradmaker show runs/digits
    gradmaker show runs/mine runs/theirs --out runs/both
    """  # noqa: D301 - the \b keeps the lines of the paragraph apart
    files = [_file(path) for path in paths]
    kinds = [_kind(file) for file in files]
    if len(set(kinds)) > 1:
        raise InputError(f"{str(files[0])!r} is {kinds[0]} and another is not: merge reports of one kind")
    folder = out or (files[0].parent if len(files) == 1 else Path("runs") / "merged")
    written = WRITERS[kinds[0]](files, folder)
    typer.echo(f"report: {written}")


def _file(path: Path) -> Path:
    """The JSON file of a folder. InputError where there is none."""
    if not path.is_dir():
        return path
    found = [path / name for name in NAMES if (path / name).is_file()]
    if not found:
        raise InputError(f"{str(path)!r} has no {' or '.join(NAMES)}: is it the folder of a report?")
    return found[0]


def _kind(path: Path) -> str:
    """Which command wrote a file. InputError for others."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except ValueError:
        content = None
    for key, kind in KEYS.items():
        if isinstance(content, dict) and key in content:
            return kind
    raise InputError(f"{str(path)!r} is no report of gradmaker: expected one of {', '.join(NAMES)}")


def _comparison(files: Sequence[Path], out: Path) -> Path:
    first, *others = (Comparison.from_json(file) for file in files)
    made = first.merge(*others) if others else first
    made.out = out.resolve()
    write_comparison(made)
    return out / "report.html"


def _cost(files: Sequence[Path], out: Path) -> Path:
    first, *others = (read_costs(file) for file in files)
    return write_costs(reduce(lambda one, two: one.merged(two), others, first), out)["markdown"]


def _fidelity(files: Sequence[Path], out: Path) -> Path:
    first, *others = (Fidelity.from_json(file) for file in files)
    try:
        return first.joined(others).write(out)["html"]
    except ValueError as error:
        raise InputError(str(error)) from error


KEYS = {"trials": "a comparison", "cells": "costs", "coupling": "a fidelity"}
"""What the JSON files of each kind alone have."""
WRITERS: dict[str, Callable[[Sequence[Path], Path], Path]] = {
    "a comparison": _comparison,
    "costs": _cost,
    "a fidelity": _fidelity,
}
