"""Plans the trials of rows, reads those that are on disk, selects options, and measures costs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from gradmaker.compare import cost
from gradmaker.compare.problem import Problem
from gradmaker.compare.row_result import RowResult, deviation, mean, score, select
from gradmaker.compare.rows import Row
from gradmaker.compare.search.searches import RATE, Choice, Score
from gradmaker.compare.search.tuning import Tuning
from gradmaker.compare.store import Store
from gradmaker.compare.trial import Record, Setting, Trial, digest
from gradmaker.compare.trials.pool import Trainer
from gradmaker.compare.verdicts import Sensitivity

if TYPE_CHECKING:
    from gradmaker.compare.progress import Board

RETRIED = ("failed", "out of memory")  # trained again when a run is resumed: the cause may be gone


@dataclass
class Runner:
    """Runs the trials of one comparison, which share a problem and a setting."""

    problem: Problem
    setting: Setting
    tuning: Tuning
    seeds: Sequence[int]
    store: Store
    trainer: Trainer
    board: "Board"

    def search(self, results: Sequence[RowResult]) -> None:
        """Search the options of these rows with the first seed, side by side, then train with all seeds."""
        searches = [self.tuning.of(result.row) for result in results]
        while asked := [(k, choice) for k, search in enumerate(searches) for choice in search.ask()]:
            records = self.train([self._trial(results[k], choice, self.seeds[0]) for k, choice in asked])
            for (k, choice), record in zip(asked, records, strict=True):
                results[k].search.append(record)
                searches[k].tell(choice, self._score(record))
        for result in results:
            best = select(result.search, self.problem.metric, self.problem.higher)
            result.learning_rate, result.chosen = best.learning_rate, dict(best.parameters)
            result.config = best.config
            result.finals.append(best)
        self._finals(results)

    def _finals(self, results: Sequence[RowResult]) -> None:
        # a row that failed or had no memory would do so with every seed
        going = [result for result in results if result.finals[0].status not in RETRIED]
        planned = [(result, seed) for result in going for seed in self.seeds[1:]]
        chosen = [self._trial(result, chosen_of(result), seed) for result, seed in planned]
        for (result, _), record in zip(planned, self.train(chosen), strict=True):
            result.finals.append(record)

    def train(self, trials: Sequence[Trial]) -> list[Record]:
        """The records of trials: read from the store where they were completed before, else trained and stored."""
        keys = [trial.key() for trial in trials]
        missing = {key: trial for key, trial in zip(keys, trials, strict=True) if not self._known(key)}
        for trial, record in self.trainer.run(list(missing.values())):
            self.store.records[trial.key()] = record
            self.store.write()
            self.board.finish()
        for _ in range(len(trials) - len(missing)):
            self.board.finish()
        labels = [trial.row.label for trial in trials]
        return [replace(self.store.records[key], label=label) for key, label in zip(keys, labels, strict=True)]

    def costs(self, results: Iterable[RowResult]) -> None:
        """Measure time and memory of the rows that trained."""
        able = [result for result in results if result.finished]
        found = self._measured({digest(r.config): r.row.with_options(r.chosen) for r in able}, self.setting.batch_size)
        for result in able:
            result.cost = found.get(digest(result.config))

    def vary(
        self, results: Sequence[RowResult], settings: Mapping[str, Sequence[Any]]
    ) -> tuple[list[Sensitivity], list[Record]]:
        """Train the rows with one setting changed at a time, with all seeds; returns means and trainings."""
        lines: list[Sensitivity] = []
        trained: list[Record] = []
        for name, values in settings.items():
            able = [r for r in results if r.finished and (name == "batch_size" or r.row.takes(name))]
            for value in values:
                records, prices = self._varied(able, name, value)
                trained += records
                for k, result in enumerate(able):
                    own = records[k * len(self.seeds) : (k + 1) * len(self.seeds)]
                    lines.append(self._line(result.row.label, name, value, own, prices[k]))
        return lines, trained

    def _varied(self, results: Sequence[RowResult], name: str, value: Any) -> tuple[list[Record], list[cost.Cost | None]]:
        """The trainings of each row, seed by seed, and its cost."""
        whole = name == "batch_size"
        setting = replace(self.setting, batch_size=value) if whole else self.setting
        given = {} if whole else {name: value}
        trials = [self._trial(r, {**chosen_of(r), **given}, seed, setting) for r in results for seed in self.seeds]
        records = self.train(trials)
        rows = [r.row.with_options({**r.chosen, **given}) for r in results]
        keys = [digest(row.describe()) for row in rows]
        costs = self._measured(dict(zip(keys, rows, strict=True)), setting.batch_size)
        return records, [costs.get(key) for key in keys]

    def _line(self, label: str, name: str, value: Any, own: Sequence[Record], price: cost.Cost | None) -> Sensitivity:
        ends = [record.end("test", self.problem.metric) for record in own if record.status == "finished"]
        status = next((record.status for record in own if record.status != "finished"), "finished")
        return Sensitivity(label, name, value, mean(ends), deviation(ends), price.step_seconds if price else None, status)

    def _measured(self, rows: Mapping[str, Row], batch_size: int) -> dict[str, cost.Cost]:
        """Costs by key; stored ones are reused unless rows, model, setting or machine changed. A row that raises has none."""
        machine = {**cost.machine(self.problem.device), "date": ""}
        setting = {**asdict(self.setting), "budget": "", "batch_size": batch_size}
        key = digest([sorted(rows), setting, machine])
        if key not in self.store.costs and rows:
            self.board.start("step time and memory, interleaved with SGD", cost.ROUNDS * len(rows))
            self.store.costs[key] = {name: value.as_dict() for name, value in self._priced(rows, batch_size).items()}
            self.store.write()
        return {name: cost.Cost(**value) for name, value in self.store.costs.get(key, {}).items()}

    def _priced(self, rows: Mapping[str, Row], batch_size: int) -> dict[str, cost.Cost]:
        try:
            return cost.measure(rows, self.problem, batch_size, self.board.step)
        except Exception:  # the row that raised has no cost; the others have
            if len(rows) == 1:
                return {}
        return {name: found for name, row in rows.items() for found in self._priced({name: row}, batch_size).values()}

    def _trial(self, result: RowResult, choice: Choice, seed: int, setting: Setting | None = None) -> Trial:
        given = {name: value for name, value in choice.items() if name != RATE}
        row = result.row.with_options(given)
        config = row.describe()
        return Trial(row, config, float(choice[RATE]), seed, setting or self.setting, given)

    def _known(self, key: str) -> bool:
        record = self.store.records.get(key)
        return record is not None and record.status not in RETRIED

    def _score(self, record: Record) -> Score:
        return Score(*score(record, self.problem.metric, self.problem.higher), diverged=record.status == "diverged")


def chosen_of(result: RowResult) -> Choice:
    """The selected options of a row."""
    return {**result.chosen, RATE: result.learning_rate}
