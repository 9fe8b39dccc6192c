"""Writes docs/data/autoencoder.md's tables and picture from docs/data/autoencoder.json, after taking in new trainings if asked.

python docs/make_autoencoder.py                               what lies between two marks of the page is replaced
python docs/make_autoencoder.py --take runs/autoencoder       first put what examples/mnist_autoencoder.py has saved there
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise, takewhile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

PAGE = Path(__file__).resolve().parent / "data" / "autoencoder.md"
SAVED = PAGE.with_suffix(".json")
PICTURE = PAGE.parents[1] / "images" / "autoencoder.png"
SEARCH = 0  # the seed that chose the settings
SECONDS, STEPS, ERROR, LOSS = range(4)  # of a point of a curve

Trial = dict[str, Any]


# ------------------------------------------------------------------ trainings
def take(folder: Path) -> dict[str, Any]:
    """What the experiment has saved, with five digits."""
    saved: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for trial in saved["trials"]:
        trial["curve"] = [[_digits(x) for x in point] for point in trial["curve"]]
        for key in ("seconds", "epochs", "test"):
            trial[key] = _digits(trial[key])
    return saved


def _digits(value: float) -> float | int | None:
    if isinstance(value, int):
        return value
    return float(f"{value:.5g}") if value is not None and math.isfinite(value) else None


def final(trial: Trial) -> float:
    """The training error at the limit; infinite where the training diverged."""
    error = trial["curve"][-1][ERROR]
    return math.inf if error is None else float(error)


def of_row(saved: dict[str, Any], row: str) -> tuple[list[Trial], list[Trial]]:
    """Trainings of the search, the best first, and those of the best settings with fresh seeds."""
    own = [t for t in saved["trials"] if t["row"] == row]
    search = sorted((t for t in own if t["seed"] == SEARCH), key=final)
    return search, [t for t in own if t["seed"] != SEARCH and t["config"] == search[0]["config"]]


def rows_of(saved: dict[str, Any]) -> dict[str, list[Trial]]:
    """Fresh trainings by row, in the order in which rows were first trained."""
    return {row: of_row(saved, row)[1] for row in dict.fromkeys(t["row"] for t in saved["trials"])}


def is_baseline(found: Sequence[Trial]) -> bool:
    """Whether a row is torch's optimizer on the plain gradient."""
    return "method" not in found[0]["config"]


def goal(saved: dict[str, Any]) -> float:
    """The lowest error of a baseline, as a mean over seeds."""
    return min(mean(map(final, found)) for found in rows_of(saved).values() if is_baseline(found))


def mean_curve(found: Sequence[Trial]) -> list[list[float]]:
    """Means over seeds, point by point, up to where the first training diverged."""
    points = takewhile(lambda at: all(None not in p for p in at), zip(*(t["curve"] for t in found), strict=False))
    return [[mean(p[k] for p in at) for k in range(4)] for at in points]


def reached(found: Sequence[Trial], error: float) -> float | None:
    """Seconds until the mean curve is at an error, straight between two evaluations."""
    for before, after in pairwise(mean_curve(found)):
        if after[ERROR] <= error:
            share = (before[ERROR] - error) / (before[ERROR] - after[ERROR])
            return before[SECONDS] + share * (after[SECONDS] - before[SECONDS])
    return None


# ------------------------------------------------------------------ tables
def results(saved: dict[str, Any]) -> list[str]:
    """A line for each row, the best first."""
    head = ["method", "training error", "test error", "cross-entropy", "steps", "epochs", "ms a step", "s to the goal"]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    target = goal(saved)
    for row, found in sorted(rows_of(saved).items(), key=lambda item: mean(map(final, item[1]))):
        each = 1e3 * sum(t["seconds"] for t in found) / sum(t["steps"] for t in found)
        when = reached(found, target)
        cells = [
            row,
            _spread(map(final, found)),
            _spread(t["test"] for t in found),
            _spread(t["curve"][-1][LOSS] for t in found),
        ]
        cells += [f"{mean(t['steps'] for t in found):.0f}", f"{mean(t['epochs'] for t in found):.1f}", f"{each:.1f}"]
        lines.append(f"| {' | '.join([*cells, '-' if when is None else f'{when:.0f}'])} |")
    return [*lines, "", f"The goal is the error of the better of the tuned baselines, {target:.2f}."]


def _spread(values: Iterable[float]) -> str:
    several = list(values)
    return f"{mean(several):.2f}" + (f" ± {stdev(several):.2f}" if len(several) > 1 else "")


def settings(saved: dict[str, Any]) -> list[str]:
    """A line for each setting that was tried, the best of a row first."""
    lines = ["| method | settings | training error |", "| --- | --- | ---: |"]
    for row in rows_of(saved):
        for trial in of_row(saved, row)[0]:
            error = "diverged" if math.isinf(final(trial)) else f"{final(trial):.2f}"
            lines.append(f"| {row} | {describe(trial['config'])} | {error} |")
    return lines


def describe(config: dict[str, Any]) -> str:
    """The settings of a training in a line."""
    parts = {"batch": config["batch"], "lr": config["lr"], **config.get("method", {}), **config["optimizer"][1]}
    if "clip" in config:
        parts["clip"] = config["clip"]
    shown = {k: v for k, v in parts.items() if k not in ("method", "clip_learning_rate", "nesterov")}
    return ", ".join(f"{k} {v}" for k, v in shown.items())


def circumstances(saved: dict[str, Any]) -> list[str]:
    """What the trainings had in common, and where they ran."""
    return [f"- {key}: {value}" for key, value in {**saved["settings"], **saved["machine"]}.items()]


def render(page: str, saved: dict[str, Any]) -> str:
    """The page with the tables of these trainings."""
    for name, part in (("results", results), ("search", settings), ("settings", circumstances)):
        body = "\n".join([f"<!-- {name} -->", *part(saved), f"<!-- end {name} -->"])
        page = re.sub(rf"<!-- {name} -->.*?<!-- end {name} -->", lambda _, body=body: body, page, flags=re.DOTALL)
    return page


# ------------------------------------------------------------------ picture
def draw(saved: dict[str, Any], path: Path) -> None:
    """Training error against time and against epochs: means over seeds, bands from the lowest to the highest."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    from gradmaker.reporting.palette import LIGHT, STYLE

    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 2, sharey=True)
        for (row, found), colour in zip(rows_of(saved).items(), LIGHT, strict=False):
            dash = "--" if is_baseline(found) else "-"
            for axes, across in zip(panels, (_seconds, _epochs), strict=True):
                _line(axes, found, [across(p, found[0], saved) for p in mean_curve(found)], color=colour, ls=dash, label=row)
        panels[0].set(xlabel="CPU seconds", yscale="log", title="Squared error of a training image")
        panels[1].set(xlabel="epochs", xscale="log", title="The same, by epochs")
        panels[0].legend()
        panels[0].yaxis.set_major_locator(FixedLocator([1, 2, 3, 5, 10, 20, 30, 50]))
        panels[0].yaxis.set_major_formatter("{x:g}")
        panels[0].yaxis.set_minor_locator(NullLocator())
        panels[1].xaxis.set_major_formatter("{x:g}")
        figure.savefig(path, dpi=130)


def _seconds(point: Sequence[float], trial: Trial, saved: dict[str, Any]) -> float:
    return point[SECONDS]


def _epochs(point: Sequence[float], trial: Trial, saved: dict[str, Any]) -> float:
    return point[STEPS] * trial["config"]["batch"] / saved["settings"]["images"]


def _line(axes: Any, found: Sequence[Trial], across: list[float], **look: Any) -> None:
    errors = list(zip(*([p[ERROR] for p in t["curve"]] for t in found), strict=False))[1 : len(across)]
    axes.plot(across[1:], [mean(at) for at in errors], **look)
    axes.fill_between(across[1:], [min(at) for at in errors], [max(at) for at in errors], color=look["color"], alpha=0.15, lw=0)


def main() -> None:
    """Take in, then write page and picture."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--take", type=Path, help="folder with a results.json of examples/mnist_autoencoder.py")
    given = options.parse_args()
    if given.take is not None:
        SAVED.write_text(json.dumps(take(given.take), allow_nan=False) + "\n", encoding="utf-8")
    saved = json.loads(SAVED.read_text(encoding="utf-8"))
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), saved), encoding="utf-8")
    draw(saved, PICTURE)


if __name__ == "__main__":
    main()
