"""`compare`: checks its arguments, runs the trials that are not on disk yet, and writes the report."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradmaker.compare import cost
from gradmaker.compare.batches.sources import ReadyBatches
from gradmaker.compare.errors import InputError, require_extra
from gradmaker.compare.parsing import Method, parse_rows
from gradmaker.compare.problem import Problem, prepare
from gradmaker.compare.result import Comparison
from gradmaker.compare.row_result import RowResult
from gradmaker.compare.rows import Row
from gradmaker.compare.search.budgets import Budget
from gradmaker.compare.search.tuning import Tuning
from gradmaker.compare.store import Store
from gradmaker.compare.task import Task
from gradmaker.compare.trial import SCHEDULES, Session, Setting, Trial, digest
from gradmaker.compare.trials.pool import Inline, Processes, Trainer, check_pool, workers_of
from gradmaker.compare.trials.runner import Runner
from gradmaker.options.suggestions import did_you_mean
from gradmaker.version import __version__

if TYPE_CHECKING:
    from gradmaker.compare.progress import Board

Callback = Callable[[Trial, int, float], None]


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
    vary: Mapping[str, Sequence[Any]] | None = None,
    target: float | None = None,
    workers: int | None = 1,
    tensorboard: bool = False,
    device: torch.device | str = "cpu",
    out: str | Path = "runs/compare",
    progress: bool = True,
    command: str = "",
    callback: Callback | None = None,
    on_end: Callable[[Session], None] = lambda session: None,
) -> Comparison:
    """Train every method from the same initial parameters, choose its options on validation, and write a report into `out`.

    A second call with the same arguments reads finished trials from `out` and runs the others. After Ctrl-C, the report has
    the trials that finished. A row that is refused, diverges, fails or has no memory says so in its notes. Returns the
    comparison. InputError, before any training, for arguments that cannot be used.

    Args:
        methods: names of METHODS or of torch.optim, mappings for `from_config` (with the further keys `label`,
            `learning_rates`, `optimizer`, `space`), mappings from labels to these, classes of optimizers or makers, paths of
            YAML files.
        learning_rates: the grid for rows without one; None: `gradmaker.compare.rates.DEFAULTS`.
        tuning: how the options of a row are searched: `Tuning`, or its `search`, or the path of a YAML file.
        budget: length of every training: "20 epochs", "500 steps", "60 seconds"; None: that of the task, or 20 epochs.
        batch_size: None: that of the task.
        momentum: momentum of SGD in the rows that have one by default; None: as in `DEFAULTS`.
        schedule: constant, linear or cosine (to zero over the training).
        validation: fraction of the training examples held out to select, where the task has no validation part.
        vary: settings changed one at a time after the search, `{"batch_size": [32, 128], "interval": [1, 10, 100]}`.
        target: value of the metric for steps and seconds to a target; None: chosen from the results.
        workers: trainings at a time, each in a process of its own if more than one; None: as many as there are cores.
        tensorboard: whether to write event files (the extra `tensorboard`).
        command: command line that the report shows.
        callback: called after every evaluation with the trial, its number and the mean loss since the one before.
        on_end: called with model, maker and optimizer of every training that ended well, where workers=1.
    """
    require_extra()
    from gradmaker.compare.progress import board

    seeds, count, tuned = _checked_seeds(seeds), _checked_workers(workers), Tuning.parse(tuning)
    _check_numbers(batch_size, momentum, schedule)
    rows = parse_rows(methods, learning_rates, momentum)
    for row in rows:
        row.check()
    tuned.check(rows)
    for row in rows:
        tuned.of(row)
    _check_events(tensorboard)
    problem = prepare(task, str(device), validation)
    length = Budget.parse(task.options.get("budget", "20 epochs") if budget is None else budget)
    if length.unit == "seconds" and count > 1:
        raise InputError(f"budget={str(length)!r}: trainings at a time slow each other: give workers=1, or steps or epochs")
    setting = _setting(problem, length, _batch_size(problem, batch_size), schedule, validation, seeds[0])
    checked_vary = _checked_vary(vary or {}, rows, problem)
    results = [_result(row, problem, seeds[0]) for row in rows]
    store = Store(Path(out).resolve())
    comparison = Comparison(
        rows=results,
        setting=setting,
        seeds=seeds,
        out=Path(out).resolve(),
        model=str(problem.initial_model(seeds[0])),
        data=problem.described(),
        machine=cost.machine(str(device)),
        command=command,
        metric=problem.metric,
        higher=problem.higher,
        tuning=asdict(tuned),
        target=target,
    )
    able = [result for result in results if not result.refusal]
    trials = sum(tuned.planned(result.row) + len(seeds) - 1 for result in able)
    with board(trials, progress) as shown:
        trainer = _trainer(problem, count, shown, setting, callback, on_end)
        runner = Runner(problem, setting, tuned, seeds, store, trainer, shown)
        try:
            _run(runner, comparison, checked_vary, count, progress)
        finally:
            trainer.close()
    write(comparison, store, progress)
    if tensorboard:
        from gradmaker.compare.trials.events import write_events

        write_events(comparison)
    return comparison


def write(comparison: Comparison, store: Store | None = None, shown: bool = False) -> None:
    """Write the report of a comparison into its folder `out`: one that was just made, read from its JSON, or merged."""
    from rich.console import Console

    from gradmaker.compare.page import write_report
    from gradmaker.compare.progress import print_summary

    store = Store(comparison.out) if store is None else store
    store.records |= {record.key: record for record in comparison.records()}
    store.comparison = comparison.plain()
    write_report(comparison, store)
    if shown:
        print_summary(Console(), comparison)


def _run(runner: Runner, comparison: Comparison, settings: Mapping[str, Sequence[Any]], workers: int, shown: bool) -> None:
    """Run all rows and measure costs. On KeyboardInterrupt, write the report of finished trials and raise it again."""
    from gradmaker.compare.progress import print_refusal, print_resume, print_selection

    console = runner.board.progress.console
    able = [result for result in comparison.rows if not result.refusal]
    try:
        for result in comparison.rows:
            if shown and result.refusal:
                print_refusal(console, result)
        for group in [able] if workers > 1 and able else [[result] for result in able]:
            runner.search(group)
            for result in group if shown else ():
                print_selection(console, result, comparison.metric)
        runner.costs(able)
        comparison.sensitivity, comparison.varied = runner.vary(able, settings)
    except KeyboardInterrupt:
        comparison.complete = False
        runner.board.progress.stop()
        if comparison.measured:
            comparison.rows = [result for result in comparison.rows if result.finals or result.refusal]
            write(comparison, runner.store, shown)
        if shown:
            print_resume(console, comparison.out, comparison.command)
        raise


def _trainer(
    problem: Problem,
    workers: int,
    board: "Board",
    setting: Setting,
    callback: Callback | None,
    on_end: Callable[[Session], None],
) -> Trainer:
    def start(trial: Trial) -> None:
        steps = Budget.parse(setting.budget).steps(problem.train.steps(trial.setting.batch_size))
        board.start(str(trial), steps)

    def mark(trial: Trial, number: int, loss: float) -> None:
        board.note(f"loss {loss:.4f}")
        if callback is not None:
            callback(trial, number, loss)

    if workers == 1:
        return Inline(problem, start, board.step, mark, on_end)
    check_pool()
    return Processes(problem.task, problem.device, setting.validation, workers, mark)


def _result(row: Row, problem: Problem, seed: int) -> RowResult:
    """The row before its training. Builds it once: a model that the method refuses is a row that says why."""
    result = RowResult(row, row.describe(), metric=problem.metric)
    try:
        network: nn.Module = problem.initial_model(seed)
        maker = row.build_maker(network)
        row.build_optimizer(network, row.learning_rates[0])
    except Exception as error:  # whatever it is, the other rows go on
        result.refusal = " ".join(str(error).split()) or type(error).__name__
        return result
    if maker is not None:
        maker.remove()
    return result


def _checked_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(dict.fromkeys(seeds))
    if not chosen:
        raise InputError(f"seeds={seeds!r}: expected at least one seed")
    return chosen


def _checked_workers(workers: int | None) -> int:
    if workers is not None and workers < 1:
        raise InputError(f"workers={workers!r}: expected an integer of at least 1, or none for as many as there are cores")
    return workers_of(workers)


def _check_events(wanted: bool) -> None:
    if wanted:
        require_extra(["tensorboard"], extra="tensorboard")


def _check_numbers(batch_size: int | None, momentum: float | None, schedule: str) -> None:
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size={batch_size!r}: expected an integer of at least 1")
    if momentum is not None and not 0 <= momentum < 1:
        raise InputError(f"momentum={momentum!r}: expected 0 <= momentum < 1")
    if schedule not in SCHEDULES:
        raise InputError(f"schedule={schedule!r}: {did_you_mean(schedule, SCHEDULES)}")


def _batch_size(problem: Problem, given: int | None) -> int:
    """Examples in a batch: as given, else of the loader, else of the task. InputError for ready batches."""
    if isinstance(problem.train, ReadyBatches):
        if given is not None:
            raise InputError(f"batch_size={given}: train is an iterable of batches, which have a size already")
        return problem.first_calls(0, 1)[0].size
    return given or problem.train.own or problem.task.batch_size


def _checked_vary(settings: Mapping[str, Sequence[Any]], rows: Sequence[Row], problem: Problem) -> Mapping[str, Sequence[Any]]:
    for name, values in settings.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise InputError(f"vary: {name}={values!r}: expected a list of values")
        if name == "batch_size" and isinstance(problem.train, ReadyBatches):
            raise InputError("vary: train is an iterable of batches, which have a size already")
        if name != "batch_size" and not any(row.takes(name) for row in rows):
            raise InputError(f"vary: none of the rows has an option {name!r}")
    return settings


def _setting(problem: Problem, budget: Budget, batch_size: int, schedule: str, validation: float, seed: int) -> Setting:
    start, loss = problem.initial_model(seed), problem.task.loss
    sums = {name: float(p.detach().double().sum()) for name, p in start.named_parameters()}
    values = problem.first_values(seed, batch_size)  # edited code of a forward, loss or metric is not in any name
    return Setting(
        budget=str(budget),
        batch_size=batch_size,
        schedule=schedule,
        validation=validation,
        device=problem.device,
        loss=str(getattr(loss, "__qualname__", loss)),
        metrics=tuple(problem.metrics),
        data=problem.fingerprint(),
        model=digest([str(start), sums, values]),
        version=__version__,
    )
