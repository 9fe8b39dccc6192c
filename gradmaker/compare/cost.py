"""Step time and peak memory of every row, and their ratios to plain SGD: one model, one batch size, one process."""

import gc
import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from gradmaker.compare.batches.reading import Call
from gradmaker.compare.problem import Problem, synchronize
from gradmaker.compare.rows import Row
from gradmaker.compare.trial import Session

ROUNDS = 15
SECONDS = 4.0  # measuring time of a row; it bounds the number of rounds, of which there are at least three
BLOCK = (5, 50)  # least steps timed together, and those of an interval that is too long or that is a schedule
LONGEST = 100  # an interval up to which a block holds all of its steps, whatever they take
BLOCK_SECONDS = 0.02  # least duration of a block, against the resolution of the clock and other processes
WARM_UP = 200
WARMING = ("start_step", "warmup_steps")
INTERVALS = ("curvature_interval", "preconditioner_interval")
REFERENCE = Row(label="plain SGD", maker=None, optimizer="SGD", options={"momentum": 0.9}, learning_rates=(1e-3,))
CALLS = 50  # most batches of the timed steps, which are held in memory
RATE = 1e-4  # learning rate of timed steps, small so that they do not diverge
MEMORY_NOTE = {
    "cpu": "highest sum of live CPU tensor bytes (model, gradients, optimizer and maker state, temporaries; not the data) "
    "from building the model to the end of the measured steps, by torch.profiler's allocation events",
    "cuda": "torch.cuda.max_memory_allocated from building the model to the end of the measured steps, less what the data hold",
}


@dataclass
class Cost:
    """Seconds per step and peak bytes of a row, and their ratios to plain SGD."""

    step_seconds: float
    step_ratio: float
    peak_bytes: int | None
    memory_ratio: float | None

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return asdict(self)


class Bench:
    """A row that is timed: its own copy of the model, and calls that all rows share."""

    def __init__(self, row: Row, problem: Problem, calls: Sequence[Call]) -> None:
        self.device, self.calls = problem.device, calls
        self.session = Session(row, problem.initial_model(0).train(), RATE, problem.loss)
        config = getattr(self.session.maker, "config", None)
        intervals = [getattr(config, name, 1) for name in INTERVALS]
        # a scheduled interval is no number: its refreshes are averaged over the longest block
        self.interval = math.lcm(*(every if isinstance(every, int) else BLOCK[1] for every in intervals))
        self.block = min(max(BLOCK[0], self.interval), BLOCK[1])
        self.warm_up = min(max(self.block, sum(getattr(config, name, 0) for name in WARMING) + 1), WARM_UP)
        self.done = self.rounds = 0

    def prepare(self) -> None:
        """Warm up, then set the length of a block and the number of rounds from the time of a step."""
        self.run(self.warm_up)
        step = self.run(self.block)
        self.block = block_of(self.interval, step)
        self.rounds = max(3, min(ROUNDS, round(SECONDS / (step * self.block))))

    def run(self, steps: int) -> float:
        """Run `steps` steps and return the seconds per step."""
        synchronize(self.device)
        start = perf_counter()
        for _ in range(steps):
            self.session.step(self.calls[self.done % len(self.calls)])
            self.done += 1
        synchronize(self.device)
        return (perf_counter() - start) / steps


def block_of(interval: int, step: float) -> int:
    """Steps that are timed together: whole intervals, so that every block has as many refreshes as the average.

    At least `BLOCK` and `BLOCK_SECONDS`. An interval beyond 100 steps and `SECONDS` is not measured whole.
    """
    least = max(BLOCK[0], math.ceil(BLOCK_SECONDS / step))
    whole = math.ceil(least / interval) * interval
    return whole if whole <= max(LONGEST, SECONDS / step) else max(least, BLOCK[1])


def measure(rows: Mapping[str, Row], problem: Problem, batch_size: int, tick: Callable[[], None]) -> dict[str, Cost]:
    """Measure the cost of every row; returns costs by the keys of `rows`.

    Args:
        tick: called after each measured row and round.
    """
    calls = problem.first_calls(batch_size, CALLS)
    peak = {key: peak_bytes(row, problem, calls) for key, row in rows.items()}
    reference = peak_bytes(REFERENCE, problem, calls)
    seconds, ratio = _timed(rows, problem, calls, tick)
    return {
        key: Cost(seconds[key], ratio[key], bytes_, bytes_ / reference if bytes_ and reference else None)
        for key, bytes_ in peak.items()
    }


def is_reference(row: Row) -> bool:
    """Whether the row is plain SGD, with or without momentum: its ratios are 1 by definition."""
    return row.maker is None and row.optimizer == "SGD"


def _timed(
    rows: Mapping[str, Row], problem: Problem, calls: Sequence[Call], tick: Callable[[], None]
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds and ratios over rounds. In a round, a block of the row is between two blocks of SGD: drift cancels."""
    reference = Bench(REFERENCE, problem, calls)
    benches = {key: Bench(row, problem, calls) for key, row in rows.items()}
    for bench in (reference, *benches.values()):
        bench.prepare()
    seconds: dict[str, list[float]] = {key: [] for key in rows}
    ratios: dict[str, list[float]] = {key: [] for key in rows}
    for turn in range(ROUNDS):
        for key, bench in benches.items():
            if turn < bench.rounds:
                before, own, after = (each.run(each.block) for each in (reference, bench, reference))
                base = (before + after) / 2
                own = base if is_reference(rows[key]) else own
                seconds[key].append(own)
                ratios[key].append(own / base)
            tick()
    for bench in (reference, *benches.values()):
        bench.session.close()
    return {key: median(values) for key, values in seconds.items()}, {key: median(values) for key, values in ratios.items()}


def peak_bytes(row: Row, problem: Problem, calls: Sequence[Call]) -> int | None:
    """Peak memory of building the row and running steps with a refresh of the preconditioner; None elsewhere."""
    if is_reference(row):
        row = REFERENCE
    gc.collect()

    def work() -> None:
        bench = Bench(row, problem, calls)
        bench.run(min(bench.block, 10) + 1)
        bench.session.close()

    return peak_of(work, problem.device)


def peak_of(work: Callable[[], None], device: str) -> int | None:
    """Peak bytes of tensors on a device while something runs; None where they cannot be measured."""
    measures = {"cuda": _cuda_peak, "cpu": cpu_peak}
    kind = torch.device(device).type
    return measures[kind](work) if kind in measures else None


def _cuda_peak(work: Callable[[], None]) -> int:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before


def cpu_peak(work: Callable[[], None]) -> int:
    """Highest sum of live CPU tensor bytes while something runs; tensors from before it do not count.

    It is the maximum of the running sum of the allocation events of `torch.profiler`.
    """
    activity = [torch.profiler.ProfilerActivity.CPU]
    with _quiet_profiler(), torch.profiler.profile(activities=activity, profile_memory=True) as profiler:
        work()
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    live = peak = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        live += int(event["args"]["Bytes"])
        peak = max(peak, live)
    return peak


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Context that suppresses the two lines that kineto, torch's profiler, prints at its start and stop."""
    known = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = known or "99"
    try:
        yield
    finally:
        if known is None:
            del os.environ["KINETO_LOG_LEVEL"]


def machine(device: str) -> dict[str, Any]:
    """Processor, versions and date for the report, without the name of the machine."""
    facts: dict[str, Any] = {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.device(device).type == "cuda":
        facts["device"] = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "python": platform.python_version(), "system": platform.system()}
    return {**facts, **versions, "date": date.today().isoformat()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
