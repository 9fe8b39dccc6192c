"""What costs are measured on: a model with a loss and batches of any size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker.compare.batches.reading import Call
from gradmaker.compare.data import Data
from gradmaker.compare.errors import InputError
from gradmaker.compare.models import factory
from gradmaker.compare.presets import HIDDEN, PRESETS
from gradmaker.compare.problem import prepare, seeded
from gradmaker.compare.task import load_task
from gradmaker.options.suggestions import did_you_mean

__all__ = ["Subject", "builtin", "of_task", "seeded_model"]

CLASSES = 10


@dataclass(frozen=True)
class Subject:
    """A model, its loss, and a function that makes a batch of a size."""

    label: str
    model: Callable[[], nn.Module]
    batch: Callable[[int], Call]
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

    def batch(size: int) -> Call:
        x = torch.rand(size, *preset.shape, generator=torch.Generator().manual_seed(size))
        return Call((x,), {}, torch.arange(size) % CLASSES, size)

    label = f"{name} {'-'.join(map(str, widths))}, {data}"
    return Subject(label, factory(name, shapes, widths), batch, width=widths[0] if len(set(widths)) == 1 else width)


def of_task(path: str, device: str) -> Subject:
    """The task of a function of the user, on a first batch. InputError for any other."""
    problem = prepare(load_task(path), device)

    def batch(size: int) -> Call:
        call = next(problem.calls(size, 0, 0), None)
        if call is None or call.size != size:
            raise InputError(f"{path}: batch_size={size}: its batches have {call.size if call else 'no'} examples")
        return call

    return Subject(problem.task.name, problem.model, batch, problem.loss)


def seeded_model(subject: Subject, device: str) -> nn.Module:
    """The model of a subject, the same for every row."""
    with seeded(0, device):
        return subject.model().to(device).train()
