"""`Task`: a model, its data, loss and metrics, as one object."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker.compare.data import load
from gradmaker.compare.errors import InputError
from gradmaker.compare.models import factory
from gradmaker.compare.presets import HIDDEN, PRESETS
from gradmaker.options.suggestions import did_you_mean

Part = str | Sequence[str] | Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that says how good outputs are.

    Args:
        function: of outputs and targets, as the loss; returns the mean of a batch, or a tensor with an entry for every scored
            item (an example, a token that is not ignored), which is averaged over the items of all batches.
        higher: whether a higher value is better.
        whole: whether the function wants the outputs and targets of all batches at once, as F1 or a rank correlation does.
    """

    function: Callable[[Any, Any], Any]
    higher: bool = True
    whole: bool = False


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained: a model, data, a loss and metrics.

    Args:
        model: function that returns the model, or a model, of which every training takes a copy.
        train: tensors `(inputs, ..., targets)` or a dictionary of them, a `datasets` split, a `Dataset` or `DataLoader` of
            torch, a list of batches, or a function that returns the batches of an epoch.
        test: the same, or None: the values on the validation part are reported.
        validation: the part that selects; None: a share of the training examples is held out.
        loss: of outputs and targets; a mean over the batch. Of a dictionary it gets the whole batch, unless `targets` is given.
        metrics: by name, a function (higher is better) or a `Metric`; the first one selects, without any the loss does.
            None: accuracy where targets are classes.
        inputs: arguments of the model: the name of an entry of the batch, several (by keyword), or a function that returns a
            tuple or a dictionary of arguments. None: all entries but the last; of a dictionary, those that `forward` names.
        targets: what the loss and the metrics get: the name of an entry, or a function of the batch. None: the last entry.
        batch_size: for data that are no batches yet, where the call gives none.
    """

    model: Callable[[], nn.Module] | nn.Module
    train: Any
    test: Any = None
    validation: Any = None
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    metrics: Mapping[str, Metric | Callable[[Any, Any], Any]] | None = None
    inputs: Part | None = None
    targets: Part | None = None
    batch_size: int = 64
    name: str = "task"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of `compare` that suit the task, as `{"budget": "5 epochs"}`."""


def load_task(path: str) -> Task:
    """The task of `my_module:make_task`, a function without arguments or a `Task`. InputError for any other."""
    raise NotImplementedError


def builtin_task(name: str, folder: Any = None, model: str | None = None, hidden: Sequence[int] | None = None) -> Task:
    """The task of a data set of the library, with its model. InputError for unknown names."""
    if name not in PRESETS:
        raise InputError(f"data={name!r}: {did_you_mean(name, PRESETS)}")
    preset, data = PRESETS[name], load(name, folder)
    chosen = model or preset.model
    widths = hidden or (preset.hidden if chosen == preset.model else HIDDEN.get(chosen, ()))
    return Task(
        name=name,
        model=factory(chosen, data, widths),
        train=(data.train_inputs, data.train_targets),
        test=(data.test_inputs, data.test_targets),
        batch_size=preset.batch_size,
        options={"budget": f"{preset.epochs} epochs"},
    )
