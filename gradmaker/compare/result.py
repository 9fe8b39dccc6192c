"""The result of a comparison: all rows with their settings, tests between them, and what is saved and read again."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gradmaker.compare import verdicts
from gradmaker.compare.answer import Found, sentences
from gradmaker.compare.errors import InputError
from gradmaker.compare.row_result import HEADINGS, RowResult, mean
from gradmaker.compare.saved import row_from_plain, row_to_plain
from gradmaker.compare.store import read_results
from gradmaker.compare.trial import Record, Setting
from gradmaker.compare.verdicts import Difference, Point, Reach, Sensitivity

KEPT = ("seeds", "model", "data", "machine", "command", "metric", "higher", "tuning", "target", "complete")
OWN = ("budget", "batch_size", "schedule", "validation", "loss", "metrics", "data")  # of a setting, which rows must share


@dataclass
class Comparison:
    """All rows, their settings, and the paths of the report.

    Args:
        metric: name of the metric that selects and is tested; `higher` says whether a higher value is better.
        tuning: how options were searched.
        files: paths of outputs by name (html, markdown, csv, json and the plots).
        complete: False when the run was interrupted.
        varied: the trainings of `sensitivity`.
    """

    rows: list[RowResult]
    setting: Setting
    seeds: tuple[int, ...]
    out: Path
    model: str
    data: dict[str, Any]
    machine: dict[str, Any]
    command: str
    metric: str
    higher: bool
    tuning: dict[str, Any] = field(default_factory=dict)
    target: float | None = None
    files: dict[str, Path] = field(default_factory=dict)
    complete: bool = True
    sensitivity: list[Sensitivity] = field(default_factory=list)
    varied: list[Record] = field(default_factory=list)

    @classmethod
    def from_json(cls, path: str | Path) -> "Comparison":
        """The comparison that a results.json holds. InputError for a file without one."""
        path = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
        content = read_results(path)
        stored = content.get("comparison")
        if not stored:
            raise InputError(f"{str(path)!r} holds no comparison that came to an end: run it again")
        records = {key: Record(**record) for key, record in content["trials"].items()}
        kept = {name: stored[name] for name in KEPT}
        setting = Setting(**{**stored["setting"], "metrics": tuple(stored["setting"]["metrics"])})
        rows = [row_from_plain(row, records) for row in stored["rows"]]
        varied = [Sensitivity(**line) for line in stored["sensitivity"]]
        kept["seeds"] = tuple(kept["seeds"])
        out = (path if path.is_dir() else path.parent).resolve()
        others = [records[key] for key in stored["varied"]]
        return cls(rows=rows, setting=setting, out=out, sensitivity=varied, varied=others, **kept)

    def plain(self) -> dict[str, Any]:
        """What `from_json` reads, in types of JSON; trainings by their keys."""
        return {
            **{name: getattr(self, name) for name in KEPT},
            "setting": asdict(self.setting),
            "rows": [row_to_plain(result) for result in self.rows],
            "sensitivity": [asdict(line) for line in self.sensitivity],
            "varied": [record.key for record in self.varied],
        }

    def merge(self, *others: "Comparison") -> "Comparison":
        """One comparison with the rows of all. InputError where settings or machines differ or two rows have one label."""
        for other in others:
            for name in OWN:
                own, given = getattr(self.setting, name), getattr(other.setting, name)
                if own != given:
                    raise InputError(f"comparisons of different {name} cannot be merged: {own!r} and {given!r}")
            if self.model != other.model:
                raise InputError("comparisons of different models cannot be merged: rows start from the same parameters")
            if apart := _apart(self.machine, other.machine):
                raise InputError(f"comparisons of different {apart} cannot be merged: their times are not of one machine")
        rows = [result for comparison in (self, *others) for result in comparison.rows]
        labels = [result.row.label for result in rows]
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise InputError(f"two rows are called {twice!r}: give one of them another label")
        seeds = tuple(dict.fromkeys(seed for comparison in (self, *others) for seed in comparison.seeds))
        lines = [line for comparison in (self, *others) for line in comparison.sensitivity]
        varied = [record for comparison in (self, *others) for record in comparison.varied]
        complete = all(comparison.complete for comparison in (self, *others))
        return replace(self, rows=rows, seeds=seeds, sensitivity=lines, varied=varied, complete=complete, files={}, command="")

    def table(self) -> list[dict[str, Any]]:
        """The summary of every row."""
        return [result.summary() for result in self.measured]

    @property
    def trained(self) -> bool:
        """Whether any training finished without divergence or failure."""
        return any(result.finished for result in self.rows)

    @property
    def measured(self) -> list[RowResult]:
        """The rows with a training at the selected options, and those that were refused."""
        return [result for result in self.rows if result.finals or result.refusal]

    @property
    def headings(self) -> list[str]:
        """Headings of the columns of `RowResult.cells`."""
        return list({**HEADINGS, "test": f"test {self.metric}"}.values())

    def differences(self) -> list[Difference]:
        """Paired tests between all pairs of rows, on the metric over common seeds."""
        ends = {
            result.row.label: {record.seed: record.end("test", self.metric) for record in result.finished}
            for result in self.rows
            if result.finished
        }
        return verdicts.differences(ends, self.higher)

    def reaches(self, target: float | None = None) -> list[Reach]:
        """Steps and seconds to a target of the metric; None: that of the comparison, or what all rows reach in most seeds.

        A training that did not finish counts as one that has not reached it.
        """
        if (wanted := self.target if target is None else target) is None:
            ends = [
                [record.end("test", self.metric) if record.status == "finished" else None for record in result.finals]
                for result in self.rows
            ]
            wanted = verdicts.common_target(ends, self.higher)
        return [
            verdicts.reach(
                result.row.label,
                wanted,
                [
                    (record.marks, record.test.get(self.metric, []) if record.status == "finished" else [])
                    for record in result.finals
                ],
                result.cost.step_seconds if result.cost else None,
                self.higher,
            )
            for result in self.rows
            if result.finals
        ]

    def pareto(self, cost: str = "seconds") -> list[Point]:
        """All rows as metric against `seconds`, `step_ratio` or `memory_ratio`, with the front marked."""
        if cost not in ("seconds", "step_ratio", "step_seconds", "memory_ratio", "peak_bytes"):
            raise ValueError(f"cost={cost!r}: expected seconds, step_ratio, step_seconds, memory_ratio or peak_bytes")
        lines = [result.summary() for result in self.rows if result.finished]
        points = [(line["method"], line[f"test_{self.metric}"], line[cost]) for line in lines]
        return verdicts.front([point for point in points if None not in point], self.higher)

    def verdict(self) -> list[str]:
        """What the numbers show, in sentences."""
        ends = {result.row.label: end for result in self.rows if (end := mean(result.ends())) is not None}
        found = Found(
            metric=self.metric,
            higher=self.higher,
            ends=ends,
            plain=self.plain_rows,
            tests=self.differences(),
            reaches=self.reaches(),
            points=self.pareto(),
            bad=[result.row.label for result in self.measured if not result.finished],
            finished={
                result.row.label: f"{len(result.finished)} of {len(result.finals)}"
                for result in self.rows
                if 0 < len(result.finished) < len(result.finals)
            },
        )
        return sentences(found)

    @property
    def plain_rows(self) -> list[str]:
        """The rows without a method."""
        return [result.row.label for result in self.rows if result.row.maker is None]

    def trainings(self) -> list[dict[str, Any]]:
        """A line for every training, for trials.csv."""
        return [
            {
                "method": record.label,
                "learning_rate": record.learning_rate,
                **record.parameters,
                "batch_size": record.batch_size,
                "seed": record.seed,
                "status": record.status,
                "steps": record.marks[-1] if record.marks else 0,
                "train_loss": record.end("train"),
                **{f"validation_{name}": record.end("validation", name) for name in record.validation},
                **{f"test_{name}": record.end("test", name) for name in record.test},
                "message": record.message,
                **record.machine,
                "config": json.dumps(record.config),
            }
            for record in self.records()
        ]

    def records(self) -> list[Record]:
        """All trainings."""
        return [*(record for result in self.rows for record in result.trials), *self.varied]


def _apart(own: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The facts in which two machines differ, with their values; the dates may."""
    names = [name for name in dict.fromkeys((*own, *other)) if name != "date" and own.get(name) != other.get(name)]
    return ", ".join(f"{name} ({own.get(name)} and {other.get(name)})" for name in names)
