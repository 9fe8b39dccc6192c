"""Writes docs/which.md and docs/experiments.md, which say what was measured, from docs/site/*.md.j2 and committed numbers.

A number in them is a call of the template, as `result("mnist", "kfac")`: it cannot differ from the measurement.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import measured  # noqa: E402

TEMPLATES = ROOT / "docs" / "site"
PAGES = ("which", "experiments")


def experiment(name: str) -> measured.Experiment:
    """By its function in docs/measured.py."""
    return next(
        found for make, found in zip(measured.EXPERIMENTS, measured.experiments(), strict=True) if make.__name__ == name
    )


def result(name: str, row: str) -> str:
    """Mean and deviation of a row."""
    return measured.shown(experiment(name), row)


def average(name: str, row: str, digits: int = 2) -> str:
    """The mean alone."""
    return f"{fmean(experiment(name).values[row]):.{digits}f}"


def gap(name: str, row: str, other: str, digits: int = 2) -> str:
    """The difference of two means, with its sign."""
    values = experiment(name).values
    return f"{fmean(values[row]) - fmean(values[other]):+.{digits}f}"


def apart(name: str, row: str, other: str, digits: int = 2) -> str:
    """The same without a sign."""
    return gap(name, row, other, digits)[1:]


def seconds_to_adamw(row: str) -> str:
    """Seconds until the mean validation loss of the small GPT is not above AdamW's last one; those of AdamW for itself."""
    final = [t for t in measured.load(measured.DATA / "char_gpt.json")["trainings"] if t["phase"] == "final"]

    def points(name: str) -> list[tuple[float, float]]:
        curves = [t["curve"] for t in final if t["row"] == name]
        return [(fmean(p[1] for p in at), fmean(p[2] for p in at)) for at in zip(*curves, strict=True)]

    goal = points("adamw")[-1][1]
    return f"{next(seconds for seconds, loss in points(row) if loss <= goal):.0f}"


def step_time(name: str, row: str, other: str | None = None) -> str:
    """Time of a step over that of another row, by default the first baseline."""
    times = experiment(name).times
    return f"{times[row] / times[other or experiment(name).baselines[0]]:.2f}"


def results(name: str) -> str:
    """The table of an experiment; without times where all had the same."""
    found = experiment(name)
    head = ["row", found.measure, *([f"time of a step / {found.baselines[0]}"] if found.times else [])]
    rows = [[row, measured.shown(found, row), *([measured.time_of(found, row)] if found.times else [])] for row in found.values]
    return measured.table(head, rows)


def compared(file: str) -> str:
    """The table of a file that `compare` wrote."""
    head = ["row", "learning rate", "test accuracy, %", "time of a step / SGD", "memory / SGD"]
    rows = measured.load(measured.DATA / f"{file}.json")["report"]["rows"]
    cells = [
        [
            row["method"],
            f"{row['learning_rate']:g}",
            f"{100 * row['test_accuracy']:.2f} ± {100 * row['test_accuracy_std']:.2f}",
            f"{row['step_ratio']:.2f}",
            f"{row['memory_ratio']:.2f}",
        ]
        for row in rows
    ]
    return measured.table(head, cells)


def cost(method: str, kind: str, workload: str = "mlp512") -> str:
    """Time of a kind of step over that of SGD, or memory; `+stat` is `stat`."""
    cell = measured.load(measured.BENCHMARKS / "peers.json")["cells"][f"{workload}/{method}"]
    return f"{cell['memory']:.2f}" if kind == "memory" else measured.ratio(cell, kind)


def large(method: str, what: str) -> str:
    """`ratio` or `memory` of the preset for large models on GPT-2 small, over AdamW's."""
    found = measured.large(method)
    if found is None:
        raise KeyError(method)
    return f"{found[what]:.2f}"


def machine(file: str) -> str:
    """Where and when something was measured."""
    saved = json.loads((measured.DATA / f"{file}.json").read_text(encoding="utf-8"))
    facts = saved.get("machine") or saved.get("facts") or saved["report"]["machine"]
    return f"{facts['processor']}, torch {facts['torch']}, {facts['date']}"


def render(name: str) -> str:
    """A page."""
    known: dict[str, Any] = {
        f.__name__: f
        for f in (result, average, gap, apart, seconds_to_adamw, step_time, results, compared, cost, large, machine)
    }
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    return environment.get_template(f"{name}.md.j2").render(known)


def target(name: str) -> Path:
    """The file of a page."""
    return ROOT / "docs" / f"{name}.md"


if __name__ == "__main__":
    for page in PAGES:
        target(page).write_text(render(page), encoding="utf-8")
