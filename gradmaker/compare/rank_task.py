"""Tasks of `gradmaker cost --task`: a model and the batch of one rank, made on the meta device, which holds no data."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from gradmaker.compare.errors import InputError
from gradmaker.options.suggestions import did_you_mean

__all__ = ["RankTask", "read_task"]


@dataclass(frozen=True)
class RankTask:
    """A model and the batch of one rank: a tensor, a tuple of arguments, or a mapping of named ones."""

    model: nn.Module
    batch: Any


def read_task(name: str) -> RankTask:
    """Call ``module:function`` on the meta device. InputError where there is none, or it returns no model and batch.

    The function takes no arguments, and returns a pair or an object with these attributes. The module may lie in the working
    folder.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise InputError(f"task={name!r}: expected module:function, as in --task my_task:large")
    make = _found(name, module, function)
    with torch.device("meta"):
        try:
            made = make()
        except Exception as error:
            raise InputError(f"task={name!r}: {function}() raised {type(error).__name__}: {_line(error)}") from error
    return _checked(name, made)


def _found(name: str, module: str, function: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise InputError(f"task={name!r}: no module {error.name!r} here or installed") from None
    make = getattr(found, function, None)
    if not callable(make):
        names = [k for k, v in vars(found).items() if callable(v) and not k.startswith("_")]
        raise InputError(f"task={name!r}: {module} has no function {function!r}: {did_you_mean(function, names)}")
    return make


def _checked(name: str, made: Any) -> RankTask:
    pair = made if isinstance(made, tuple) and len(made) == 2 else (getattr(made, "model", None), getattr(made, "batch", None))
    model, batch = pair
    if not isinstance(model, nn.Module) or batch is None or not any(isinstance(t, Tensor) for t in tree_leaves(_plain(batch))):
        raise InputError(
            f"task={name!r}: expected a model and the batch of one rank, as a pair or as the attributes model and batch, got "
            f"{type(made).__name__}"
        )
    placed = next((k for k, p in model.named_parameters() if not p.is_meta), None)
    if placed is not None:
        raise InputError(
            f"task={name!r}: {placed} has data: make the model in the function, and give it no device and no weights"
        )
    return RankTask(model, tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, _plain(batch)))


def _plain(batch: Any) -> Any:
    return dict(batch) if isinstance(batch, Mapping) else batch


def _line(error: Exception) -> str:
    return (str(error).strip() or "without a message").splitlines()[0]
