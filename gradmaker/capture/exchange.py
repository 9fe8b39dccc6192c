"""Other tensors in the place of a module's own, for calls that leave no trace on it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["call_with", "copies", "exchanged"]

BOOKKEEPING = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}
"""What torch itself keeps on modules: hooks and modes, which a call may change for good."""
CONTAINERS = (dict, OrderedDict, list)
NUMBERS = (int, float, bool)  # counters of calls go on


@contextmanager
def exchanged(module: nn.Module, tensors: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Wherever the modules inside hold one of these tensors, under whatever name, they hold the other one in its place.

    Afterwards, also after an exception, they hold the very objects that they held before: parameters, buffers, submodules,
    other attributes but numbers, and what is in their lists and dictionaries. `torch.func.functional_call` goes by names, and
    a module that has two of them is given back with plain tensors for its parameters.
    """
    held = [_Held(m) for m in module.modules()]
    cache = vars(parametrize).get("_cache")  # of `parametrize.cached`: what it knows belongs to other tensors
    try:
        vars(parametrize)["_cache"] = {}
        for each in held:
            each.exchange(tensors)
        yield
    finally:
        vars(parametrize)["_cache"] = cache
        for each in held:
            each.restore()


def call_with(module: nn.Module, tensors: Mapping[Tensor, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a module returns with other tensors in the place of its own."""
    with exchanged(module, tensors):
        return module(*args, **kwargs)


def copies(module: nn.Module) -> dict[Tensor, Tensor]:
    """Buffers for a call to change."""
    return {b: b.clone() for b in module.buffers()}


class _Held:
    """What one module holds."""

    def __init__(self, module: nn.Module) -> None:
        self.own = vars(module)
        self.attributes = {k: v for k, v in self.own.items() if k not in BOOKKEEPING}
        self.containers = [(v, v.copy()) for v in self.attributes.values() if type(v) in CONTAINERS]
        scripted = isinstance(module, torch.jit.ScriptModule)  # whose tables are views of what lies outside of Python
        tables: tuple[Any, ...] = (module._parameters, module._buffers) if scripted else ()
        self.views = [(v, dict(v.items())) for v in tables]

    def exchange(self, tensors: Mapping[Tensor, Tensor]) -> None:
        """Put other tensors in place."""
        for container, before in (*self.containers, *self.views):
            if before:
                for key, value in before.items() if isinstance(before, dict) else enumerate(before):
                    if isinstance(value, Tensor) and value in tensors:
                        container[key] = tensors[value]
        for key, value in self.attributes.items():
            if isinstance(value, Tensor) and value in tensors:
                self.own[key] = tensors[value]
            elif type(value) is tuple and any(isinstance(v, Tensor) and v in tensors for v in value):
                self.own[key] = tuple(tensors.get(v, v) if isinstance(v, Tensor) else v for v in value)

    def restore(self) -> None:
        """Put everything back."""
        for key in [k for k in self.own if k not in self.attributes and k not in BOOKKEEPING]:
            del self.own[key]
        kept = {k: v for k, v in self.attributes.items() if type(v) not in NUMBERS}
        self.own.update(kept)
        for container, before in self.containers:
            if isinstance(container, dict):
                if container or before:
                    container.clear()
                    container.update(before)
            else:
                container[:] = before
        for view, before in self.views:
            for key, value in before.items():
                view[key] = value
