"""The saved state of a maker: keyed by site name and unstacked, so that it does not depend on how sites are stacked.

A fresh maker has every key of its state, since torch's distributed checkpoints fill only the keys that they get; ``holds``
lists the tensors that were saved, so that one which was not filled is found.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from gradmaker.averages import converted
from gradmaker.blocks import Block
from gradmaker.curvature.roles import Pooled
from gradmaker.linalg.state import State
from gradmaker.loss.reading import name_of, named
from gradmaker.representations.roles import Unstacked
from gradmaker.solvers.roles import AveragesInBasis, HeldInForms
from gradmaker.state_format import FORMAT, check_format
from gradmaker.step import pool
from gradmaker.step.clocks import PlanClocks
from gradmaker.step.draft import Work
from gradmaker.step.held import Held
from gradmaker.step.protocol import SavedMaker
from gradmaker.step.secants import dump_secants, load_secants
from gradmaker.step.state import Facts, Phase
from gradmaker.trust_region.region import Region

__all__ = ["dump", "held_tensors", "load"]

_PARTS = ("state", "cache", "average", "grafting_state")


def dump(maker: SavedMaker) -> dict[str, Any]:
    """The state of a maker: copies of all tensors, and counters."""
    now = maker.step_state.saved()
    sites = _dump_sites(maker, now.ever)
    trust = maker.trust_region
    state = {**_counters(maker, now), "sites": sites}
    if trust is not None and now.region is not None:
        state |= trust.dump(now.region, now.index)
    return {**state, "holds": sorted(held_tensors(state))}


def _counters(maker: SavedMaker, now: Facts) -> dict[str, Any]:
    blocks = maker.plan.blocks
    asked = maker.plan.asks("previous")
    return {
        "format": FORMAT,
        "step": now.index,
        "skipped": now.skipped,
        "unread": now.unread,
        "likelihood": name_of(maker.arrangement.likelihood),
        "clocks": now.clocks.dump(),
        "measured": sorted(now.ever),
        "unseen": sorted(maker.unseen),
        "pass": {
            "phase": now.phase.name,
            "asked": now.due is not None,
            "due": sorted(now.due or ()),
            "finite": now.finite,
            "checked": now.checked,
            "shares": [list(share) for share in now.shares],
            "reached": sorted(now.work.reached),
            "statistics": {name: s for b, held in now.work.held.items() for name, s in _dump_statistic(b, held).items()},
            "before": dump_secants(now.begun, blocks, maker.secants) if asked and now.begun is not None else {},
        },
        "gradients": _dump_gradients(maker, now),
        **({"secants": dump_secants(now, blocks, maker.secants)} if asked else {}),
        **({"pool": pool.dump(now.work.pooled)} if any(isinstance(b.triple.curvature, Pooled) for b in blocks) else {}),
    }


def _dump_gradients(maker: SavedMaker, now: Facts) -> dict[str, State]:
    """Gradients of an unfinished step, by parameter: those of its micro-batches, and those from before them."""
    names = {p: name for name, p in maker.model.named_parameters()}
    before = now.gradients or ()
    pairs = {"step": [(p, p.grad) for p, _ in before], "before": before}
    return {key: {names[p]: g.clone() for p, g in found if g is not None} for key, found in pairs.items()}


def held_tensors(state: Any, path: str = "") -> list[str]:
    """Path and shape of every tensor in a state."""
    if isinstance(state, Tensor):
        return [f"{path} {tuple(state.shape)}"]
    if not isinstance(state, dict):
        return []
    return [entry for key, value in state.items() for entry in held_tensors(value, f"{path}/{key}" if path else key)]


def _dump_sites(maker: SavedMaker, measured: Set[str]) -> dict[str, Any]:
    """The states of all sites, in order: of those that other ranks hold, what these send."""
    blocks, ranks = maker.plan.blocks, maker.ranks
    own = {name: tensors for b in blocks if b.owned for name, tensors in _dump_block(b, measured).items()}
    if ranks is None or all(b.owner is None for b in blocks):
        return own
    sent = tree_map_only(Tensor, Tensor.cpu, own)
    found = {name: tensors for each in ranks.objects(sent) for name, tensors in each.items()}
    return {name: found[name] for b in blocks for name in _names(b)}


def _dump_block(block: Block, measured: Set[str]) -> dict[str, Any]:
    block.restore()
    cache = block.explicit(block.held).cache or block.empty_cache()
    if block.full:
        whole = _dump_slot(block, slice(None), cache, bool(block.ready))
        found = {block.name: {**whole, "ready": sorted(block.ready)}}  # sites measured before its last refresh
    else:
        members = zip(block.sites, block.slots, strict=True)
        found = {site.name: _dump_slot(block, slot, cache, site.name in block.ready) for site, slot in members}
    if block.late and not measured & {site.name for site in block.sites}:
        return {name: {**parts, "state": {}} for name, parts in found.items()}
    return found


def _dump_slot(block: Block, slot: slice, cache: State, ready: bool) -> dict[str, Any]:
    """The state of one member of a stack.  ready: whether the cache holds it; the cache has a slot for it in any case"""
    parts = {part: {k: v[slot].clone() for k, v in getattr(block, part).items()} for part in _PARTS if part != "cache"}
    own = {k: v[slot].clone() if ready else torch.zeros_like(v[slot]) for k, v in cache.items()}
    return {"parts": _kind(block), "ready": ready, **parts, "cache": own}


def _dump_statistic(block: Block, held: Held) -> dict[str, State]:
    """Statistics of an unfinished step, by site."""
    places = zip(_names(block), [slice(None)] if block.full else block.slots, strict=True)
    return {name: {k: v[slot].clone() for k, v in held.state.items()} for name, slot in places}


def _kind(block: Block) -> str:
    triple = block.triple
    return " x ".join(type(part).__name__ for part in (triple.curvature, triple.representation, triple.solver))


def load(maker: SavedMaker, saved: dict[str, Any]) -> None:
    """Check the whole state, then copy it. ValueError for a state that does not fit."""
    check_format(saved, "a preconditioned maker")
    unseen = frozenset(saved.get("unseen", ()))
    if unseen == maker.unseen or not unseen <= {name for name, _ in maker.model.named_parameters()}:
        _load(maker, saved)
        return
    plan, before, now = maker.plan, maker.unseen, maker.step_state.now
    maker.plan_again(unseen)
    try:
        _load(maker, saved)
    except BaseException:
        maker.adopt(plan, before)
        maker.step_state.undo(now)
        raise


def _load(maker: SavedMaker, saved: dict[str, Any]) -> None:
    if not isinstance(saved.get("sites"), dict):
        raise ValueError("load_state_dict: expected what state_dict() of a preconditioned maker returned")
    trust, sites, blocks = maker.trust_region, saved["sites"], maker.plan.blocks
    region = None if trust is None else trust.load(saved)
    own = _counters(maker, maker.step_state.saved())
    trusted = trust.dump(trust.start(), 0) if trust is not None else {}
    _check_names("", saved, {**own, **trusted, "sites": sites, "holds": []})
    for key in ("pass", "clocks", "gradients"):
        _check_names(f"{key}: ", saved[key], own[key])
    for name, periods in own["clocks"].items():
        for key, period in periods.items():
            _check_names(f"clocks: {name}: {key}: ", saved["clocks"][name].get(key, {}), period)
    _check_names("sites ", sites, {name: None for block in blocks for name in _names(block)})
    loaded = [(block, _gather(block, sites)) for block in blocks if block.owned]
    work = _gather_work([b for b, _ in loaded], dict(loaded), saved)
    gradients = _gather_gradients(maker, saved)
    _check_held(saved)
    likelihood = named(saved["likelihood"])
    facts = _facts(maker, saved, work, region)
    if saved["pass"]["phase"] != Phase.BETWEEN.name:
        facts = replace(facts, gradients=tuple((p, before) for p, _, before in gradients))
    for block, held in loaded:
        block.held = held
    maker.step_state.load(facts)
    maker.arrangement.likelihood = likelihood
    for p, g, _ in gradients:
        p.grad = g


def _facts(maker: SavedMaker, saved: dict[str, Any], work: Work, region: Region | None) -> Facts:
    found, blocks = saved["pass"], maker.plan.blocks
    clocks = PlanClocks(maker.plan.methods)
    clocks.load(saved["clocks"])
    between = Facts(
        index=int(saved["step"]),
        clocks=clocks,
        skipped=int(saved["skipped"]),
        unread=int(saved["unread"]),
        ever=frozenset(saved["measured"]),
        previous=load_secants(saved["secants"], blocks) if "secants" in saved else None,
        region=region,
        due=frozenset(found["due"]) if found["asked"] else None,
        finite=bool(found["finite"]),
        checked=bool(found["checked"]),
    )
    if found["phase"] == Phase.BETWEEN.name:
        return between
    previous = load_secants(found["before"], blocks) if found["before"] else between.previous
    begun = replace(between, previous=previous, finite=True, checked=False)
    shares = tuple((float(weight), int(examples)) for weight, examples in found["shares"])
    return replace(between, phase=Phase[found["phase"]], shares=shares, work=work, begun=begun)


def _gather_work(blocks: list[Block], loaded: dict[Block, Held], saved: dict[str, Any]) -> Work:
    """Changes of the blocks by the micro-batches of an unfinished step. ValueError for unknown or missing names."""
    statistics, held = saved["pass"]["statistics"], dict[Block, Held]()
    known = {name for block in blocks for name in _names(block)}
    if unknown := sorted(set(statistics) - known):
        raise ValueError(f"load_state_dict: pass: statistics: unknown {unknown}: model, method or version differ")
    for block in blocks:
        members = [statistics[name] for name in _names(block) if name in statistics]
        if members:
            if len(members) != len(_names(block)):
                _check_names("pass: statistics: ", statistics, dict.fromkeys((*statistics, *_names(block))))
            held[block] = replace(loaded[block], state=_gather_part(block, "state", members))
    return Work(held, frozenset(saved["pass"]["reached"]), pool.load(saved.get("pool", {}), blocks))


def _gather_gradients(maker: SavedMaker, saved: dict[str, Any]) -> list[tuple[Any, Any, Any]]:
    """Parameters, with their gradients of an unfinished step and from before it; none for a state between steps."""
    if saved["pass"]["phase"] == Phase.BETWEEN.name:
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
    """ValueError for tensors that were saved and are missing."""
    found = set(held_tensors({key: value for key, value in saved.items() if key != "holds"}))
    if lost := [entry for entry in saved["holds"] if entry not in found]:
        raise ValueError(
            f"load_state_dict: {_some(lost)} was saved and is not in this state, or has another shape there: what loads into a "
            "state_dict() fills only the keys that it has, as torch's distributed checkpoints do, and this maker knows those "
            "of some tensors only when it has measured. Save between steps; where names or shapes depend on what was measured, "
            "load into what gradmaker.checkpoint_targets returns, or save with torch.save"
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


def _gather(block: Block, sites: dict[str, Any]) -> Held:
    for name in _names(block):
        _check_names(f"{name}: ", sites[name], dict.fromkeys(("parts", "ready", *_PARTS)))
        if sites[name]["parts"] != _kind(block):
            raise ValueError(f"load_state_dict: {name} was saved as {sites[name]['parts']}, and is {_kind(block)} here")
    members = [sites[name] for name in _names(block)]
    state, grafting_state = (_gather_part(block, part, [m[part] for m in members]) for part in ("state", "grafting_state"))
    cache = _gather_cache(block, [m["cache"] for m in members], any(m["ready"] for m in members))
    average = _gather_average(block, [m["average"] for m in members], cache)
    ready = sites[block.name]["ready"] if block.full else [s.name for s in block.sites if sites[s.name]["ready"]]
    return Held(state, cache, average, grafting_state, frozenset(ready))


def _gather_average(block: Block, members: list[State], cache: State) -> State:
    """The average of gradients, in the form that the block has; the saved one may have another, see `averages`."""
    own = block.average
    other = converted(own, block.triple.solver, {}) if own and isinstance(block.triple.solver, AveragesInBasis) else own
    if other is own or any(member.keys() != other.keys() for member in members):
        return _gather_part(block, "average", members)
    return converted(_gather_part(block, "average", members, other), block.triple.solver, cache)


def _gather_cache(block: Block, members: list[State], ready: bool) -> State:
    """The stacked cache; empty where it holds no member."""
    if not ready:
        return {}
    if isinstance(block.triple.representation, Unstacked):
        return _gather_unstacked(block, "cache", members[0], {}, None)
    solver, like = block.triple.solver, block.empty_cache()
    if isinstance(solver, HeldInForms):
        members = [solver.converted(member, like) for member in members]
    return _gather_part(block, "cache", members, like)


def _gather_part(block: Block, part: str, members: list[State], like: State | None = None) -> State:
    own: State = getattr(block, part) if like is None else like
    if part == "state" and isinstance(block.triple.representation, Unstacked):
        if block.late and not members[0]:
            return block.triple.representation.init(block.frame)
        return _gather_unstacked(block, part, members[0], own, block.frame.dtype)
    slots = [slice(None)] if block.full else block.slots
    for name, slot, member in zip(_names(block), slots, members, strict=True):
        _check_names(f"{name}: {part}: ", member, own)
        for key, value in member.items():
            _check_shape(f"{name}: {part}[{key!r}]", value, own[key][slot])
    return {key: torch.cat([m[key].to(value.device, value.dtype) for m in members]) for key, value in own.items()}


def _gather_unstacked(block: Block, part: str, member: State, like: State, other: torch.dtype | None) -> State:
    """State or cache of an unstacked representation: beyond the first axis, only its `update` determines names and shapes.

    other: dtype of the floating tensors that ``like`` does not have; None keeps theirs. ValueError for a wrong first axis
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
