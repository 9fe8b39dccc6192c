"""Checks that a model still has the parameters for which a plan was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from gradmaker.blocks import Block
from gradmaker.capture.sharded import leaves

__all__ = ["OwnParameters"]

ANEW = "the maker was made for the model as it was: make a new one after the change"


_Place: TypeAlias = tuple[str, nn.Module, str, nn.Parameter]


@dataclass(frozen=True)
class _Slot:
    """A module's attribute that holds a parameter."""

    name: str
    owner: nn.Module
    key: str
    parameter: nn.Parameter
    dtype: torch.dtype
    device: torch.device
    trains: bool


class OwnParameters:
    """The parameters of a model when the plan was made, by identity, with dtype, device and ``requires_grad``.

    A step after a change would leave some parameters with a plain gradient, or with the curvature of others.
    """

    def __init__(self, model: nn.Module, blocks: list[Block], plain: Set[str]) -> None:
        """plain: names of parameters that keep their plain gradient, with any change"""
        self.model, self.blocks, self.plain = model, blocks, plain
        self._slots = [
            _Slot(*each, each[-1].dtype, each[-1].device, each[-1].requires_grad) for each in _held(model, leaves(model))
        ]
        self._places: dict[tuple[int, str], tuple[Any, ...]] = {}
        self.all = list(model.parameters())
        """The parameters of the model, as `check` has seen it."""

    def __getstate__(self) -> dict[str, Any]:  # slots are compared by identity, which a copy does not share
        return {**vars(self), "_places": {}}

    def check(self) -> bool:
        """Whether any parameter of a block requires gradients. ValueError, with its name, for one that has changed."""
        if not self._unchanged():
            now = _held(self.model, leaves(self.model))
            self._check_places(now)
            self._check_new(now)
            for slot in self._slots:
                self._check_kind(slot)
            self._check_frozen()
            self._places = {(id(owner), key): (id(p), p.dtype, p.device, p.requires_grad) for _, owner, key, p in now}
            self.all = list(dict.fromkeys(p for *_, p in now))
        return not all(s.frozen for block in self.blocks for s in block.sites)

    def called(self) -> bool:
        """`check` at a call of the model; False where other tensors replace its parameters, as in `torch.func`."""
        if not self._unchanged():
            now = {(id(owner), key): p for _, owner, key, p in _held(self.model, leaves(self.model))}
            if any(not isinstance(now.get((id(s.owner), s.key), s.parameter), nn.Parameter) for s in self._slots):
                return False
        return self.check()

    def moved(self) -> bool:
        """Whether the same parameters are on other devices, and nothing else has changed."""
        now = {} if self._unchanged() else {(id(owner), key): p for _, owner, key, p in _held(self.model, {})}
        return any(s.parameter.device != s.device for s in self._slots if now) and all(
            now.get((id(s.owner), s.key)) is s.parameter and s.parameter.dtype == s.dtype for s in self._slots
        )

    def _unchanged(self) -> bool:
        """Whether nothing has changed, in well under a millisecond for 1000 parameters."""
        places, found, swapped = self._places, 0, dict[nn.Parameter, nn.Parameter]()
        for module in _modules(self.model):
            for key, p in module._parameters.items():
                if p is not None:
                    place = places.get((id(module), key))
                    if place is not None and place[0] != id(p):
                        swapped = swapped or {w: own for own, w in leaves(self.model).items()}
                        p = swapped.get(p, p)
                    if place != (id(p), p.dtype, p.device, p.requires_grad):
                        return False
                    found += 1
        return found == len(places) > 0

    # ---------------------------------------------------------------- what has changed
    def _check_places(self, now: list[_Place]) -> None:
        places = {(id(owner), key): p for _, owner, key, p in now}
        names = {id(p): name for name, *_, p in now}
        for slot in self._slots:
            found = places.get((id(slot.owner), slot.key))
            if found is slot.parameter or not slot.trains or slot.name in self.plain:
                continue
            if found is not None:
                what = f"was replaced by another {type(found).__name__}, as load_state_dict(assign=True) and to_empty do"
            elif id(slot.parameter) in names:
                what = f"is held as {names[id(slot.parameter)]} now, as by pruning or a parametrization"
            else:
                what = "is no part of the model any more: its module was replaced or taken out"
            raise ValueError(f"{slot.name} {what}; {ANEW}")

    def _check_new(self, now: list[_Place]) -> None:
        """ValueError for a trainable parameter that is in no block and was not left out by name."""
        planned = {(id(s.owner), s.key) for s in self._slots}
        for name, owner, key, p in now:
            known = name in self.plain or (id(owner), key) in planned
            if p.requires_grad and not known and p.numel():
                raise ValueError(f"{name} was added to the model after the maker was made, so that no block holds it; {ANEW}")

    def _check_kind(self, slot: _Slot) -> None:
        p = slot.parameter
        if slot.name in self.plain:
            return
        for what, then, found in (("dtype", slot.dtype, p.dtype), ("device", slot.device, p.device)):
            if then != found:
                raise ValueError(f"{slot.name} has the {what} {found} now and had {then}; {ANEW}")
        if p.requires_grad and not slot.trains:
            raise ValueError(f"{slot.name} was frozen when the maker was made and trains now, but no block holds it; {ANEW}")

    def _check_frozen(self) -> None:
        """ValueError for a site of which only some parameters are frozen; a site that is frozen as a whole is not measured."""
        for block in self.blocks:
            groups: list[Mapping[str, nn.Parameter]] = [s.parameters for s in block.sites]
            if block.full:
                groups = [{k: p for group in groups for k, p in group.items()}]
            for group in groups:
                frozen = [k for k, p in group.items() if not p.requires_grad]
                if frozen and len(frozen) < len(group):
                    other = next(k for k in group if k not in frozen)
                    raise ValueError(
                        f"{frozen[0]} does not require gradients any more, and {other}, in the same block, does: freeze or "
                        f"thaw the whole block, or do it before the maker is made; {ANEW}"
                    )


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """Each module once; `nn.Module.modules` also forms their names."""
    waiting, seen = [model], {id(model)}
    while waiting:
        module = waiting.pop()
        yield module
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)


def _held(model: nn.Module, swapped: Mapping[nn.Parameter, nn.Parameter]) -> list[_Place]:
    """Every attribute that holds a parameter: full name, owner, key, parameter.

    swapped: by sharded parameter the whole one that stands in its place during the passes
    """
    own = {w: p for p, w in swapped.items()}
    return [
        (f"{prefix}.{key}" if prefix else key, owner, key, own.get(p, p))
        for prefix, owner in model.named_modules()
        for key, p in owner._parameters.items()
        if p is not None
    ]
