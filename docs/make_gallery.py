"""Writes the tables of docs/fidelity_gallery.md from the outputs beside it: what lies between two marks is replaced."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from gradmaker import Fidelity

PAGE = Path(__file__).resolve().with_name("fidelity_gallery.md")
FOLDER = PAGE.with_suffix("")
TASKS = {"mnist": "MNIST", "tagger": "tagger", "shakespeare": "GPT", "cifar10": "ResNet-18"}
LEARNT = ("mnist", "tagger", "shakespeare")
"""The tasks of the mean: in the others the trainings are too short for any method to learn."""
MEASURES = {"error_scaled": "error", "cosine": "cosine", "quadratic": "quadratic decrease", "decrease": "loss decrease"}
SHOWN = {"Shampoo^2": "Shampoo²", "layer blocks": "the exact blocks of layers"}


def render() -> str:
    """The page with the tables of now."""
    text = PAGE.read_text(encoding="utf-8")
    for name, lines in tables().items():
        body = "\n".join([f"<!-- {name} -->", *lines, f"<!-- end {name} -->"])
        text = re.sub(rf"<!-- {name} -->.*?<!-- end {name} -->", lambda _, body=body: body, text, flags=re.DOTALL)
    return text


def tables() -> dict[str, list[str]]:
    """Lines of every table by its name."""
    known = [task for task in TASKS if (FOLDER / task / "fidelity.json").is_file()]
    learned = [task for task in known if (FOLDER / task / "learning.json").is_file()]
    found = {f"{task} fidelity": _fidelity(task) for task in known}
    found |= {f"{task} setting": [_setting(task)] for task in known}
    return found | {"ranks": _ranks(learned)}


@cache
def measured(task: str) -> Fidelity:
    """The measures of a task."""
    return Fidelity.from_json(FOLDER / task / "fidelity.json")


def learned_by(task: str) -> dict[str, Any]:
    """What the trainings of a task gave; nothing where there were none."""
    path = FOLDER / task / "learning.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _setting(task: str) -> str:
    result, told = measured(task), learned_by(task)
    s = result.setting
    seconds = told.get("processor seconds")
    cost = (
        f"{sum(seconds.values()):.0f} seconds of the processor{'' if 'measures' in seconds else ' for these'}, "
        if seconds
        else ""
    )
    runs = f"{s['parameters']} parameters in {len(result.layers)} layers, {s['runs']}; {s['how']}, {s['iterations']} iterations"
    trained = f"; trainings of {told['steps']} steps" if told else ""
    return f"{runs}{trained}; {cost}{s['device']}, torch {s['torch']}, Python {s['python']}."


def _fidelity(task: str) -> list[str]:
    result, ends = measured(task), learned_by(task).get("loss", {})
    last = result.steps[-1]
    best = result.mean("reference", "decrease", step=last)
    rows = []
    for label in (*result.labels, "layer blocks"):
        measure = "error" if label == "layer blocks" else "error_scaled"
        fall = result.mean(label, "decrease", step=last)
        share = f"{fall.value / best.value:.2f}" if fall and best else "–"
        cells = [*(_cell(result, label, measure, step) for step in result.steps), _within(result, label)]
        cosines = [_cell(result, label, "cosine", step) for step in (result.steps[0], last)]
        rows.append([SHOWN.get(label, label), *cells, *cosines, share, f"{ends[label]:.2f}" if label in ends else "–"])
    head = ["", *(f"error, step {k}" for k in result.steps), *(f"cosine, step {k}" for k in (result.steps[0], last))]
    head.insert(1 + len(result.steps), f"median of layers, step {last}")
    return _table([*head, f"loss decrease over exact, step {last}", "loss of a training"], rows)


def _within(result: Fidelity, label: str) -> str:
    """The median of the errors of single layers at the last step."""
    errors = [m.value for layer in result.layer_names if (m := result.mean(label, "error_scaled", layer))]
    return f"{median(errors):.2f}" if errors else "0"


def _cell(result: Fidelity, label: str, measure: str, step: int) -> str:
    mean = result.mean(label, measure, step=step)
    if mean is None:
        return "–"
    return f"{mean.value:.2f} ± {mean.error:.2f}" if mean.error >= 0.005 else f"{mean.value:.2f}"


def _ranks(tasks: Sequence[str]) -> list[str]:
    """Rank correlations with their exact p values, first and last step, and their means over the tasks."""
    found = {task: learned_by(task)["correlation"] for task in tasks}
    rows = []
    for measure, title in MEASURES.items():
        for place, when in ((0, "start"), (-1, "end")):
            each = [list(found[task].values())[place].get(measure) for task in tasks]
            rhos = [e["rho"] for e, task in zip(each, tasks, strict=True) if e and task in LEARNT]
            cells = [f"{e['rho']:+.2f} ({e['p']:.3f})" if e else "–" for e in each]
            rows.append([title, when, *cells, f"{sum(rhos) / len(rhos):+.2f}"])
    points = {e["points"] for task in tasks for e in next(iter(found[task].values())).values()}
    head = [
        f"{', '.join(map(str, sorted(points)))} approximations each",
        "measured at the",
        *(TASKS[t] for t in tasks),
        "mean without ResNet-18",
    ]
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
