"""Trainings one after the other in this process, or several at a time in processes of their own."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gradmaker.compare.cost import machine
from gradmaker.compare.errors import require_extra
from gradmaker.compare.problem import Problem, prepare
from gradmaker.compare.task import Task
from gradmaker.compare.trial import Record, Session, Trial, blank, run_trial
from gradmaker.options.registry import METHODS

ENDED = "its process was ended before the training was; the system does so where memory runs out"
Told = Callable[[Trial, int, float], None]


class Trainer(Protocol):
    """Runs trainings."""

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, Record]]:
        """Trainings and their records, as they end."""

    def close(self) -> None:
        """End what was started."""


@dataclass
class Inline:
    """Runs trainings in this process."""

    problem: Problem
    on_start: Callable[[Trial], None]
    on_step: Callable[[], None]
    on_mark: Told
    on_end: Callable[[Session], None] = lambda session: None

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, Record]]:
        facts = machine(self.problem.device)
        for trial in trials:
            self.on_start(trial)
            yield trial, run_trial(trial, self.problem, self.on_step, Marks(self.on_mark, trial), facts, self.on_end)

    def close(self) -> None:
        """Nothing was started."""


@dataclass
class Marks:
    """Tells of the evaluations of a trial."""

    told: Told
    trial: Trial

    def __call__(self, number: int, loss: float) -> None:
        """Tell of one."""
        self.told(self.trial, number, loss)


class Processes:
    """Runs so many trainings at a time, each in a process; one that is killed does not end the others."""

    def __init__(self, task: Task, device: str, validation: float, workers: int, on_mark: Told) -> None:
        self.workers, self.on_mark = workers, on_mark
        own = {name: maker for name, maker in METHODS.items() if not maker.__module__.startswith("gradmaker.")}
        self.start = (task, device, validation, max(1, torch.get_num_threads() // workers), own)
        self.pools: dict[int, Any] = {}

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, Record]]:
        suspects: list[Trial] = []
        for trial, record in self._run(trials, self.workers):
            if record is None:
                suspects.append(trial)
            else:
                yield trial, self._told(trial, record)
        # the end of a process ends all trainings that are under way: each of them is tried again alone
        for trial, record in self._run(suspects, 1):
            yield trial, self._told(trial, record or _ended(trial))

    def close(self) -> None:
        for pool in self.pools.values():
            pool.shutdown(kill_workers=True)
        self.pools = {}

    def _run(self, trials: Sequence[Trial], workers: int) -> Iterator[tuple[Trial, Record | None]]:
        """Trainings with their records as they end; None for one whose process ended, or another beside it."""
        waiting = list(trials)
        running: dict[Any, Trial] = {}
        while waiting or running:
            # no more than can run: what is under way when a process ends is under suspicion
            while waiting and len(running) < workers:
                trial = waiting.pop(0)
                running[self._submit(trial, workers)] = trial
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), self._result(future, workers)

    def _submit(self, trial: Trial, workers: int) -> Any:
        from joblib.externals.loky.process_executor import ProcessPoolExecutor

        if workers not in self.pools:
            self.pools[workers] = ProcessPoolExecutor(max_workers=workers, initializer=_begin, initargs=self.start)
        try:
            return self.pools[workers].submit(_work, trial)
        except RuntimeError:  # a worker ended while it was idle
            self._drop(workers)
            return self._submit(trial, workers)

    def _result(self, future: Any, workers: int) -> Record | None:
        from joblib.externals.loky.process_executor import BrokenProcessPool

        try:
            record: Record = future.result()
        except BrokenProcessPool:
            self._drop(workers)
            return None
        return record

    def _drop(self, workers: int) -> None:
        if (pool := self.pools.pop(workers, None)) is not None:
            pool.shutdown(kill_workers=True)

    def _told(self, trial: Trial, record: Record) -> Record:
        for number, loss in enumerate(record.train_loss, 1):
            self.on_mark(trial, number, float("nan") if loss is None else loss)
        return record


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


def _ended(trial: Trial) -> Record:
    record = blank(trial, {})
    record.status, record.message = "failed", ENDED
    return record
