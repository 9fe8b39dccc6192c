"""What a maker saves: keyed by site name, unstacked, so that it does not depend on how sites are grouped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradmaker.blocks import Block
from gradmaker.pool import Pool
from gradmaker.previous import dump_secants, load_secants
from gradmaker.representations.base import State
from gradmaker.schedule import Clock

if TYPE_CHECKING:
    from gradmaker.preconditioner import PreconditionedGradientMaker

__all__ = ["dump", "load"]

_PARTS = ("state", "cache", "average", "norm_state")


def dump(maker: PreconditionedGradientMaker) -> dict[str, Any]:
    """Copies of all tensors, and counters."""
    sites = {name: tensors for block in maker.plan.blocks for name, tensors in _dump_block(block).items()}
    return {**_counters(maker), "sites": sites}


def _counters(maker: PreconditionedGradientMaker) -> dict[str, Any]:
    return {
        "step": maker.step,
        "skipped": maker.skipped,
        "curvature_clock": _clock(maker._curvature_clock),
        "refresh_clock": _clock(maker._refresh_clock),
        "measured": sorted(maker._ever),
        "pass": {
            "asked": maker._asked,
            "measuring": maker._measuring,
            "finite": maker._finite,
            "noted": maker._noted,
            "part": maker._part,
            "further": sorted(maker._further),
        },
        **({"secants": dump_secants(maker)} if maker.plan.asks("previous") else {}),
        **({"pool": maker._pool.dump()} if any(b.triple.curvature.pooled for b in maker.plan.blocks) else {}),
    }


def _clock(clock: Clock) -> dict[str, int]:
    return {"begun": clock.begun, "next": clock.next}


def _dump_block(block: Block) -> dict[str, Any]:
    if block.full:
        return {block.name: _dump_slot(block, slice(None), bool(block.ready))}
    members = zip(block.sites, block.slots, strict=True)
    return {site.name: _dump_slot(block, slot, site.name in block.ready) for site, slot in members}


def _dump_slot(block: Block, slot: slice, ready: bool) -> dict[str, Any]:
    """One member of a stack. An empty statistic has no cache, though in a stack it has a place in it."""
    parts = {part: {k: v[slot].clone() for k, v in getattr(block, part).items()} for part in _PARTS}
    return {"parts": _kind(block), **parts, "cache": parts["cache"] if ready else {}}


def _kind(block: Block) -> str:
    triple = block.triple
    return " x ".join(type(part).__name__ for part in (triple.curvature, triple.representation, triple.solver))


def load(maker: PreconditionedGradientMaker, saved: dict[str, Any]) -> None:
    """Check everything, then copy everything."""
    if not isinstance(saved, dict) or not isinstance(saved.get("sites"), dict):
        raise ValueError("load_state_dict: expected what state_dict() of a preconditioned maker returned")
    sites = saved["sites"]
    _check_names("", saved, {**_counters(maker), "sites": sites})
    _check_names("sites ", sites, {name: None for block in maker.plan.blocks for name in _names(block)})
    loaded = [(block, _gather(block, sites)) for block in maker.plan.blocks]
    for block, parts in loaded:
        for part, tensors in parts.items():
            setattr(block, part, tensors)
        block.ready = {site.name for site in block.sites if sites[block.name if block.full else site.name]["cache"]}
    maker.step, maker.skipped = int(saved["step"]), int(saved["skipped"])
    maker._ever = set(saved["measured"])
    if "secants" in saved:
        load_secants(maker, saved["secants"])
    maker._pool = Pool.load(maker.plan, saved.get("pool", {}))
    for key, value in saved["pass"].items():
        setattr(maker, f"_{key}", set(value) if key == "further" else value)
    for clock, key in ((maker._curvature_clock, "curvature_clock"), (maker._refresh_clock, "refresh_clock")):
        clock.begun, clock.next = int(saved[key]["begun"]), int(saved[key]["next"])


def _check_names(what: str, given: dict[str, Any], expected: dict[str, Any]) -> None:
    """ValueError unless two mappings have the same keys, and so have those inside."""
    if set(given) != set(expected):
        missing, unknown = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
        raise ValueError(f"load_state_dict: {what}missing {missing}, unknown {unknown}: model, method or version differ")
    for key in ("pass", "curvature_clock", "refresh_clock"):
        if key in expected:
            _check_names(f"{key}: ", given[key], expected[key])


def _names(block: Block) -> list[str]:
    return [block.name] if block.full else [site.name for site in block.sites]


def _gather(block: Block, sites: dict[str, Any]) -> dict[str, State]:
    for name in _names(block):
        _check_names(f"{name}: ", sites[name], dict.fromkeys(("parts", *_PARTS)))
        if sites[name]["parts"] != _kind(block):
            raise ValueError(f"load_state_dict: {name} was saved as {sites[name]['parts']}, and is {_kind(block)} here")
    found = {
        part: _gather_part(block, part, [sites[name][part] for name in _names(block)]) for part in _PARTS if part != "cache"
    }
    return {**found, "cache": _gather_cache(block, found["state"], [sites[name]["cache"] for name in _names(block)])}


def _gather_cache(block: Block, state: State, members: list[State]) -> State:
    """The stacked cache; members that had none get zeros, which are not used. One member is prepared to learn the shapes."""
    if not any(members):
        return {}
    if block.triple.representation.live:
        return _gather_live(block, "cache", members[0], state, None)
    slots = [slice(None)] if block.full else block.slots
    one = {k: v[slots[[bool(m) for m in members].index(True)]] for k, v in state.items()}
    like = block.refreshed(one, None)
    own = {k: v.new_zeros(len(v) if block.full else block.frame.stack, *v.shape[1:]) for k, v in like.items()}
    filled = [member or {k: v[slot] for k, v in own.items()} for slot, member in zip(slots, members, strict=True)]
    return _gather_part(block, "cache", filled, own)


def _gather_part(block: Block, part: str, members: list[State], like: State | None = None) -> State:
    own: State = getattr(block, part) if like is None else like
    if part == "state" and block.triple.representation.live:
        return _gather_live(block, part, members[0], own, block.frame.dtype)
    slots = [slice(None)] if block.full else block.slots
    for name, slot, member in zip(_names(block), slots, members, strict=True):
        _check_names(f"{name}: {part}: ", member, own)
        for key, value in member.items():
            _check_shape(f"{name}: {part}[{key!r}]", value, own[key][slot])
    return {key: torch.cat([m[key].to(value.device, value.dtype) for m in members]) for key, value in own.items()}


def _gather_live(block: Block, part: str, member: State, like: State, other: torch.dtype | None) -> State:
    """The state or cache of a live representation: only its own `update` knows names and shapes, beyond the first axis.

    other: dtype of the floating tensors that ``like`` does not have; None leaves it
    """
    loaded = {}
    for key, value in member.items():
        if value.shape[:1] != (block.frame.stack,):
            what = f"{block.name}: {part}[{key!r}] has shape {tuple(value.shape)}"
            raise ValueError(f"load_state_dict: {what}, expected ({block.frame.stack}, ...)")
        dtype = like[key].dtype if key in like else other or value.dtype
        loaded[key] = value.to(block.frame.device, dtype if value.is_floating_point() else value.dtype, copy=True)
    return loaded


def _check_shape(what: str, value: Tensor, own: Tensor) -> None:
    if tuple(value.shape) != tuple(own.shape):
        raise ValueError(f"load_state_dict: {what} has shape {tuple(value.shape)}, expected {tuple(own.shape)}")
