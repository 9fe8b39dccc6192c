"""The files of a comparison: report.html, report.md, results.csv, results.json and the plots."""

import base64
import json
import math
import re
from pathlib import Path
from typing import Any

import jinja2
import pandas

from gradmaker.compare.cost import MEMORY_NOTE, REFERENCE, ROUNDS, is_reference
from gradmaker.compare.plots import SMOOTHING, write_plots
from gradmaker.compare.result import Comparison
from gradmaker.compare.row_result import SELECTION, RowResult, count
from gradmaker.compare.store import RESULTS, Store
from gradmaker.compare.trial import Record

PARTS = ("train", "validation", "test")
TEMPLATE = "report.html.j2"
CAPTIONS = {
    "loss_steps": "Loss of the mini-batches against steps.",
    "loss_time": "The same losses against training time, evaluation left out.",
    "test_steps": "On the test part at every evaluation; the axis does not start at zero.",
    "learning_rates": "On the validation part at the end, first seed.",
}


def write_report(comparison: Comparison, store: Store) -> None:
    """Write all files and set their paths in `comparison.files`."""
    out = comparison.out
    plots = write_plots(comparison)
    names = {"html": "report.html", "markdown": "report.md", "csv": "results.csv", "json": RESULTS}
    comparison.files = {**{kind: out / name for kind, name in names.items()}, **plots}
    pandas.DataFrame(comparison.table()).to_csv(comparison.files["csv"], index=False)
    comparison.files["trials"] = out / "trials.csv"
    pandas.DataFrame(comparison.trainings()).to_csv(comparison.files["trials"], index=False)
    comparison.files["markdown"].write_text(markdown(comparison), encoding="utf-8")
    comparison.files["html"].write_text(html(comparison, plots), encoding="utf-8")
    store.report = {
        "complete": comparison.complete,
        "facts": facts(comparison),
        "machine": comparison.machine,
        "rows": [{**result.summary(), "config": result.config} for result in comparison.measured],
        "verdict": comparison.verdict(),
    }
    store.write()


def markdown(comparison: Comparison) -> str:
    """report.md: summary table, overview figure, notes and settings."""
    headings = comparison.headings
    rows = [headings, ["---", *["---:"] * (len(headings) - 2), "---"], *(result.cells() for result in comparison.measured)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    listed = "\n".join(f"- {name}: {value}" for name, value in (facts(comparison) | comparison.machine).items())
    verdict = "\n".join(f"- {sentence}" for sentence in comparison.verdict())
    notes = "\n".join(f"- {note}" for note in notes_of(comparison))
    title = f"# {title_of(comparison)}"
    warning = [] if comparison.complete else ["**Interrupted: not all trials were run.**"]
    picture = "![loss against steps and time, test metric against steps](overview.png)"
    return "\n\n".join([title, *warning, table, *([verdict] if verdict else []), picture, "## How", notes, listed]) + "\n"


def html(comparison: Comparison, plots: dict[str, Path]) -> str:
    """report.html: one page with embedded figures."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(TEMPLATE).render(
        title=title_of(comparison),
        lead=", ".join(_sizes(comparison)),
        complete=comparison.complete,
        headings=comparison.headings,
        rows=[{"cells": result.cells(), "reference": is_reference(result.row)} for result in comparison.measured],
        figures=[(_embedded(plots[name]), CAPTIONS[name]) for name in CAPTIONS],
        notes=notes_of(comparison),
        facts=facts(comparison),
        machine=comparison.machine,
        configs=[(result.row.label, json.dumps(_configuration(result), indent=2)) for result in comparison.measured],
        trials=[trial for result in comparison.rows for trial in _trials(result)],
        model=comparison.model,
        command=shown_command(comparison.command),
    )


def title_of(comparison: Comparison) -> str:
    """The title of the report."""
    return f"Gradient preconditioning on {comparison.data['name']}"


def facts(comparison: Comparison) -> dict[str, Any]:
    """The settings that all rows share."""
    setting, data = comparison.setting, comparison.data
    return {
        "data": f"{data['name']}: {', '.join(f'{data[part]} {part}' for part in PARTS if data[part])}",
        "budget": setting.budget,
        "batch size": setting.batch_size,
        "learning-rate schedule": setting.schedule,
        "loss": setting.loss,
        "seeds": f"{len(comparison.seeds)} ({', '.join(map(str, comparison.seeds))})",
        "device": setting.device,
        "gradmaker": setting.version,
        **({"command": shown_command(comparison.command)} if comparison.command else {}),
    }


def shown_command(command: str) -> str:
    """The command line without folders of the machine."""
    return re.sub(r"(?<![\w.~])[~/][^\s'\"]*/(?=[^\s/])", "", command)


def notes_of(comparison: Comparison) -> list[str]:
    """Notes on how the numbers of table and figures were measured."""
    kind = comparison.setting.device.split(":")[0]
    reference = f"torch.optim.{REFERENCE.optimizer} with momentum {REFERENCE.options['momentum']:g}"
    return [
        f"Test values are mean \u00b1 sample standard deviation over {count(len(comparison.seeds), 'seed')}. In the figures "
        "lines are means over seeds, bands reach from the lowest to the highest, losses are running means over "
        f"1/{SMOOTHING} of the training.",
        "All rows start, for one seed, from the same parameters and see the same batches in the same order.",
        SELECTION,
        f"Step time is the median over up to {ROUNDS} rounds in one process; in each, a block of steps of the row stands "
        f"between two blocks of plain SGD ({reference}, no maker), long enough to hold the refreshes of the preconditioner. "
        "'steps x step time' is the number of steps of a training times that median: the load of the machine is not in it.",
        f"Memory: {MEMORY_NOTE.get(kind, 'not measured on this device')}.",
        "A training diverged when its loss was not finite, or when its mean over the last quarter before the last "
        "evaluation was more than a quarter above that of the first step; it is left out of means and figures and counted in "
        "the notes; (2/3) behind a value means that two of three seeds ended well.",
    ]


def _sizes(comparison: Comparison) -> list[str]:
    setting = comparison.setting
    counts = (len(comparison.measured), "method"), (len(comparison.seeds), "seed")
    return [*(count(number, noun) for number, noun in counts), setting.budget, f"batch size {setting.batch_size}"]


def _configuration(result: RowResult) -> dict[str, Any]:
    return {**result.config, "learning_rates": list(result.row.learning_rates), "selected": result.learning_rate}


def _trials(result: RowResult) -> list[list[str]]:
    """Table rows of all trainings of a row, each once."""
    return [_trial(r, result.metric) for r in result.trials]


def _trial(record: Record, metric: str) -> list[str]:
    """Cells of a training, in the order of the headings in the template."""
    loss, test_loss = (_last(record.end(part), ".4g") for part in ("train", "test"))
    scale, form, unit = (100, ".2f", " %") if metric == "accuracy" else (1, ".4g", "")
    validation, test = (_last(scale * record.end(part, metric), form, unit) for part in ("validation", "test"))
    rate = ", ".join([f"{record.learning_rate:g}", *(f"{name} {value}" for name, value in record.parameters.items())])
    return [record.label, rate, str(record.seed), record.status, loss, validation, test, test_loss, record.message]


def _last(value: float, form: str, unit: str = "") -> str:
    return "-" if math.isnan(value) else f"{value:{form}}{unit}"


def _embedded(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
