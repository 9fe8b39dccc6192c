"""One training of a row at one learning rate from one seed, and its record."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from gradmaker.compare.data import Split
from gradmaker.compare.rows import Row

Loss = Callable[[Tensor, Tensor], Tensor]
SCHEDULES: dict[str, Callable[[float], float]] = {  # factor of the learning rate at a fraction of the training
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
CURVE_POINTS = 2000  # longer loss curves are averaged to this many points
EVALUATION_BATCH = 2048


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The settings that all trials of a comparison share; part of the key of a trial."""

    epochs: int
    batch_size: int
    schedule: str
    validation: float
    device: str
    loss: str
    data: str
    model: str
    version: str


@dataclass(frozen=True)
class Trial:
    """A training to run: row, learning rate and seed."""

    row: Row
    config: dict[str, Any]
    learning_rate: float
    seed: int

    def key(self, setting: Setting) -> str:
        """A hash of all that determines the training; it does not depend on the label of the row."""
        return digest({"config": self.config, "rate": self.learning_rate, "seed": self.seed, **asdict(setting)})

    def __str__(self) -> str:
        return f"{self.row.label}  lr {self.learning_rate:g}  seed {self.seed}"


@dataclass
class Record:
    """The measurements of one training. Losses are means over samples; times are seconds without evaluation."""

    label: str
    method: str
    config: dict[str, Any]
    learning_rate: float
    seed: int
    status: str = "finished"  # or "diverged", "failed"
    message: str = ""
    curve_steps: list[float] = field(default_factory=list)
    curve_loss: list[float | None] = field(default_factory=list)
    epoch_steps: list[int] = field(default_factory=list)
    epoch_time: list[float] = field(default_factory=list)
    train_loss: list[float | None] = field(default_factory=list)
    validation_loss: list[float | None] = field(default_factory=list)
    validation_accuracy: list[float | None] = field(default_factory=list)
    test_loss: list[float | None] = field(default_factory=list)
    test_accuracy: list[float | None] = field(default_factory=list)

    def end(self, name: str) -> float:
        """The last value of a per-epoch list; NaN when there is none."""
        values: list[float | None] = getattr(self, name)
        return math.nan if not values or values[-1] is None else float(values[-1])


class Session:
    """A model with maker, optimizer and scheduler; one call of `step` is one update."""

    def __init__(self, row: Row, model: nn.Module, learning_rate: float, loss: Loss, steps: int, schedule: str) -> None:
        self.model, self.loss = model, loss
        self.maker = row.build_maker(model)
        self.optimizer = row.build_optimizer(model, learning_rate)
        factor = SCHEDULES[schedule]
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: factor(min(1.0, step / max(1, steps))))

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the gradient, precondition it, update the weights; returns the loss without waiting for the device."""
        self.optimizer.zero_grad()
        value = self._backward(inputs, targets) if self.maker is None else self._make_gradient(inputs, targets)
        self.optimizer.step()
        self.scheduler.step()
        return value

    def close(self) -> None:
        """Remove the maker and its hooks."""
        if self.maker is not None:
            self.maker.remove()

    def _backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        value = self.loss(self.model(inputs), targets)
        value.backward()
        return value.detach()

    def _make_gradient(self, inputs: Tensor, targets: Tensor) -> Tensor:
        outputs = self.maker.setup_model_call(self.model, inputs)
        self.maker.setup_loss_call(self.loss, outputs, targets)
        _, value = self.maker.forward_and_backward()
        return torch.as_tensor(value).detach()


def digest(value: Any) -> str:
    """A short stable hash of plain values."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=10).hexdigest()


@contextmanager
def seeded(seed: int, device: str) -> Iterator[None]:
    """Context with torch's global generators at `seed`; restores their states afterwards."""
    cuda = [torch.cuda.current_device()] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        yield


def initial_model(model: Callable[[], nn.Module], seed: int, device: str) -> nn.Module:
    """The initial model under a seed, the same for every method."""
    with seeded(seed, device):
        return model().to(device)


def batch_order(size: int, batch_size: int, seed: int, epoch: int, device: str) -> Tensor:
    """Sample indices (steps, batch) of one epoch: they depend on seed and epoch only; the last, smaller batch is dropped."""
    batch_size = min(batch_size, size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[: size // batch_size * batch_size].view(-1, batch_size).to(device)


def synchronize(device: str) -> None:
    """Wait for the device, before a clock is read."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def run_trial(
    trial: Trial,
    model: Callable[[], nn.Module],
    split: Split,
    loss: Loss,
    setting: Setting,
    on_step: Callable[[], None],
    on_epoch: Callable[[int, float], None],
) -> Record:
    """Train and return the record; a trial that diverges or raises has the status diverged or failed.

    Args:
        on_step: called at every step, without the loss, which would wait for the device.
        on_epoch: called with the epoch's number and its mean loss.
    """
    record = Record(trial.row.label, trial.row.method, trial.config, trial.learning_rate, trial.seed)
    try:
        with seeded(trial.seed, setting.device):
            network = model().to(setting.device)
            _train(record, trial, network, split, loss, setting, on_step, on_epoch)
    except Exception as error:  # the failure of one method must not end the comparison
        record.status, record.message = "failed", f"{type(error).__name__}: {error}"
    return _downsampled(record)


def _train(
    record: Record,
    trial: Trial,
    network: nn.Module,
    split: Split,
    loss: Loss,
    setting: Setting,
    on_step: Callable[[], None],
    on_epoch: Callable[[int, float], None],
) -> None:
    size = len(split.train[0])
    steps = steps_per_epoch(size, setting) * setting.epochs
    session = Session(trial.row, network, trial.learning_rate, loss, steps, setting.schedule)
    try:
        for epoch in range(1, setting.epochs + 1):
            order = batch_order(size, setting.batch_size, trial.seed, epoch, setting.device)
            losses, seconds = _epoch(session, split, order, setting.device, on_step)
            _note(record, losses, seconds, evaluate(network, loss, *split.validation), evaluate(network, loss, *split.test))
            on_epoch(epoch, sum(losses) / len(losses))
            if _diverged(record):
                return
    finally:
        session.close()


def steps_per_epoch(size: int, setting: Setting) -> int:
    """Number of updates in one epoch."""
    return size // min(setting.batch_size, size)


def _epoch(
    session: Session, split: Split, order: Tensor, device: str, on_step: Callable[[], None]
) -> tuple[list[float], float]:
    """Train one epoch; returns losses by step and seconds. It waits for the device only at the end."""
    session.model.train()
    losses = []
    synchronize(device)
    start = perf_counter()
    for rows in order:
        losses.append(session.step(split.train[0][rows], split.train[1][rows]))
        on_step()
    synchronize(device)
    return torch.stack(losses).double().tolist(), perf_counter() - start


@torch.no_grad()
def evaluate(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> tuple[float, float | None]:
    """Mean loss, and accuracy where targets are classes."""
    model.eval()
    total, right = 0.0, 0
    for x, t in zip(inputs.split(EVALUATION_BATCH), targets.split(EVALUATION_BATCH), strict=True):
        y = model(x)
        total += float(loss(y, t)) * len(x)
        right += 0 if t.is_floating_point() else int((y.argmax(dim=1) == t).sum())
    accuracy = None if targets.is_floating_point() else right / targets.numel()
    return total / len(inputs), accuracy


def _note(
    record: Record,
    losses: list[float],
    seconds: float,
    validation: tuple[float, float | None],
    test: tuple[float, float | None],
) -> None:
    first = record.epoch_steps[-1] if record.epoch_steps else 0
    record.curve_steps += range(first + 1, first + len(losses) + 1)
    record.curve_loss += [_finite(value) for value in losses]
    record.epoch_steps.append(first + len(losses))
    record.epoch_time.append(round((record.epoch_time or [0.0])[-1] + seconds, 5))
    record.train_loss.append(_finite(sum(losses) / len(losses)))
    record.validation_loss.append(_finite(validation[0]))
    record.validation_accuracy.append(validation[1])
    record.test_loss.append(_finite(test[0]))
    record.test_accuracy.append(test[1])


def _diverged(record: Record) -> bool:
    """Set the status; True if a loss is not finite. Also diverged: last quarter of the last epoch above the first step."""
    if None in (*record.curve_loss, record.validation_loss[-1]):
        record.status, record.message = "diverged", f"loss is not finite in epoch {len(record.epoch_steps)}"
        return True
    losses = [value for value in record.curve_loss if value is not None]
    tail = losses[-max(1, len(losses) // len(record.epoch_steps) // 4) :]
    first, last = losses[0], sum(tail) / len(tail)
    record.status, record.message = "finished", ""
    if last > first:
        record.status, record.message = "diverged", f"the loss ends at {last:.3g}, above the initial {first:.3g}"
    return False


def _finite(value: float) -> float | None:
    return round(value, 7) if math.isfinite(value) else None


def _downsampled(record: Record) -> Record:
    """Average groups of points of a long loss curve; the step of a group is its middle."""
    group = math.ceil(len(record.curve_loss) / CURVE_POINTS)
    if group > 1 and None not in record.curve_loss:
        for name in ("curve_steps", "curve_loss"):
            parts = torch.tensor(getattr(record, name), dtype=torch.float64).split(group)
            setattr(record, name, [round(float(part.mean()), 7) for part in parts])
    return record
