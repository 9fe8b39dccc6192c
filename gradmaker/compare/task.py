"""`Task`: a model, its data, loss and metrics, as one object."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
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
    """The task of `my_module:make_task`, a function without arguments or a `Task`. InputError for any other.

    Modules of the working folder are found, too. Torch's generator has the seed 0 meanwhile: a model that the function makes is
    the same when a run is resumed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _loaded(path)


def _loaded(path: str) -> Task:
    name, _, attribute = path.partition(":")
    if not name or not attribute:
        raise InputError(f"task={path!r}: expected my_module:make_task")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = import_module(name)
    except Exception as error:  # the module of a user may raise anything
        missing = isinstance(error, ModuleNotFoundError) and name.startswith(str(error.name))
        reason = "no such module here or installed" if missing else f"{type(error).__name__}: {_line(error)}"
        raise InputError(f"task={path!r}: {name} cannot be imported: {reason}") from error
    if not hasattr(module, attribute):
        legal = [
            key
            for key, value in vars(module).items()
            if not key.startswith("_") and (callable(value) or isinstance(value, Task))
        ]
        raise InputError(f"task={path!r}: {name} has no {attribute!r}: {did_you_mean(attribute, legal)}")
    found = getattr(module, attribute)
    try:
        made = found if isinstance(found, Task) else found()
    except InputError:
        raise
    except Exception as error:  # as above
        raise InputError(f"task={path!r}: {attribute} raised {type(error).__name__}: {_line(error)}") from error
    if not isinstance(made, Task):
        raise InputError(f"task={path!r}: {attribute} returned a {type(made).__name__}, expected a Task")
    return made


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


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
