"""`compare`: plans the trials, runs those that are not on disk yet, selects learning rates and writes the report."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradmaker.compare import cost
from gradmaker.compare.data import Data, Split, split
from gradmaker.compare.errors import InputError, require_extra
from gradmaker.compare.result import Comparison, RowResult, select
from gradmaker.compare.rows import Method, Row, parse_rows
from gradmaker.compare.store import Store
from gradmaker.compare.task import Task
from gradmaker.compare.trial import SCHEDULES, Loss, Record, Setting, Trial, digest, initial_model, run_trial, steps_per_epoch
from gradmaker.compare.tuning import Budget, Tuning
from gradmaker.options.suggestions import did_you_mean
from gradmaker.version import __version__

if TYPE_CHECKING:
    from gradmaker.compare.progress import Board

Callback = Callable[[Trial, int, float], None]


@dataclass
class Runner:
    """Runs the trials of one comparison, which share model, data, loss and setting."""

    model: Callable[[], nn.Module]
    parts: Split
    loss: Loss
    setting: Setting
    store: Store
    board: "Board"
    callback: Callback | None

    def trial(self, result: RowResult, learning_rate: float, seed: int) -> Record:
        """The record of a trial: read from the store if it was completed before, else trained and stored."""
        trial = Trial(result.row, result.config, learning_rate, seed)
        key = trial.key(self.setting)
        known = self.store.records.get(key)
        if known is None or known.status == "failed":
            known = self._train(trial)
            self.store.records[key] = known
            self.store.write()
        self.board.finish()
        return replace(known, label=result.row.label)

    def row(self, result: RowResult, seeds: Sequence[int]) -> None:
        """Search the learning rate with the first seed, then train with all seeds."""
        for rate in result.row.learning_rates:
            result.search.append(self.trial(result, rate, seeds[0]))
        best = select(result.search)
        result.learning_rate = best.learning_rate
        result.finals.append(best)
        for seed in seeds[1:]:
            result.finals.append(self.trial(result, best.learning_rate, seed))

    def costs(self, results: Iterable[RowResult]) -> None:
        """Measure time and memory of all rows; reuse stored costs unless rows, model, setting or machine changed."""
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

    def _train(self, trial: Trial) -> Record:
        self.board.start(str(trial), self.setting.epochs * steps_per_epoch(len(self.parts.train[0]), self.setting))

        def on_epoch(epoch: int, loss: float) -> None:
            self.board.note(f"loss {loss:.4f}")
            if self.callback is not None:
                self.callback(trial, epoch, loss)

        return run_trial(trial, self.model, self.parts, self.loss, self.setting, self.board.step, on_epoch)


def compare(
    task: Task,
    methods: Iterable[Method] | Mapping[str, Any],
    *,
    learning_rates: Sequence[float] | None = None,
    tuning: Tuning | Mapping[str, Any] | str | Path = "grid",
    budget: Budget | str | int | None = None,
    seeds: int | Sequence[int] = 3,
    batch_size: int | None = None,
    momentum: float | None = None,
    schedule: str = "cosine",
    validation: float = 0.1,
    vary: Mapping[str, Sequence[int]] | None = None,
    target: float | None = None,
    workers: int | None = 1,
    tensorboard: bool = False,
    device: torch.device | str = "cpu",
    out: str | Path = "runs/compare",
    progress: bool = True,
    command: str = "",
    callback: Callback | None = None,
) -> Comparison:
    """Train every method from the same initial parameters, choose its options on validation, and write a report into `out`.

    A second call with the same arguments reads finished trials from `out` and runs the others. After Ctrl-C, the report has
    the trials that finished. Returns the comparison. InputError, before any training, for arguments that cannot be used.

    Args:
        methods: names of METHODS or of torch.optim, mappings for `from_config` (with the further keys `label`,
            `learning_rates`, `optimizer`), mappings from labels to these, paths of YAML files of them.
        learning_rates: the grid for rows without one; None: `gradmaker.compare.rows.DEFAULTS`.
        tuning: how the options of a row are searched: `Tuning`, or its `search`, or the path of a YAML file.
        budget: length of every training: "20 epochs", "500 steps", "60 seconds"; None: that of the task, or 20 epochs.
        batch_size: None: that of the task.
        momentum: momentum of SGD in the rows that have one by default; None: as in `DEFAULTS`.
        schedule: constant, linear or cosine (to zero over the training).
        validation: fraction of the training examples held out to select, where the task has no validation part.
        vary: settings changed one at a time after the search, `{"batch_size": [32, 128], "interval": [1, 10, 100]}`.
        target: value of the metric for steps and seconds to a target; None: chosen from the results.
        workers: trainings at a time, each in a process of its own; None: as many as there are cores.
        tensorboard: whether to write event files (the extra `tensorboard`).
        command: command line that the report shows.
        callback: called after every epoch with the trial, the epoch and its mean loss.
    """
    require_extra()
    from gradmaker.compare.progress import board

    later = {"vary": vary, "target": target, "tensorboard": tensorboard, "workers": workers not in (1, None)}
    if missing := [name for name, value in later.items() if value]:
        raise NotImplementedError(f"{', '.join(missing)}: not built yet")
    Tuning.parse(tuning)
    length = Budget.parse(task.options.get("budget", "20 epochs") if budget is None else budget)
    if length.unit != "epochs":
        raise NotImplementedError(f"budget={length}: only epochs yet")
    epochs = int(length.amount)
    batch_size = task.batch_size if batch_size is None else batch_size
    loss, given = task.loss, task.model
    model = partial(copy.deepcopy, given) if isinstance(given, nn.Module) else given
    data = Data(task.name, *task.train, *task.test)
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
    """Run all rows and measure costs. On KeyboardInterrupt, write the report of finished trials and raise it again."""
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
        raise InputError(f"seeds={seeds!r}: expected at least one seed")
    return chosen


def _check_numbers(epochs: int, batch_size: int, momentum: float | None, schedule: str) -> None:
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name}={value!r}: expected an integer of at least 1")
    if momentum is not None and not 0 <= momentum < 1:
        raise InputError(f"momentum={momentum!r}: expected 0 <= momentum < 1")
    if schedule not in SCHEDULES:
        raise InputError(f"schedule={schedule!r}: {did_you_mean(schedule, SCHEDULES)}")


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
    """The whole configuration of a row. Builds the row once, so that InputError comes before any training."""
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
