"""What costs are measured on: a model with a loss and batches of any size."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker.compare.data import Data
from gradmaker.compare.errors import InputError
from gradmaker.compare.models import factory
from gradmaker.compare.presets import HIDDEN, PRESETS
from gradmaker.compare.task import load_task
from gradmaker.options.suggestions import did_you_mean

__all__ = ["Batch", "Subject", "builtin", "of_task", "seeded_model"]

CLASSES = 10


@dataclass(frozen=True)
class Batch:
    """Arguments of the model, and what the loss gets beside its outputs."""

    args: tuple[Any, ...]
    targets: Any
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> Any:
        """The arguments as the cost model takes them."""
        return dict(self.kwargs) if self.kwargs else (self.args[0] if len(self.args) == 1 else self.args)


@dataclass(frozen=True)
class Subject:
    """A model, its loss, and a function that makes a batch of a size."""

    label: str
    model: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    width: int | None = None


def builtin(data: str, model: str | None, hidden: Sequence[int] | None, width: int | None = None) -> Subject:
    """A built-in model on random values of the shapes of built-in data. InputError for unknown names.

    width: of all hidden layers, as many as the model of the data has
    """
    if data not in PRESETS:
        raise InputError(f"data={data!r}: {did_you_mean(data, PRESETS)}")
    preset = PRESETS[data]
    name = model or preset.model
    widths = tuple(hidden or (preset.hidden if name == preset.model else HIDDEN.get(name, ())))
    if width is not None:
        widths = (width,) * len(widths)
    one = torch.rand(CLASSES, *preset.shape, generator=torch.Generator().manual_seed(0))
    shapes = Data("random", one, torch.arange(CLASSES), one[:1], torch.zeros(1, dtype=torch.long))

    def batch(size: int) -> Batch:
        x = torch.rand(size, *preset.shape, generator=torch.Generator().manual_seed(size))
        return Batch((x,), torch.arange(size) % CLASSES)

    label = f"{name} {'-'.join(map(str, widths))}, {data}"
    return Subject(label, factory(name, shapes, widths), batch, width=widths[0] if len(set(widths)) == 1 else width)


def of_task(path: str, device: str) -> Subject:
    """The task of a function of the user, on its own first batches. InputError for any other."""
    task = load_task(path)
    raise InputError(f"{task.name}: not built yet")


def seeded_model(subject: Subject, device: str) -> nn.Module:
    """The model of a subject, the same for every row."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return subject.model().to(device).train()
