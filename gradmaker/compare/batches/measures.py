"""Loss and metrics on a part of the data."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker.compare.batches.reading import Call
from gradmaker.compare.batches.trees import mapped
from gradmaker.compare.errors import InputError
from gradmaker.compare.task import Metric

IGNORED = -100  # torch's default of ignore_index


@dataclass(frozen=True)
class TokenLoss:
    """A cross entropy that takes logits with classes last, (N, T, K), too."""

    function: Callable[[Any, Any], Tensor]
    last: bool

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """The loss of flattened logits and targets, or of these as they are."""
        if self.last:
            return self.function(outputs.flatten(0, -2), targets.flatten())
        return self.function(outputs, targets)

    @property
    def ignored(self) -> int:
        """Targets of this class do not count."""
        return int(getattr(self.function, "ignore_index", IGNORED))


@dataclass(frozen=True)
class Accuracy:
    """Whether the class with the largest output is the target, for every target that is not ignored."""

    axis: int
    ignored: int = IGNORED

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """A number for each scored target."""
        return (outputs.argmax(self.axis) == targets)[targets != self.ignored].double()


def class_axis(outputs: Any, targets: Any) -> int | None:
    """The axis of the classes of logits: 1, or -1 where targets have the shape of the others; None if there are no classes."""
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor) and outputs.dim() == targets.dim() + 1):
        return None
    if targets.is_floating_point() or not outputs.is_floating_point() or targets.dim() == 0:
        return None
    last, second = (shape == targets.shape for shape in (outputs.shape[:-1], outputs.shape[:1] + outputs.shape[2:]))
    if targets.dim() > 1 and last and second:
        raise InputError(
            f"logits {tuple(outputs.shape)} for targets {tuple(targets.shape)} have two axes that may be the classes: "
            "give a loss and metrics that flatten them"
        )
    return 1 if second else -1 if last else None


def loss_of(given: Callable[[Any, Any], Tensor], outputs: Any, targets: Any) -> Callable[[Any, Any], Tensor]:
    """The loss of a task; torch's cross entropies take classes on the last axis. InputError for a sum over the batch."""
    if getattr(given, "reduction", "mean") == "sum":
        raise InputError("loss: reduction='sum' depends on the size of a batch, as losses of several parts do not: take 'mean'")
    if given is F.cross_entropy or isinstance(given, nn.CrossEntropyLoss):
        axis = class_axis(outputs, targets)
        return TokenLoss(given, last=axis == -1 and outputs.dim() > 2)
    return given


def metrics_of(given: Mapping[str, Any] | None, loss: Any, outputs: Any, targets: Any) -> dict[str, Metric]:
    """The metrics of a task by name; None: accuracy where targets are classes."""
    if given is None:
        axis = class_axis(outputs, targets)
        if axis is None or outputs.shape[axis] < 2:
            return {}
        return {"accuracy": Metric(function=Accuracy(axis, getattr(loss, "ignored", IGNORED)))}
    if "loss" in given:
        raise InputError("metrics: the loss is measured anyway, under the name 'loss': give the metric another name")
    if bad := [name for name, metric in given.items() if not (isinstance(metric, Metric) or callable(metric))]:
        raise InputError(f"metrics: {', '.join(map(repr, bad))}: expected a function of outputs and targets, or a Metric")
    return {name: metric if isinstance(metric, Metric) else Metric(function=metric) for name, metric in given.items()}


@dataclass
class Total:
    """A metric as it is summed over batches."""

    metric: Metric
    total: float = 0.0
    count: float = 0.0
    seen: list[tuple[Any, Any]] = field(default_factory=list)

    def add(self, outputs: Any, targets: Any, size: float) -> None:
        """Count a batch."""
        if self.metric.whole:
            self.seen.append(tuple(mapped(_cpu, part) for part in (outputs, targets)))
            return
        if not size:
            return
        value = torch.as_tensor(self.metric.function(outputs, targets)).double()
        self.total += float(value.sum() if value.dim() else value * size)
        self.count += value.numel() if value.dim() else size

    def value(self) -> float:
        """The metric over all batches; NaN where nothing was scored."""
        if self.metric.whole:
            outputs, targets = (_joined(parts) for parts in zip(*self.seen, strict=True))
            return float(self.metric.function(outputs, targets))
        return self.total / self.count if self.count else float("nan")


@torch.no_grad()
def evaluate(model: nn.Module, loss: Any, metrics: Mapping[str, Metric], calls: Iterable[Call]) -> dict[str, float]:
    """The loss, as a mean over examples or over targets that are not ignored, and all metrics."""
    training = model.training
    model.eval()
    totals = {"loss": Total(Metric(function=loss)), **{name: Total(metric) for name, metric in metrics.items()}}
    for call in calls:
        outputs = call.outputs(model)
        for name, total in totals.items():
            total.add(outputs, call.targets, counted(loss, call) if name == "loss" else call.size)
    model.train(training)
    return {name: total.value() for name, total in totals.items()}


def counted(loss: Any, call: Call) -> int:
    """How many terms the mean of a loss has: examples, or targets that a cross entropy does not ignore."""
    if isinstance(loss, TokenLoss) and isinstance(call.targets, Tensor) and not call.targets.is_floating_point():
        return int((call.targets != loss.ignored).sum())
    return call.size


def _cpu(leaf: Any) -> Any:
    return leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf


def _joined(parts: Iterable[Any]) -> Any:
    listed = list(parts)
    if all(isinstance(part, Tensor) for part in listed):
        return torch.cat([part if part.dim() else part[None] for part in listed])
    if all(isinstance(part, Mapping) for part in listed):
        return {name: _joined([part[name] for part in listed]) for name in listed[0]}
    return listed
