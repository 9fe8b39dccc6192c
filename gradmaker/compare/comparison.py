"""`compare`: plan the trials, run those that are not on disk yet, choose learning rates, write the report."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from gradmaker.compare import cost
from gradmaker.compare.data import Data, Split, split
from gradmaker.compare.errors import InputError, require_extra
from gradmaker.compare.result import Comparison, RowResult, select
from gradmaker.compare.rows import Method, Row, parse_rows
from gradmaker.compare.store import Store
from gradmaker.compare.trial import SCHEDULES, Loss, Record, Setting, Trial, digest, initial_model, run_trial, steps_per_epoch
from gradmaker.options.suggestions import did_you_mean
from gradmaker.version import __version__

if TYPE_CHECKING:
    from gradmaker.compare.progress import Board

Callback = Callable[[Trial, int, float], None]


@dataclass
class Runner:
    """The parts that every trial of one comparison shares."""

    model: Callable[[], nn.Module]
    parts: Split
    loss: Loss
    setting: Setting
    store: Store
    board: "Board"
    callback: Callback | None

    def trial(self, result: RowResult, learning_rate: float, seed: int) -> Record:
        """The record of a trial: from disk when it ended there, else trained now and written."""
        trial = Trial(result.row, result.config, learning_rate, seed)
        key = trial.key(self.setting)
        known = self.store.records.get(key)
        if known is None or known.status == "failed":
            known = self._trained(trial)
            self.store.records[key] = known
            self.store.write()
        self.board.finish()
        return replace(known, label=result.row.label)

    def row(self, result: RowResult, seeds: Sequence[int]) -> None:
        """Search the learning rate with the first seed, then train with all."""
        for rate in result.row.learning_rates:
            result.search.append(self.trial(result, rate, seeds[0]))
        best = select(result.search)
        result.learning_rate = best.learning_rate
        result.finals.append(best)
        for seed in seeds[1:]:
            result.finals.append(self.trial(result, best.learning_rate, seed))

    def costs(self, results: Iterable[RowResult]) -> None:
        """Measure the rows against each other; again only when their set, the model or the machine changed."""
        rows = {digest(result.config): result for result in results}
        machine = {**cost.machine(self.setting.device), "date": ""}
        key = digest([sorted(rows), asdict(replace(self.setting, epochs=0)), machine])
        if key not in self.store.costs:
            self.board.start("step time and memory, interleaved with SGD", cost.ROUNDS * len(rows))
            wanted = {name: result.row for name, result in rows.items()}
            found = cost.measure(wanted, self.model, self.parts, self.loss, self.setting, self.board.step)
            self.store.costs[key] = {name: value.as_dict() for name, value in found.items()}
            self.store.write()
        for name, result in rows.items():
            result.cost = cost.Cost(**self.store.costs[key][name])

    def _trained(self, trial: Trial) -> Record:
        self.board.start(str(trial), self.setting.epochs * steps_per_epoch(len(self.parts.train[0]), self.setting))

        def on_epoch(epoch: int, loss: float) -> None:
            self.board.note(f"loss {loss:.4f}")
            if self.callback is not None:
                self.callback(trial, epoch, loss)

        return run_trial(trial, self.model, self.parts, self.loss, self.setting, self.board.step, on_epoch)


def compare(
    model: Callable[[], nn.Module],
    data: Data,
    methods: Iterable[Method] | Mapping[str, Any],
    *,
    loss: Loss = F.cross_entropy,
    learning_rates: Sequence[float] | None = None,
    seeds: int | Sequence[int] = 3,
    epochs: int = 20,
    batch_size: int = 64,
    momentum: float | None = None,
    schedule: str = "cosine",
    validation: float = 0.1,
    device: torch.device | str = "cpu",
    out: str | Path = "runs/compare",
    progress: bool = True,
    command: str = "",
    callback: Callback | None = None,
) -> Comparison:
    """Train every method from the same starts over its learning rates, and write a report into `out`.

    The same call again reads the finished trials from `out` and runs the others. Ctrl-C leaves a report of what is there.

    Args:
        model: makes the model; called under the seed, so that all methods start from the same parameters.
        methods: names of METHODS or of torch.optim, mappings for `from_config` (with the further keys `label`,
            `learning_rates`, `optimizer`), mappings from labels to these, paths of YAML files of them.
        loss: of outputs and targets, the mean over the batch.
        learning_rates: the grid of every row that has none of its own; None: `gradmaker.compare.rows.DEFAULTS`.
        momentum: of the SGD on top; of the rows that have one by default; None: as in `DEFAULTS`.
        schedule: constant, linear or cosine (to zero over the training).
        validation: fraction of the training samples that is held out to choose the learning rate.
        command: the command line for the report.
        callback: called after every epoch with the trial, the epoch and its mean loss.
    """
    require_extra()
    from gradmaker.compare.progress import board

    seeds = _checked_seeds(seeds)
    _check_numbers(epochs, batch_size, momentum, schedule)
    rows = parse_rows(methods, learning_rates, momentum)
    data = data.to(device)
    parts = split(data, validation)
    start = initial_model(model, seeds[0], str(device))
    setting = _setting(start, data, loss, epochs, batch_size, schedule, validation, str(device))
    results = [RowResult(row, _resolved(row, model, str(device))) for row in rows]
    store = Store(Path(out).resolve())
    comparison = Comparison(
        results,
        setting,
        seeds,
        Path(out).resolve(),
        str(start),
        _described(data, parts),
        cost.machine(str(device)),
        command,
        data.classes,
    )
    trials = sum(len(row.learning_rates) + len(seeds) - 1 for row in rows)
    with board(trials, progress) as shown:
        _run(Runner(model, parts, loss, setting, store, shown, callback), comparison, progress)
    _report(comparison, store, progress)
    return comparison


def _run(runner: Runner, comparison: Comparison, shown: bool) -> None:
    """All rows and the costs; what an interruption leaves is reported before it goes on."""
    from gradmaker.compare.progress import print_resume, print_selection

    console = runner.board.progress.console
    try:
        for result in comparison.rows:
            runner.row(result, comparison.seeds)
            if shown:
                print_selection(console, result)
        runner.costs(comparison.rows)
    except KeyboardInterrupt:
        comparison.complete = False
        runner.board.progress.stop()
        if comparison.measured:
            _report(comparison, runner.store, shown)
        if shown:
            print_resume(console, comparison.out, comparison.command)
        raise


def _report(comparison: Comparison, store: Store, shown: bool) -> None:
    from rich.console import Console

    from gradmaker.compare.progress import print_summary
    from gradmaker.compare.report import write_report

    write_report(comparison, store)
    if shown:
        print_summary(Console(), comparison)


def _checked_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(dict.fromkeys(seeds))
    if not chosen:
        raise InputError(f"give at least one seed, got {seeds}")
    return chosen


def _check_numbers(epochs: int, batch_size: int, momentum: float | None, schedule: str) -> None:
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if momentum is not None and not 0 <= momentum < 1:
        raise InputError(f"momentum must be in [0, 1), got {momentum}")
    if schedule not in SCHEDULES:
        raise InputError(f"unknown schedule {schedule!r}: {did_you_mean(schedule, SCHEDULES)}")


def _setting(
    start: nn.Module, data: Data, loss: Loss, epochs: int, batch_size: int, schedule: str, validation: float, device: str
) -> Setting:
    return Setting(
        epochs=epochs,
        batch_size=batch_size,
        schedule=schedule,
        validation=validation,
        device=device,
        loss=str(getattr(loss, "__qualname__", loss)),
        data=f"{data.name} {data.fingerprint()}",
        model=digest([str(start), {name: float(p.detach().double().sum()) for name, p in start.named_parameters()}]),
        version=__version__,
    )


def _resolved(row: Row, model: Callable[[], nn.Module], device: str) -> dict[str, Any]:
    """The row's whole configuration; building it once finds its errors before any training."""
    network = initial_model(model, 0, device)
    try:
        maker = row.build_maker(network)
        row.build_optimizer(network, row.learning_rates[0])
    except (TypeError, ValueError) as error:
        raise InputError(f"{row.label}: {error}") from error
    config = row.describe(maker)
    if maker is not None:
        maker.remove()
    return config


def _described(data: Data, parts: Split) -> dict[str, Any]:
    sizes = {"train": len(parts.train[0]), "validation": len(parts.validation[0]), "test": len(parts.test[0])}
    return {"name": data.name, **sizes, "shape": list(data.train_inputs.shape[1:])}
