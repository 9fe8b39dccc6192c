"""One training of a row with one set of options from one seed, and its record."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from gradmaker.compare.batches.reading import Call
from gradmaker.compare.problem import Problem, seeded, synchronize
from gradmaker.compare.rows import Row
from gradmaker.compare.search.budgets import Budget, Clock

SCHEDULES: dict[str, Callable[[float], float]] = {  # factor of the learning rate at a fraction of the training
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
MARGIN = 0.25  # a loss that ends higher than it began by less may be noise of a training that is too slow
TAIL = 8  # least steps over which the end of the loss is averaged
CURVE_POINTS = 2000  # longer loss curves are averaged to this many points
MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # torch's words for it, where the type is RuntimeError


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The settings that all trials of a comparison share; part of the key of a trial."""

    budget: str
    batch_size: int
    schedule: str
    validation: float
    device: str
    loss: str
    metrics: tuple[str, ...]
    data: str
    model: str
    version: str


@dataclass(frozen=True)
class Trial:
    """A training to run: row, options that the search gave it, learning rate, seed and setting."""

    row: Row
    config: dict[str, Any]
    learning_rate: float
    seed: int
    setting: Setting
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def key(self) -> str:
        """A hash of all that determines the training; it does not depend on the label of the row."""
        return digest({"config": self.config, "rate": self.learning_rate, "seed": self.seed, **asdict(self.setting)})

    def __str__(self) -> str:
        options = "".join(f"  {name} {value}" for name, value in self.parameters.items())
        return f"{self.row.label}  lr {self.learning_rate:g}{options}  seed {self.seed}"


@dataclass
class Record:
    """The measurements of one training. Losses are means over examples; times are seconds without evaluation.

    Args:
        key: names the training in results.json.
        status: finished, diverged, failed, or out of memory.
        parameters: options that the search chose, besides the learning rate.
        machine: versions and machine on which it ran.
        marks: steps at which it was evaluated: the ends of epochs, or twenty of a budget in steps or seconds.
        train_loss: mean over the steps since the mark before.
        validation, test: `loss` and metrics by name, at the marks.
    """

    label: str
    method: str
    config: dict[str, Any]
    learning_rate: float
    seed: int
    key: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 0
    machine: dict[str, Any] = field(default_factory=dict)
    status: str = "finished"
    message: str = ""
    curve_steps: list[float] = field(default_factory=list)
    curve_loss: list[float | None] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    train_loss: list[float | None] = field(default_factory=list)
    validation: dict[str, list[float | None]] = field(default_factory=dict)
    test: dict[str, list[float | None]] = field(default_factory=dict)

    def end(self, part: str, name: str = "loss") -> float:
        """The last value of `train`, `validation` or `test`; NaN when there is none."""
        values = self.train_loss if part == "train" else getattr(self, part).get(name)
        return math.nan if not values or values[-1] is None else float(values[-1])


class Session:
    """A model with maker, optimizer and scheduler; one call of `step` is one update."""

    def __init__(
        self,
        row: Row,
        model: nn.Module,
        learning_rate: float,
        loss: Callable[[Any, Any], Tensor],
        schedule: str = "constant",
        done: Callable[[int], float] = lambda step: 0.0,
    ) -> None:
        """Build maker and optimizer; `done` gives the fraction of the training after a number of steps."""
        self.model, self.loss = model, loss
        self.maker = row.build_maker(model)
        self.optimizer = row.build_optimizer(model, learning_rate)
        factor = SCHEDULES[schedule]
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: factor(min(1.0, done(step))))

    def step(self, call: Call) -> Tensor:
        """Compute the gradient, precondition it, update the weights; returns the loss without waiting for the device."""
        self.optimizer.zero_grad()
        value = self._backward(call) if self.maker is None else self._make_gradient(call)
        self.optimizer.step()
        self.scheduler.step()
        return value

    def close(self) -> None:
        """Remove the maker and its hooks."""
        if self.maker is not None:
            self.maker.remove()

    def _backward(self, call: Call) -> Tensor:
        value = self.loss(call.outputs(self.model), call.targets)
        value.backward()
        return value.detach()

    def _make_gradient(self, call: Call) -> Tensor:
        outputs = self.maker.setup_model_call(self.model, *call.args, **call.kwargs)
        self.maker.setup_loss_call(self.loss, outputs, call.targets)
        _, value = self.maker.forward_and_backward()
        return torch.as_tensor(value).detach()


def digest(value: Any) -> str:
    """A short stable hash of plain values."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=10).hexdigest()


def run_trial(
    trial: Trial,
    problem: Problem,
    on_step: Callable[[], None],
    on_mark: Callable[[int, float], None],
    machine: dict[str, Any],
    on_end: Callable[[Session], None] = lambda session: None,
) -> Record:
    """Train and return the record; a trial that diverges or raises has the status diverged, failed or out of memory.

    Args:
        on_step: called at every step, without the loss, which would wait for the device.
        on_mark: called after each evaluation with its number and the mean loss since the last.
        machine: for the record.
        on_end: called with the trained model, its maker and its optimizer.
    """
    record = blank(trial, machine)
    try:
        with seeded(trial.seed, problem.device):
            network = problem.model().to(problem.device)
            _train(record, trial, network, problem, on_step, on_mark, on_end)
    except Exception as error:  # the failure of one method must not end the comparison
        record.status, record.message = _status(error), f"{type(error).__name__}: {error}"
    return _downsampled(record)


def blank(trial: Trial, machine: dict[str, Any]) -> Record:
    """The record of a training before its first step."""
    return Record(
        label=trial.row.label,
        method=trial.row.method,
        config=trial.config,
        learning_rate=trial.learning_rate,
        seed=trial.seed,
        key=trial.key(),
        parameters=dict(trial.parameters),
        batch_size=trial.setting.batch_size,
        machine=machine,
    )


def _status(error: Exception) -> str:
    lacking = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in str(error) for words in MEMORY)
    return "out of memory" if lacking else "failed"


def _train(
    record: Record,
    trial: Trial,
    network: nn.Module,
    problem: Problem,
    on_step: Callable[[], None],
    on_mark: Callable[[int, float], None],
    on_end: Callable[[Session], None],
) -> None:
    setting = trial.setting
    clock = Clock(Budget.parse(setting.budget), problem.train.steps(setting.batch_size))
    session = Session(trial.row, network, trial.learning_rate, problem.loss, setting.schedule, clock.done)
    calls = _stream(problem, setting, trial.seed)
    try:
        while not clock.over:
            losses, seconds = _leg(session, calls, clock, problem.device, on_step)
            found = {name: problem.evaluate(network, getattr(problem, name)) for name in ("validation", "test")}
            _note(record, losses, seconds, found)
            on_mark(len(record.marks), sum(losses) / len(losses))
            if _diverged(record):
                return
        on_end(session)
    finally:
        session.close()


def _stream(problem: Problem, setting: Setting, seed: int) -> Iterator[Call]:
    """The calls of all epochs, one after the other; they depend on the seed alone."""
    epoch = 1
    while True:
        yield from problem.calls(setting.batch_size, seed, epoch)
        epoch += 1


def _leg(
    session: Session, calls: Iterator[Call], clock: Clock, device: str, on_step: Callable[[], None]
) -> tuple[list[float], float]:
    """Train to the next mark; returns losses by step and seconds. It waits for the device only where the clock has to."""
    session.model.train()
    losses: list[Tensor] = []
    synchronize(device)
    start = perf_counter()
    while clock.goes_on(len(losses), perf_counter() - start):
        losses.append(session.step(next(calls)))
        on_step()
        if clock.by_time:
            synchronize(device)
    synchronize(device)
    seconds = perf_counter() - start
    clock.end_leg(len(losses), seconds)
    return torch.stack(losses).double().tolist(), seconds


def _note(record: Record, losses: list[float], seconds: float, found: Mapping[str, Mapping[str, float]]) -> None:
    first = record.marks[-1] if record.marks else 0
    record.curve_steps += range(first + 1, first + len(losses) + 1)
    record.curve_loss += [_finite(value) for value in losses]
    record.marks.append(first + len(losses))
    record.seconds.append(round((record.seconds or [0.0])[-1] + seconds, 5))
    record.train_loss.append(_finite(sum(losses) / len(losses)))
    for part, values in found.items():
        for name, value in values.items():
            getattr(record, part).setdefault(name, []).append(_finite(value))


def _diverged(record: Record) -> bool:
    """Set the status; True if a loss is not finite. Also diverged: a loss that ends far above its start."""
    if None in (*record.curve_loss, record.validation["loss"][-1]):
        record.status, record.message = "diverged", f"loss is not finite after {record.marks[-1]} steps"
        return True
    losses = [value for value in record.curve_loss if value is not None]
    tail = losses[-max(1, len(losses) // len(record.marks) // 4, min(TAIL, len(losses) // 2)) :]
    first, last = losses[0], fmean(tail)
    spread = min(abs(first), stdev(tail) if len(tail) > 1 else math.inf)  # of single batches, as the first one is
    record.status, record.message = "finished", ""
    if last - first > MARGIN * abs(first) + 2 * spread:
        record.status, record.message = "diverged", f"the loss ends at {last:.3g}, far above the initial {first:.3g}"
    return False


def _finite(value: float) -> float | None:
    return float(f"{value:.8g}") if math.isfinite(value) else None


def _downsampled(record: Record) -> Record:
    """Average groups of points of a long loss curve; the step of a group is its middle."""
    group = math.ceil(len(record.curve_loss) / CURVE_POINTS)
    if group > 1 and None not in record.curve_loss:
        for name in ("curve_steps", "curve_loss"):
            parts = torch.tensor(getattr(record, name), dtype=torch.float64).split(group)
            setattr(record, name, [float(f"{float(part.mean()):.8g}") for part in parts])
    return record
