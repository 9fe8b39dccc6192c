"""Parameters that `fully_shard` (FSDP2) has sharded: DTensors outside of the passes, and whole inside of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradmaker.trees import tensors

__all__ = [
    "Gathered",
    "divided",
    "fsdp_modules",
    "gathered",
    "is_sharded",
    "leaves",
    "local",
    "loss_of_nothing",
    "managed",
    "reshard",
    "version",
    "whole",
]


def is_sharded(t: Tensor) -> bool:
    """Whether a tensor is a DTensor; importing these takes longer than all other checks."""
    return any(kind.__name__ == "DTensor" for kind in type(t).__mro__)


def local(t: Any) -> Tensor:
    """The part of a tensor that is on this rank."""
    found: Tensor = t.to_local() if is_sharded(t) else t
    return found


def whole(t: Any) -> Tensor:
    """The whole tensor, on all ranks of its mesh together."""
    found: Tensor = t.full_tensor() if is_sharded(t) else t
    return found


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on."""
    return [m for m in model.modules() if any(kind.__name__ == "FSDPModule" for kind in type(m).__mro__)]


def version(t: Tensor) -> int:
    """The version counter of a tensor, of a sharded one that of its shard: those of DTensors do not count."""
    with torch.no_grad():
        return local(t)._version


def managed(model: nn.Module) -> set[nn.Parameter]:
    """The parameters inside of such modules, which these make whole in the passes."""
    return {p for m in fsdp_modules(model) for p in m.parameters()}


def reshard(model: nn.Module) -> None:
    """Let all modules hold their shards alone, as after a backward pass."""
    for m in fsdp_modules(model):
        m.reshard()


class Gathered:
    """Whole weights, from `begin` to `end`, so that further passes need no other rank."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = fsdp_modules(model)
        self._undo = ExitStack()

    def begin(self, gather: bool) -> None:
        """Keep the weights whole after backward passes.  gather: whether to gather them now, on all ranks together"""
        for m in self._modules:
            for group in _groups(m):
                self._undo.callback(setattr, group, "reshard_after_backward", group.reshard_after_backward)
            m.set_reshard_after_backward(False, recurse=False)
        for m in self._modules if gather else ():
            m.unshard()

    def end(self) -> None:
        """Let the modules hold their shards again."""
        self._undo.close()
        for m in self._modules:
            m.reshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Context of a backward pass after which the weights stay whole, for further passes."""
    held = Gathered(model)
    held.begin(gather=False)
    try:
        yield
    finally:
        held.end()


def _groups(module: Any) -> list[Any]:
    """What `fully_shard` keeps of a module, which has no public name."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return list(groups) if groups is not None else [g for g in [state._fsdp_param_group] if g is not None]


def divided(model: nn.Module) -> bool:
    """Whether gradients are divided by another number than that of the ranks."""
    return any(getattr(g, "gradient_divide_factor", None) is not None for m in fsdp_modules(model) for g in _groups(m))


def leaves(model: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
    """Of each sharded parameter the whole one that passes differentiate."""
    return {
        p.sharded_param: p.unsharded_param
        for m in fsdp_modules(model)
        for g in _groups(m)
        for p in g.fsdp_params
        if hasattr(p, "_unsharded_param")
    }


def loss_of_nothing(output: Any) -> Tensor | None:
    """A loss without an effect, whose backward pass meets those of other ranks; None without a graph."""
    found = [v for v in tensors(output) if v.requires_grad]
    return torch.stack([(v * 0).sum() for v in found]).sum() if found else None
