"""The result of a row: its trials, the selected options, and a line of the summary table."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from gradmaker.compare.cost import Cost
from gradmaker.compare.rows import Row
from gradmaker.compare.trial import Record

SELECTION = (
    "The options of every row are those whose training with the first seed ends with the best value of the metric on the "
    "validation part (ties: the lowest loss); without a metric, with the lowest loss. The validation part is held out of the "
    "training set. Test examples choose nothing. Trainings that diverged or failed are never chosen while another ended well."
)
HEADINGS = {
    "method": "method",
    "options": "options",
    "test": "test",
    "train_loss": "train loss",
    "step_ratio": "step time / SGD",
    "memory_ratio": "memory / SGD",
    "seconds": "steps x step time",
    "note": "note",
}
BAD = ("diverged", "failed", "out of memory")


@dataclass
class RowResult:
    """A row and its trials: `search` over options with the first seed, `finals` over seeds at the selected ones.

    Args:
        refusal: why the row cannot be trained at all; it has no trials then.
        chosen: the selected options besides the learning rate.
        metric: the name of the metric that selects.
    """

    row: Row
    config: dict[str, Any]
    search: list[Record] = field(default_factory=list)
    finals: list[Record] = field(default_factory=list)
    learning_rate: float | None = None
    cost: Cost | None = None
    refusal: str = ""
    chosen: dict[str, Any] = field(default_factory=dict)
    metric: str = "loss"

    @property
    def finished(self) -> list[Record]:
        """The trainings of `finals` that finished without divergence or failure."""
        return [record for record in self.finals if record.status == "finished"]

    @property
    def trials(self) -> list[Record]:
        """All trainings, each once."""
        return list({id(record): record for record in (*self.search, *self.finals)}.values())

    def ends(self, name: str | None = None, part: str = "test") -> list[float]:
        """The last values of the finished trainings over seeds."""
        return [record.end(part, name or self.metric) for record in self.finished]

    def seconds(self) -> float | None:
        """Steps of a training x median time of an interleaved step."""
        steps = mean([float(record.marks[-1]) for record in self.finished])
        return None if steps is None or self.cost is None else steps * self.cost.step_seconds

    def summary(self) -> dict[str, Any]:
        """A line of results.csv: means and sample standard deviations over finished seeds."""
        names = dict.fromkeys((self.metric, "loss", *(name for record in self.finished[:1] for name in record.test)))
        tested: dict[str, float | None] = {}
        for name in names:
            values = self.ends(name)
            tested |= {f"test_{name}": mean(values), f"test_{name}_std": deviation(values)}
        return {
            "method": self.row.label,
            "learning_rate": self.learning_rate,
            **self.chosen,
            "trials": len(self.search),
            "seeds": len(self.finals),
            "finished": len(self.finished),
            **tested,
            "train_loss": mean([r.end("train") for r in self.finished]),
            "step_ratio": self.cost.step_ratio if self.cost else None,
            "step_seconds": self.cost.step_seconds if self.cost else None,
            "memory_ratio": self.cost.memory_ratio if self.cost else None,
            "peak_bytes": self.cost.peak_bytes if self.cost else None,
            "seconds": self.seconds(),
            "note": "; ".join(self.notes()),
        }

    def cells(self) -> list[str]:
        """The summary as text, in the order of `HEADINGS`."""
        line = self.summary()
        percent = self.metric == "accuracy"
        value, std = line[f"test_{self.metric}"], line[f"test_{self.metric}_std"]
        test = _deviating(value, std, 100, ".2f", " %") if percent else _deviating(value, std, 1, ".4g", "")
        if 0 < line["finished"] < line["seeds"]:
            test += f" ({line['finished']}/{line['seeds']})"
        options = [f"lr {_number(self.learning_rate, 'g')}"] if self.learning_rate is not None else ["-"]
        return [
            line["method"],
            ", ".join([*options, *(f"{name} {value}" for name, value in self.chosen.items())]),
            test,
            _number(line["train_loss"], ".2g"),
            _number(line["step_ratio"], ".2f"),
            _number(line["memory_ratio"], ".2f"),
            _number(line["seconds"], ".2g", " s"),
            line["note"],
        ]

    def notes(self) -> Iterable[str]:
        """What has to be known beside the numbers."""
        if self.refusal:
            yield f"refused: {self.refusal}"
        for status in BAD:
            if bad := [record for record in self.finals if record.status == status]:
                yield f"{len(bad)} of {count(len(self.finals), 'seed')} {status}"
            if bad := [record for record in self.search if record.status == status]:
                yield f"{status} at lr {', '.join(f'{record.learning_rate:g}' for record in bad)}"
        if not self.finished and self.finals and self.finals[0].message:
            yield self.finals[0].message
        tried = sorted({record.learning_rate for record in self.search})
        if self.finished and len(tried) > 1 and self.learning_rate in (tried[0], tried[-1]):
            yield "lr at the edge of its grid"


def select(search: Sequence[Record], metric: str, higher: bool) -> Record:
    """The record whose options are selected, by validation only: see `SELECTION`."""
    return max(search, key=lambda record: score(record, metric, higher))


def score(record: Record, metric: str, higher: bool) -> tuple[bool, float, float]:
    """What `select` compares: finished, the metric, the loss; higher is better."""
    value, loss = record.end("validation", metric), record.end("validation")
    return record.status == "finished", _worst(value if higher else -value), _worst(-loss)


def mean(values: Sequence[float]) -> float | None:
    """The mean; None without values or where one is not finite."""
    return fmean(values) if values and all(map(math.isfinite, values)) else None


def deviation(values: Sequence[float]) -> float | None:
    """The sample standard deviation; None for fewer than two values."""
    return stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def count(number: int, noun: str) -> str:
    """A number with its noun: 1 seed, 3 seeds."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _worst(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _deviating(center: float | None, std: float | None, scale: float, form: str, unit: str) -> str:
    deviation = "" if std is None else f" \u00b1 {std * scale:{form}}"
    return "-" if center is None else f"{center * scale:{form}}{deviation}{unit}"
