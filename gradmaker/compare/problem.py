"""`Problem`: a task made ready, with sources of batches, checked once on its first batch."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradmaker.compare.batches.measures import evaluate, loss_of, metrics_of
from gradmaker.compare.batches.reading import Call, Reader
from gradmaker.compare.batches.sources import Source, divided, source_of
from gradmaker.compare.batches.trees import leaves
from gradmaker.compare.errors import InputError
from gradmaker.compare.task import Metric, Task

EVALUATION = (2048, 2**22)  # most examples of an evaluated batch, and most numbers in its inputs and outputs


@dataclass(frozen=True)
class Problem:
    """What the trainings of a comparison share: model, parts of the data, loss and metrics on a device."""

    task: Task
    device: str
    model: Callable[[], nn.Module]
    train: Source
    validation: Source
    test: Source
    read: Reader
    loss: Callable[[Any, Any], Tensor]
    metrics: dict[str, Metric]
    evaluation_size: int

    @property
    def metric(self) -> str:
        """The name of the metric that selects: the first one, or `loss`."""
        return next(iter(self.metrics), "loss")

    @property
    def higher(self) -> bool:
        """Whether a higher value of the selecting metric is better."""
        return self.metrics[self.metric].higher if self.metrics else False

    def initial_model(self, seed: int) -> nn.Module:
        """The initial model under a seed, the same for every method."""
        with seeded(seed, self.device):
            return self.model().to(self.device)

    def calls(self, batch_size: int, seed: int, epoch: int) -> Iterator[Call]:
        """The calls of a training epoch."""
        return map(self.read, self.train.epoch(batch_size, seed, epoch))

    def first_calls(self, batch_size: int, number: int) -> list[Call]:
        """The first calls of an epoch, held in memory, for measurements of cost."""
        return [call for call, _ in zip(self.calls(batch_size, 0, 0), range(number), strict=False)]

    def evaluate(self, network: nn.Module, source: Source) -> dict[str, float]:
        """Loss and metrics on a part of the data."""
        return evaluate(network, self.loss, self.metrics, map(self.read, source.all(self.evaluation_size)))

    def first_values(self, seed: int, batch_size: int) -> list[str]:
        """Loss and metrics of the initial model on a first batch, as in training and as in evaluation, to a few digits."""
        network, (call,) = self.initial_model(seed), self.first_calls(batch_size, 1)
        with seeded(seed, self.device), torch.no_grad():
            trained = float(self.loss(call.outputs(network.train()), call.targets))
        found = evaluate(network, self.loss, self.metrics, [call])
        return [f"{name} {value:.4e}" for name, value in [("training", trained), *found.items()]]

    def described(self) -> dict[str, Any]:
        """Name and sizes of the data for the report."""
        sizes = {name: getattr(self, name).size for name in ("train", "validation", "test")}
        return {"name": self.task.name, **sizes, "test_is_validation": self.test is self.validation}

    def fingerprint(self) -> str:
        """The name of the data with hashes of its parts."""
        parts = {id(part): part.fingerprint() for part in (self.train, self.validation, self.test)}
        return " ".join([self.task.name, *parts.values()])


def prepare(task: Task, device: str, validation: float = 0.1) -> Problem:
    """Make a task ready. InputError where its parts do not fit: data, model, loss and metrics are tried on a first batch."""
    if not isinstance(task, Task):
        raise InputError(f"task: expected a Task(model=..., train=..., ...), got {type(task).__name__}")
    model = _factory(task)
    train, held = _selecting(task, validation)
    test = held if task.test is None else source_of(task.test, "test")
    train, held, test = (part.to(device) for part in (train, held, test)) if test is not held else _pair(train, held, device)
    network = _network(model, device)
    read = Reader(task.inputs, task.targets, network, device)
    call = _first(train, read, task.batch_size)
    outputs = _tried("the model cannot be called with a batch", partial(_outputs, call, network))
    loss = loss_of(task.loss, outputs, call.targets)
    metrics = metrics_of(task.metrics, loss, outputs, call.targets)
    value = _tried("the loss cannot be computed", lambda: loss(outputs, call.targets))
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise InputError(f"loss: expected a tensor with one value, got {_kind(value)}")
    for name, metric in metrics.items():
        _tried(f"the metric {name!r} cannot be computed", partial(metric.function, outputs, call.targets))
    size = _evaluation_size(task.batch_size, call, outputs)
    return Problem(task, device, model, train, held, test, read, loss, metrics, size)


def _factory(task: Task) -> Callable[[], nn.Module]:
    if isinstance(task.model, nn.Module):
        return partial(copy.deepcopy, task.model)
    if not callable(task.model):
        raise InputError(f"model: expected an nn.Module or a function that returns one, got {type(task.model).__name__}")
    return task.model


def _network(model: Callable[[], nn.Module], device: str) -> nn.Module:
    with seeded(0, device):
        made: Any = _tried("the model cannot be made", model)
    if not isinstance(made, nn.Module):
        raise InputError(f"model: the function returned {_kind(made)}, expected an nn.Module")
    if not any(parameter.requires_grad for parameter in made.parameters()):
        raise InputError("model: it has no parameter that requires a gradient")
    return made.to(device)


def _selecting(task: Task, validation: float) -> tuple[Source, Source]:
    train = source_of(task.train, "train")
    if task.validation is not None:
        return train, source_of(task.validation, "validation")
    return divided(train, validation)


def _pair(train: Source, held: Source, device: str) -> tuple[Source, Source, Source]:
    shared = held.to(device)
    return train.to(device), shared, shared


def _first(train: Source, read: Reader, batch_size: int) -> Call:
    batch = next(train.epoch(batch_size, 0, 0), None)
    if batch is None:
        raise InputError("train: the data have no batch")
    return read(batch)


def _outputs(call: Call, network: nn.Module) -> Any:
    with seeded(0, str(next(network.parameters()).device)):
        return call.outputs(network)


def _tried(what: str, function: Callable[[], Any]) -> Any:
    try:
        with torch.no_grad():
            return function()
    except InputError:
        raise
    except Exception as error:  # code of the user may raise anything
        raise InputError(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def _evaluation_size(batch_size: int, call: Call, outputs: Any) -> int:
    numbers = sum(leaf.numel() for leaf in leaves([call.args, dict(call.kwargs), outputs])) / max(1, call.size)
    return max(batch_size, min(EVALUATION[0], int(EVALUATION[1] / max(1.0, numbers))))


def _kind(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


@contextmanager
def seeded(seed: int, device: str) -> Iterator[None]:
    """Context with torch's global generators at `seed`; restores their states afterwards."""
    cuda = [torch.cuda.current_device()] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        yield


def synchronize(device: str) -> None:
    """Wait for the device, before a clock is read."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
