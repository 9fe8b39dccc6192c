"""The report of a comparison as a document, and its files."""

import json
import re
from collections.abc import Iterable
from typing import Any

import pandas

from gradmaker.compare.answer import rival, written
from gradmaker.compare.cost import MEMORY_NOTE, REFERENCE, ROUNDS, is_reference
from gradmaker.compare.curves import SMOOTHING, front, loss_curves, metric_curves, search_figure, sensitivity
from gradmaker.compare.result import Comparison
from gradmaker.compare.row_result import SELECTION, RowResult, count
from gradmaker.compare.store import RESULTS, Store
from gradmaker.compare.trial import Record
from gradmaker.reporting import Best, Block, Column, Document, Facts, Figure, Section, Table, write, write_picture

OVERVIEW = ("loss_steps", "loss_seconds", "metric_steps")  # figures of overview.png
PARTS = ("train", "validation", "test")
MANY = 10  # rows of a table from which on it is shown after a click


def write_report(comparison: Comparison, store: Store) -> None:
    """Write all files and set their paths in `comparison.files`."""
    out = comparison.out
    made = document(comparison)
    files = write(made, out)
    comparison.files = {**files, "document": files["json"], "csv": out / "results.csv", "json": out / RESULTS}
    if panels := [name for name in OVERVIEW if any(figure.name == name for figure in made.figures)]:
        comparison.files["overview"] = out / "overview.png"
        write_picture(made, panels, comparison.files["overview"])
    comparison.files["trials"] = out / "trials.csv"
    pandas.DataFrame(comparison.table()).to_csv(comparison.files["csv"], index=False)
    pandas.DataFrame(comparison.trainings()).to_csv(comparison.files["trials"], index=False)
    store.report = {
        "complete": comparison.complete,
        "verdict": comparison.verdict(),
        "facts": facts(comparison),
        "machine": comparison.machine,
        "rows": [{**result.summary(), "config": result.config} for result in comparison.measured],
    }
    store.write()


def document(comparison: Comparison) -> Document:
    """The report."""
    return Document(
        title=f"Gradient preconditioning on {comparison.data['name']}",
        answer=comparison.verdict(),
        sections=[section for section in _sections(comparison) if section.blocks],
        lead=", ".join(_sizes(comparison)),
        warning="" if comparison.complete else "Interrupted: not all trials were run. The same command completes them.",
        rows=[result.row.label for result in comparison.measured],
        notes=notes(comparison),
        machine={name: str(value) for name, value in comparison.machine.items()},
        command=shown_command(comparison.command),
        files={result.row.label: _configuration(result) for result in comparison.measured} | {"model": comparison.model},
    )


def shown_command(command: str) -> str:
    """The command line without folders of the machine."""
    return re.sub(r"(?<![\w.~])[~/][^\s'\"]*/(?=[^\s/])", "", command)


def _sections(comparison: Comparison) -> Iterable[Section]:
    yield Section("Summary", [summary(comparison)])
    tested = metric_curves(comparison, "steps"), metric_curves(comparison, "seconds")
    yield Section("Time to the target", [*_races(comparison), *_drawn(*tested)])
    costs = [front(comparison, cost) for cost in ("seconds", "memory_ratio")]
    yield Section(f"Test {comparison.metric} against cost", [*_drawn(*costs)])
    curves = loss_curves(comparison, "steps"), loss_curves(comparison, "seconds"), search_figure(comparison)
    yield Section("Curves", [*_drawn(*curves), *sensitivity(comparison)])
    yield Section("Tests between rows", [*_tests(comparison)])
    yield Section("Setting", [Facts({name: str(value) for name, value in facts(comparison).items()}), trials(comparison)])


def _drawn(*figures: Figure | None) -> list[Block]:
    """The figures that there are values for."""
    return [figure for figure in figures if figure is not None]


# --- tables ---------------------------------------------------------------------------------------------------------------
def summary(comparison: Comparison) -> Table:
    """A line for every row."""
    reaches = {reach.label: reach for reach in comparison.reaches()}
    columns = (
        Column("method", kind="row"),
        _metric_column(comparison, "metric", f"test {comparison.metric}", "std"),
        Column("steps", "steps to target", format="g", best="low"),
        Column("seconds", "time to target", "seconds", best="low", help="steps to the target × median time of a step"),
        Column("step_ratio", "step time / SGD", format=".2f"),
        Column("memory_ratio", "memory / SGD", format=".2f"),
        Column("whole", "training time", "seconds", help="all steps × median time of a step, evaluation left out"),
        Column("train_loss", "train loss", format=".2g"),
        Column("seeds", kind="text", help="trainings at the selected options that ended well, of all"),
        Column("options", kind="text"),
        Column("note", kind="text"),
    )
    rows = []
    for result in comparison.measured:
        line, reach = result.summary(), reaches.get(result.row.label)
        rows.append(
            {
                "method": result.row.label,
                "options": _options(result),
                "metric": line[f"test_{comparison.metric}"],
                "seeds": f"{line['finished']} of {line['seeds']}",
                "std": line[f"test_{comparison.metric}_std"],
                "steps": reach.steps if reach else None,
                "seconds": reach.seconds if reach else None,
                "whole": line["seconds"],
                **{name: line[name] for name in ("train_loss", "step_ratio", "memory_ratio", "note")},
            }
        )
    marked = [result.row.label for result in comparison.measured if is_reference(result.row)]
    return Table("summary", "", columns, rows, marked=marked)


def _races(comparison: Comparison) -> Iterable[Table]:
    """Steps and seconds to the target, and their ratios to those of one row."""
    reaches, base = comparison.reaches(), rival(comparison.reaches(), comparison.plain_rows)
    if not reaches:
        return
    columns = [
        Column("method", kind="row"),
        Column("reached", "seeds that reach it", kind="text"),
        Column("steps", format="g", best="low"),
        Column("seconds", "time", "seconds", best="low"),
    ]
    rows: list[dict[str, Any]] = [
        {"method": r.label, "reached": f"{r.reached} of {r.seeds}", "steps": r.steps, "seconds": r.seconds} for r in reaches
    ]
    if base is not None:
        columns += [Column(f"{name} share", f"{name} / {base.label}", format=".2f") for name in ("steps", "time")]
        for row in rows:
            row |= {"steps share": _share(row["steps"], base.steps), "time share": _share(row["seconds"], base.seconds)}
    target = written(comparison.metric, reaches[0].target)
    origin = "as given" if comparison.target is not None else "what all rows reach in most seeds"
    caption = (
        f"Target: {target} of test {comparison.metric} ({origin}). Medians over seeds; time is steps × median time of a step."
    )
    yield Table("race", "", columns, rows, caption)


def _tests(comparison: Comparison) -> Iterable[Table]:
    """Student's t between all pairs, with the interval of the difference."""
    found = comparison.differences()
    if not found:
        return
    columns = (
        Column("first", kind="row"),
        Column("second", kind="row"),
        _metric_column(comparison, "mean", "difference"),
        _metric_column(comparison, "low", "95 % from"),
        _metric_column(comparison, "high", "to"),
        Column("p", format=".2g"),
        Column("seeds", format="d"),
        Column("reading", kind="text"),
    )
    keys = [column.key for column in columns]
    rows = [{key: getattr(test, key) for key in keys} for test in found]
    caption = "Paired over common seeds; the reading allows for the number of tests (Bonferroni, 5 % of all together)."
    yield Table("tests", f"{count(len(rows), 'paired test')}", columns, rows, caption, collapsed=len(rows) > MANY)


def trials(comparison: Comparison) -> Table:
    """All trainings, each once."""
    columns = (
        Column("method", kind="row"),
        Column("rate", "learning rate", format="g"),
        Column("options", kind="text"),
        Column("seed", format="d"),
        Column("status", kind="text"),
        Column("train", "train loss", format=".4g"),
        _metric_column(comparison, "validation", f"validation {comparison.metric}"),
        _metric_column(comparison, "test", f"test {comparison.metric}"),
        Column("message", kind="text"),
    )
    rows = [_trial(comparison, record) for result in comparison.rows for record in result.trials]
    return Table("trials", count(len(rows), "training"), columns, rows, collapsed=True)


def _trial(comparison: Comparison, record: Record) -> dict[str, Any]:
    return {
        "method": record.label,
        "rate": record.learning_rate,
        "options": ", ".join(f"{name} {value}" for name, value in record.parameters.items()),
        "seed": record.seed,
        "status": record.status,
        "train": record.end("train"),
        "validation": record.end("validation", comparison.metric),
        "test": record.end("test", comparison.metric),
        "message": record.message,
    }


def _metric_column(comparison: Comparison, key: str, title: str, spread: str = "") -> Column:
    best: Best = ("high" if comparison.higher else "low") if spread else ""
    if comparison.metric == "accuracy":
        return Column(key, title, "percent", ".2f", spread=spread, best=best)
    return Column(key, title, spread=spread, best=best)


def _options(result: RowResult) -> str:
    rate = [] if result.learning_rate is None else [f"lr {result.learning_rate:g}"]
    return ", ".join([*rate, *(f"{name} {value}" for name, value in result.chosen.items())])


def _share(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base


# --- text -----------------------------------------------------------------------------------------------------------------
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
    }


def notes(comparison: Comparison) -> list[str]:
    """How the numbers were measured."""
    kind = comparison.setting.device.split(":")[0]
    reference = f"torch.optim.{REFERENCE.optimizer} with momentum {REFERENCE.options['momentum']:g}"
    return [
        f"Test values are mean ± sample standard deviation over {count(len(comparison.seeds), 'seed')}. In the figures lines "
        "are means over seeds, bands reach from the lowest to the highest, losses are running means over "
        f"1/{SMOOTHING} of the training.",
        "All rows start, for one seed, from the same parameters and see the same batches in the same order.",
        SELECTION,
        f"Step time is the median over up to {ROUNDS} rounds in one process; in each, a block of steps of the row stands "
        f"between two blocks of plain SGD ({reference}, no maker), long enough to hold the refreshes of the preconditioner. "
        "Times of trainings are steps × that median: the load of the machine is not in them.",
        f"Memory: {MEMORY_NOTE.get(kind, 'not measured on this device')}.",
        "A training diverged when its loss was not finite, or when its mean over the last quarter before the last evaluation "
        "was above that of the first step by more than a quarter and twice the spread of its batches; it is left out of means "
        "and figures and counted in the notes.",
        *(["There is no test part: the validation part stands for it."] if comparison.data.get("test_is_validation") else []),
    ]


def _sizes(comparison: Comparison) -> list[str]:
    counts = (len(comparison.measured), "method"), (len(comparison.seeds), "seed")
    sized = [count(number, noun) for number, noun in counts]
    return [*sized, comparison.setting.budget, f"batch size {comparison.setting.batch_size}"]


def _configuration(result: RowResult) -> str:
    chosen = {"selected": {"learning_rate": result.learning_rate, **result.chosen}}
    return json.dumps({**result.config, "learning_rates": list(result.row.learning_rates), **chosen}, indent=2, default=str)
