"""The result of a comparison: selected learning rate and trials of every row, and the summary table."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from gradmaker.compare.cost import Cost
from gradmaker.compare.rows import Row
from gradmaker.compare.trial import Record, Setting
from gradmaker.compare.verdicts import Difference, Point, Reach, Sensitivity

SELECTION = (
    "The learning rate of every row is the one whose training with the first seed ends with the highest validation accuracy "
    "(ties: the lowest validation loss); without classes, with the lowest validation loss. Validation samples are held out of "
    "the training set. Test samples choose nothing. Diverged and failed trainings are never chosen while another ended well."
)
HEADINGS = {
    "method": "method",
    "learning_rate": "lr",
    "test": "test accuracy",
    "train_loss": "train loss",
    "step_ratio": "step time / SGD",
    "memory_ratio": "memory / SGD",
    "seconds": "time",
    "note": "note",
}


@dataclass
class RowResult:
    """A row and its trials: `search` over options with the first seed, `finals` over seeds at the selected ones.

    Args:
        refusal: why the row cannot be trained at all; it has no trials then.
        chosen: the selected options besides the learning rate.
    """

    row: Row
    config: dict[str, Any]
    search: list[Record] = field(default_factory=list)
    finals: list[Record] = field(default_factory=list)
    learning_rate: float | None = None
    cost: Cost | None = None
    refusal: str = ""
    chosen: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> list[Record]:
        """The trainings of `finals` that finished without divergence or failure."""
        return [record for record in self.finals if record.status == "finished"]

    def summary(self) -> dict[str, Any]:
        """A line of results.csv: means and sample standard deviations over finished seeds."""
        accuracy, loss = ([r.end(name) for r in self.finished] for name in ("test_accuracy", "test_loss"))
        return {
            "method": self.row.label,
            "learning_rate": self.learning_rate,
            "seeds": len(self.finals),
            "finished": len(self.finished),
            "test_accuracy": mean(accuracy),
            "test_accuracy_std": deviation(accuracy),
            "test_loss": mean(loss),
            "test_loss_std": deviation(loss),
            "train_loss": mean([r.end("train_loss") for r in self.finished]),
            "step_ratio": self.cost.step_ratio if self.cost else None,
            "step_seconds": self.cost.step_seconds if self.cost else None,
            "memory_ratio": self.cost.memory_ratio if self.cost else None,
            "peak_bytes": self.cost.peak_bytes if self.cost else None,
            "seconds": mean([r.epoch_time[-1] for r in self.finished]),
            "note": "; ".join(self._notes()),
        }

    def cells(self) -> list[str]:
        """The summary as text, in the order of `HEADINGS`."""
        line = self.summary()
        test = _deviating(line["test_accuracy"], line["test_accuracy_std"], 100, ".2f", " %")
        if line["test_accuracy"] is None:
            test = _deviating(line["test_loss"], line["test_loss_std"], 1, ".4g", " (loss)")
        if 0 < line["finished"] < line["seeds"]:
            test += f" ({line['finished']}/{line['seeds']})"
        return [
            line["method"],
            _number(line["learning_rate"], "g"),
            test,
            _number(line["train_loss"], ".2g"),
            _number(line["step_ratio"], ".2f"),
            _number(line["memory_ratio"], ".2f"),
            _number(line["seconds"], ".1f", " s"),
            line["note"],
        ]

    def _notes(self) -> Iterable[str]:
        for status in ("diverged", "failed"):
            if bad := [record for record in self.finals if record.status == status]:
                yield f"{len(bad)} of {count(len(self.finals), 'seed')} {status}"
            if bad := [record for record in self.search if record.status == status]:
                yield f"{status} at lr {', '.join(f'{record.learning_rate:g}' for record in bad)}"
        grid = sorted(self.row.learning_rates)
        if self.finished and len(grid) > 1 and self.learning_rate in (grid[0], grid[-1]):
            yield "lr at the edge of its grid"


@dataclass
class Comparison:
    """All rows, their settings, and the paths of the report.

    Args:
        files: paths of outputs by name (html, markdown, csv, json and the plots).
        complete: False when the run was interrupted.
    """

    rows: list[RowResult]
    setting: Setting
    seeds: tuple[int, ...]
    out: Path
    model: str
    data: dict[str, Any]
    machine: dict[str, Any]
    command: str
    classes: bool
    files: dict[str, Path] = field(default_factory=dict)
    complete: bool = True
    sensitivity: list[Sensitivity] = field(default_factory=list)

    def table(self) -> list[dict[str, Any]]:
        """The summary of every row that has a finished or diverged training."""
        return [result.summary() for result in self.measured]

    @classmethod
    def from_json(cls, path: str | Path) -> "Comparison":
        """The comparison that a results.json holds; `write_report` writes its report again."""
        raise NotImplementedError

    def merge(self, *others: "Comparison") -> "Comparison":
        """One comparison with the rows of all. InputError where settings differ or two rows have one label."""
        raise NotImplementedError

    @property
    def trained(self) -> bool:
        """Whether any training finished without divergence or failure."""
        return any(result.finished for result in self.rows)

    def differences(self) -> list[Difference]:
        """Paired tests between all pairs of rows, on the metric over common seeds."""
        raise NotImplementedError

    def reaches(self, target: float | None = None) -> list[Reach]:
        """Steps and seconds to a target of the metric; None: the worst end of a row that is no outlier."""
        raise NotImplementedError

    def pareto(self, cost: str = "seconds") -> list[Point]:
        """All rows as metric against `seconds`, `step_ratio` or `memory_ratio`, with the front marked."""
        raise NotImplementedError

    def verdict(self) -> list[str]:
        """What the numbers show, in sentences."""
        raise NotImplementedError

    @property
    def measured(self) -> list[RowResult]:
        """The rows with at least one training at the selected learning rate."""
        return [result for result in self.rows if result.finals]

    @property
    def headings(self) -> list[str]:
        """Headings of the columns of `RowResult.cells`."""
        return list((HEADINGS if self.classes else {**HEADINGS, "test": "test loss"}).values())


def select(search: Sequence[Record]) -> Record:
    """The record whose learning rate is selected, by validation only: see `SELECTION`."""
    return max(
        search, key=lambda r: (r.status == "finished", _score(r.end("validation_accuracy")), -_cost(r.end("validation_loss")))
    )


def mean(values: Sequence[float]) -> float | None:
    """The mean; None without values or where one is not finite."""
    return fmean(values) if values and all(map(math.isfinite, values)) else None


def deviation(values: Sequence[float]) -> float | None:
    """The sample standard deviation; None for fewer than two values."""
    return stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def count(number: int, noun: str) -> str:
    """A number with its noun: 1 seed, 3 seeds."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _score(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def _cost(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _deviating(center: float | None, std: float | None, scale: float, form: str, unit: str) -> str:
    deviation = "" if std is None else f" \u00b1 {std * scale:{form}}"
    return "-" if center is None else f"{center * scale:{form}}{deviation}{unit}"
