"""What a maker saves: keyed by site name, unstacked, so that it does not depend on how sites are grouped.

A fresh maker shows every key of its state, since torch's distributed checkpoints fill no more than they are shown; ``holds``
lists the tensors that were saved, so that one which was not filled is noticed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradmaker.blocks import Block
from gradmaker.curvature.roles import Pooled
from gradmaker.linalg.state import State
from gradmaker.representations.roles import Unstacked
from gradmaker.state_format import FORMAT, check_format
from gradmaker.step.ledger import Ledger
from gradmaker.step.pool import Pool
from gradmaker.step.previous import dump_secants, load_secants

if TYPE_CHECKING:
    from gradmaker.preconditioner import PreconditionedGradientMaker

__all__ = ["dump", "load"]

_PARTS = ("state", "cache", "average", "grafting_state")


def dump(maker: PreconditionedGradientMaker) -> dict[str, Any]:
    """Copies of all tensors, and counters."""
    if maker._ledger.solved is not None:
        raise RuntimeError(
            "state_dict: precondition() has ended in an exception while it wrote into .grad: call it again, or begin the step "
            "again, before a state is saved"
        )
    if maker._part >= 0 and not maker._open and maker._ledger.measured(maker._part):
        raise RuntimeError(
            "state_dict: a pass of a loop that is not the maker's has been measured, and its gradient is in .grad, which is "
            "not saved: save between steps, after optimizer.step()"
        )
    for block in maker.plan.blocks:
        block.check_whole()
    measured = maker.measured
    sites = {name: tensors for block in maker.plan.blocks for name, tensors in _dump_block(block, measured).items()}
    state = {**_counters(maker), "sites": sites}
    return {**state, "holds": sorted(_held(state))}


def _counters(maker: PreconditionedGradientMaker) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "step": maker.step,
        "skipped": maker.skipped,
        "clocks": maker._clocks.dump(),
        "measured": sorted(maker._ever),
        "unseen": sorted(maker._unseen),
        "pass": {
            "asked": maker._asked,
            "due": sorted(maker._due),
            "finite": maker._finite,
            "noted": maker._noted,
            "part": maker._part,
            "open": maker._open,
            "ended": maker._ended,
            **maker._ledger.dump(),
        },
        "gradients": _dump_gradients(maker),
        **({"secants": dump_secants(maker)} if maker.plan.asks("previous") else {}),
        **({"pool": maker._pool.dump()} if any(isinstance(b.triple.curvature, Pooled) for b in maker.plan.blocks) else {}),
    }


def _dump_gradients(maker: PreconditionedGradientMaker) -> dict[str, State]:
    """Of a step that is under way: what its micro-batches have brought, and what was there before them; by parameter."""
    if not maker._open:
        return {"step": {}, "before": {}}
    names = {p: name for name, p in maker.model.named_parameters()}
    pairs = {"step": [(p, p.grad) for p, _ in maker._kept], "before": maker._kept}
    return {key: {names[p]: g.clone() for p, g in found if g is not None} for key, found in pairs.items()}


def _held(state: Any, path: str = "") -> list[str]:
    """Path and shape of every tensor."""
    if isinstance(state, Tensor):
        return [f"{path} {tuple(state.shape)}"]
    if not isinstance(state, dict):
        return []
    return [entry for key, value in state.items() for entry in _held(value, f"{path}/{key}" if path else key)]


def _dump_block(block: Block, measured: set[str]) -> dict[str, Any]:
    cache = block.cache or block.empty_cache()
    if block.full:
        whole = _dump_slot(block, slice(None), cache, bool(block.ready))
        found = {block.name: {**whole, "ready": sorted(block.ready)}}  # of the sites that were measured by its last refresh
    else:
        members = zip(block.sites, block.slots, strict=True)
        found = {site.name: _dump_slot(block, slot, cache, site.name in block.ready) for site, slot in members}
    if block.late and not measured & {site.name for site in block.sites}:
        return {name: {**parts, "state": {}} for name, parts in found.items()}
    return found


def _dump_slot(block: Block, slot: slice, cache: State, ready: bool) -> dict[str, Any]:
    """One member of a stack.  ready: whether the cache holds it; it has a place there in any case"""
    parts = {part: {k: v[slot].clone() for k, v in getattr(block, part).items()} for part in _PARTS if part != "cache"}
    own = {k: v[slot].clone() if ready else torch.zeros_like(v[slot]) for k, v in cache.items()}
    return {"parts": _kind(block), "ready": ready, **parts, "cache": own}


def _kind(block: Block) -> str:
    triple = block.triple
    return " x ".join(type(part).__name__ for part in (triple.curvature, triple.representation, triple.solver))


def load(maker: PreconditionedGradientMaker, saved: dict[str, Any]) -> None:
    """Check everything, then copy everything."""
    check_format(saved, "a preconditioned maker")
    unseen = frozenset(saved.get("unseen", ()))
    if unseen == maker._unseen or not unseen <= {name for name, _ in maker.model.named_parameters()}:
        _load(maker, saved)
        return
    before = maker.plan, maker._unseen
    maker.plan_again(unseen)
    try:
        _load(maker, saved)
    except BaseException:
        maker.adopt(*before)
        raise


def _load(maker: PreconditionedGradientMaker, saved: dict[str, Any]) -> None:
    if not isinstance(saved.get("sites"), dict):
        raise ValueError("load_state_dict: expected what state_dict() of a preconditioned maker returned")
    sites, own = saved["sites"], _counters(maker)
    _check_names("", saved, {**own, "sites": sites, "holds": []})
    for key in ("pass", "clocks", "gradients"):
        _check_names(f"{key}: ", saved[key], own[key])
    for name, periods in own["clocks"].items():
        for key, period in periods.items():
            _check_names(f"clocks: {name}: {key}: ", saved["clocks"][name].get(key, {}), period)
    _check_names("sites ", sites, {name: None for block in maker.plan.blocks for name in _names(block)})
    loaded = [(block, _gather(block, sites)) for block in maker.plan.blocks]
    gradients = _gather_gradients(maker, saved)
    _check_held(saved)
    for block, parts in loaded:
        for part, tensors in parts.items():
            setattr(block, part, tensors)
        held = sites[block.name]["ready"] if block.full else [s.name for s in block.sites if sites[s.name]["ready"]]
        block.ready = set(held)
        block.torn = ""
    _load_counters(maker, saved)
    maker._kept = [(p, before) for p, _, before in gradients]
    for p, g, _ in gradients:
        p.grad = g


def _load_counters(maker: PreconditionedGradientMaker, saved: dict[str, Any]) -> None:
    maker.step, maker.skipped = int(saved["step"]), int(saved["skipped"])
    maker._ever = set(saved["measured"])
    if "secants" in saved:
        load_secants(maker, saved["secants"])
    maker._pool = Pool.load(maker.plan, saved.get("pool", {}))
    found = saved["pass"]
    for key in ("asked", "finite", "noted", "part", "open", "ended"):
        setattr(maker, f"_{key}", found[key])
    maker._due, maker._left = frozenset(found["due"]), []
    maker._ledger = Ledger.load(found, maker.plan.blocks)
    maker._clocks.load(saved["clocks"])


def _gather_gradients(maker: PreconditionedGradientMaker, saved: dict[str, Any]) -> list[tuple[Any, Any, Any]]:
    """Parameters, with their gradients of a step that is under way and from before it; none of a state between steps."""
    if not saved["pass"]["open"]:
        return []
    own = {name: p for name, p in maker.model.named_parameters() if p.requires_grad}
    for key, found in saved["gradients"].items():
        for name, g in found.items():
            if name not in own:
                raise ValueError(f"load_state_dict: gradients: {key}: unknown {[name]}: model, method or version differ")
            _check_shape(f"gradients: {key}[{name!r}]", g, own[name])

    def copied(key: str, name: str) -> Tensor | None:
        g = saved["gradients"][key].get(name)
        return None if g is None else g.to(own[name].device, own[name].dtype, copy=True)

    return [(p, copied("step", name), copied("before", name)) for name, p in own.items()]


def _check_held(saved: dict[str, Any]) -> None:
    """ValueError for tensors that were saved and are not there."""
    found = set(_held({key: value for key, value in saved.items() if key != "holds"}))
    if lost := [entry for entry in saved["holds"] if entry not in found]:
        raise ValueError(
            f"load_state_dict: {_some(lost)} was saved and is not in this state, or has another shape there: what loads into a "
            "state_dict() fills only the keys that it has, as torch's distributed checkpoints do, and this maker knows those "
            "of some tensors only when it has measured. Save between steps; where names or shapes depend on what was measured, "
            "save with torch.save"
        )


def _some(entries: list[str]) -> str:
    return ", ".join(entries[:3]) + (f" and {len(entries) - 3} more" if len(entries) > 3 else "")


def _check_names(what: str, given: dict[str, Any], expected: dict[str, Any]) -> None:
    """ValueError unless two mappings have the same keys."""
    if set(given) != set(expected):
        missing, unknown = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
        raise ValueError(f"load_state_dict: {what}missing {missing}, unknown {unknown}: model, method or version differ")


def _names(block: Block) -> list[str]:
    return [block.name] if block.full else [site.name for site in block.sites]


def _gather(block: Block, sites: dict[str, Any]) -> dict[str, State]:
    for name in _names(block):
        _check_names(f"{name}: ", sites[name], dict.fromkeys(("parts", "ready", *_PARTS)))
        if sites[name]["parts"] != _kind(block):
            raise ValueError(f"load_state_dict: {name} was saved as {sites[name]['parts']}, and is {_kind(block)} here")
    found = {
        part: _gather_part(block, part, [sites[name][part] for name in _names(block)]) for part in _PARTS if part != "cache"
    }
    members = [sites[name] for name in _names(block)]
    return {**found, "cache": _gather_cache(block, [m["cache"] for m in members], any(m["ready"] for m in members))}


def _gather_cache(block: Block, members: list[State], ready: bool) -> State:
    """The stacked cache; none where no member is in it."""
    if not ready:
        return {}
    if isinstance(block.triple.representation, Unstacked):
        return _gather_live(block, "cache", members[0], {}, None)
    return _gather_part(block, "cache", members, block.empty_cache())


def _gather_part(block: Block, part: str, members: list[State], like: State | None = None) -> State:
    own: State = getattr(block, part) if like is None else like
    if part == "state" and isinstance(block.triple.representation, Unstacked):
        if block.late and not members[0]:
            return block.triple.representation.init(block.frame)
        return _gather_live(block, part, members[0], own, block.frame.dtype)
    slots = [slice(None)] if block.full else block.slots
    for name, slot, member in zip(_names(block), slots, members, strict=True):
        _check_names(f"{name}: {part}: ", member, own)
        for key, value in member.items():
            _check_shape(f"{name}: {part}[{key!r}]", value, own[key][slot])
    return {key: torch.cat([m[key].to(value.device, value.dtype) for m in members]) for key, value in own.items()}


def _gather_live(block: Block, part: str, member: State, like: State, other: torch.dtype | None) -> State:
    """The state or cache of an unstacked representation: only its own `update` knows names and shapes, beyond the first axis.

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
