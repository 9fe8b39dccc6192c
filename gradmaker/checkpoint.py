"""What a maker saves: keyed by site name, unstacked, so that it does not depend on how sites are grouped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradmaker.blocks import Block
from gradmaker.representations.base import State
from gradmaker.schedule import Clock

if TYPE_CHECKING:
    from gradmaker.preconditioner import PreconditionedGradientMaker

__all__ = ["dump", "load"]

_PARTS = ("state", "cache", "average", "norm_state")


def dump(maker: PreconditionedGradientMaker) -> dict[str, Any]:
    """Copies of all tensors, and counters."""
    return {
        "step": maker.step,
        "skipped": maker.skipped,
        "curvature_clock": _clock(maker._curvature_clock),
        "refresh_clock": _clock(maker._refresh_clock),
        "measured": sorted(maker._ever),
        "sites": {name: tensors for block in maker.plan.blocks for name, tensors in _dump_block(block).items()},
    }


def _clock(clock: Clock) -> dict[str, int]:
    return {"begun": clock.begun, "next": clock.next}


def _dump_block(block: Block) -> dict[str, Any]:
    if block.full:
        return {block.name: {part: {k: v.clone() for k, v in getattr(block, part).items()} for part in _PARTS}}
    return {
        site.name: {part: {k: v[slot].clone() for k, v in getattr(block, part).items()} for part in _PARTS}
        for site, slot in zip(block.sites, block.slots, strict=True)
    }


def load(maker: PreconditionedGradientMaker, saved: dict[str, Any]) -> None:
    """Check everything, then copy everything."""
    sites = saved["sites"] if isinstance(saved, dict) and "sites" in saved else None
    if sites is None:
        raise ValueError("load_state_dict: expected what state_dict() of a preconditioned maker returned")
    expected = {name for block in maker.plan.blocks for name in _names(block)}
    if set(sites) != expected:
        missing, unknown = sorted(expected - set(sites)), sorted(set(sites) - expected)
        raise ValueError(f"load_state_dict: missing sites {missing}, unknown sites {unknown}: model or method differ")
    loaded = [(block, _gather(block, sites)) for block in maker.plan.blocks]
    for block, parts in loaded:
        for part, tensors in parts.items():
            setattr(block, part, tensors)
    maker.step, maker.skipped = int(saved["step"]), int(saved["skipped"])
    maker._ever = set(saved["measured"])
    maker._asked = -1
    for clock, key in ((maker._curvature_clock, "curvature_clock"), (maker._refresh_clock, "refresh_clock")):
        clock.begun, clock.next = int(saved[key]["begun"]), int(saved[key]["next"])


def _names(block: Block) -> list[str]:
    return [block.name] if block.full else [site.name for site in block.sites]


def _gather(block: Block, sites: dict[str, Any]) -> dict[str, State]:
    return {part: _gather_part(block, part, [sites[name][part] for name in _names(block)]) for part in _PARTS}


def _gather_part(block: Block, part: str, members: list[State]) -> State:
    own: State = getattr(block, part)
    keys = set(members[0])
    names = _names(block)
    if part != "cache" and keys != set(own) or any(set(m) != keys for m in members):
        raise ValueError(f"load_state_dict: {names[0]} has the tensors {sorted(keys)} in {part!r}, expected {sorted(own)}")
    result = {}
    for key in members[0]:
        pieces = [m[key] for m in members]
        joined = torch.cat(pieces).to(block.frame.device)
        _check_shape(block, part, key, joined, own.get(key))
        result[key] = joined.to(own[key].dtype if key in own else _cache_dtype(block, joined)).clone()
    return result


def _cache_dtype(block: Block, value: Tensor) -> torch.dtype:
    return block.frame.dtype if value.is_floating_point() else value.dtype


def _check_shape(block: Block, part: str, key: str, value: Tensor, own: Tensor | None) -> None:
    wanted = tuple(own.shape) if own is not None else (block.frame.stack, *value.shape[1:])
    if tuple(value.shape) != wanted:
        names = ", ".join(_names(block))
        raise ValueError(f"load_state_dict: {names}: {part}[{key!r}] has shape {tuple(value.shape)}, expected {wanted}")
