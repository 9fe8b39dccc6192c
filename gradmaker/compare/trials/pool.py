"""Trainings one after the other in this process, or several at a time in processes of their own."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gradmaker.compare.cost import machine
from gradmaker.compare.errors import require_extra
from gradmaker.compare.problem import Problem, prepare
from gradmaker.compare.task import Task
from gradmaker.compare.trial import Record, Session, Trial, blank, run_trial
from gradmaker.options.registry import METHODS

ENDED = "its process ended before the training ({}); the system ends processes so when memory runs out"


class Trainer(Protocol):
    """Runs trainings."""

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, Record]]:
        """Trainings and their records, as they end."""


@dataclass
class Inline:
    """Runs trainings in this process."""

    problem: Problem
    on_start: Callable[[Trial], None]
    on_step: Callable[[], None]
    on_mark: Callable[[Trial, int, float], None]
    on_end: Callable[[Session], None] = lambda session: None

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, Record]]:
        facts = machine(self.problem.device)
        for trial in trials:
            self.on_start(trial)
            yield trial, run_trial(trial, self.problem, self.on_step, Marks(self.on_mark, trial), facts, self.on_end)


@dataclass
class Marks:
    """Tells of the evaluations of a trial."""

    told: Callable[[Trial, int, float], None]
    trial: Trial

    def __call__(self, number: int, loss: float) -> None:
        """Tell of one."""
        self.told(self.trial, number, loss)


@dataclass
class Processes:
    """Runs so many trainings at a time, each in a process; one that is killed does not end the others."""

    task: Task
    device: str
    validation: float
    workers: int
    on_mark: Callable[[Trial, int, float], None]

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, Record]]:
        waiting = list(trials)
        for workers, kept in ((self.workers, trials), (1, waiting)):
            groups = [list(kept)] if workers > 1 else [[trial] for trial in kept]
            for group in groups:
                for trial, record in self._together(group, workers, alone=workers == 1):
                    waiting.remove(trial)
                    for number, loss in enumerate(record.train_loss, 1):
                        self.on_mark(trial, number, float("nan") if loss is None else loss)
                    yield trial, record
            if not waiting:
                return

    def _together(self, trials: Sequence[Trial], workers: int, alone: bool) -> Iterator[tuple[Trial, Record]]:
        """Records of those whose process did not end; with `alone`, a record that says so of the others."""
        from joblib.externals.loky import as_completed
        from joblib.externals.loky.process_executor import BrokenProcessPool, ProcessPoolExecutor

        threads = max(1, torch.get_num_threads() // workers)
        own = {name: maker for name, maker in METHODS.items() if not maker.__module__.startswith("gradmaker.")}
        start = (self.task, self.device, self.validation, threads, own)
        pool = ProcessPoolExecutor(max_workers=workers, initializer=_begin, initargs=start)
        try:
            futures = {pool.submit(_work, trial): trial for trial in trials}
            for future in as_completed(futures):
                trial = futures[future]
                try:
                    yield trial, future.result()
                except BrokenProcessPool as error:
                    if alone:
                        yield trial, _ended(trial, error)
        finally:
            pool.shutdown(kill_workers=True)


def workers_of(given: int | None) -> int:
    """So many trainings at a time; None: a process for each core, of those that this process may use."""
    if given is not None:
        return given
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_pool() -> None:
    """InputError where trainings cannot be run in processes."""
    require_extra(["joblib"])


_STATE: dict[str, Any] = {}
"""What a worker process holds: the problem and the facts of the machine."""


def _begin(task: Task, device: str, validation: float, threads: int, makers: Mapping[str, Any]) -> None:
    torch.set_num_threads(threads)
    for name, maker in makers.items():
        if name not in METHODS:
            METHODS.add(name, maker)
    _STATE.update(problem=prepare(task, device, validation), machine=machine(device))


def _work(trial: Trial) -> Record:
    return run_trial(trial, _STATE["problem"], lambda: None, lambda number, loss: None, _STATE["machine"])


def _ended(trial: Trial, error: Exception) -> Record:
    words = str(error)
    signal = next((name for name in ("SIGKILL", "SIGSEGV", "SIGABRT", "SIGBUS") if name in words), type(error).__name__)
    record = blank(trial, {})
    record.status, record.message = "failed", ENDED.format(signal)
    return record
