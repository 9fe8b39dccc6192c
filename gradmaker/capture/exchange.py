"""Temporary replacement of the tensors of a module, for calls that leave the module unchanged."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["call_with", "copies", "exchanged", "with_storage"]

BOOKKEEPING = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}
"""Attributes that torch itself keeps on modules: hooks and modes, which a call may change for good."""
CONTAINERS = (dict, OrderedDict, list)
NUMBERS = (int, float, bool)  # not restored: they may count calls


@contextmanager
def exchanged(module: nn.Module, tensors: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Context in which a module and its submodules hold replacements for some tensors, under whatever attribute.

    Afterwards, also after an exception, they hold the same objects as before: parameters, buffers, submodules, other
    attributes except numbers, and the contents of lists and dictionaries. `torch.func.functional_call` replaces by name, and
    leaves plain tensors for the parameters of a module that has two names.

    tensors: replacement by original
    """
    held = [_Held(m) for m in module.modules()]
    cache = vars(parametrize).get("_cache")  # of `parametrize.cached`: its entries were computed from the originals
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
    """The output of a module that is called with replacements for its tensors."""
    with exchanged(module, tensors):
        return module(*args, **kwargs)


def copies(module: nn.Module) -> dict[Tensor, Tensor]:
    """A copy of each buffer, for a call that may change it."""
    return {b: b.clone() for b in module.buffers()}


def with_storage(module: nn.Module) -> nn.Module:
    """The module, or of one on the meta device a copy with numbers on the CPU, all ones, without the memory of its tensors."""
    if not any(p.is_meta for p in module.parameters()):
        return module
    memory: dict[int, Any] = {}
    for t in (*module.parameters(), *module.buffers()):
        ones = torch.ones((), dtype=t.dtype, device="cpu").expand(t.shape)
        memory[id(t)] = nn.Parameter(ones, t.requires_grad) if isinstance(t, nn.Parameter) else ones
    return copy.deepcopy(module, memory)


class _Held:
    """The attributes of one module, to be replaced and restored."""

    def __init__(self, module: nn.Module) -> None:
        self.own = vars(module)
        self.attributes = {k: v for k, v in self.own.items() if k not in BOOKKEEPING}
        self.containers = [(v, v.copy()) for v in self.attributes.values() if type(v) in CONTAINERS]
        scripted = isinstance(module, torch.jit.ScriptModule)  # its tables are views of C++ objects
        tables: tuple[Any, ...] = (module._parameters, module._buffers) if scripted else ()
        self.views = [(v, dict(v.items())) for v in tables]

    def exchange(self, tensors: Mapping[Tensor, Tensor]) -> None:
        """Put the replacements in place."""
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
        """Restore the original objects."""
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
