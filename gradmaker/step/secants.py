"""The last measured step, kept for secants: its evaluation at new weights, and its saved state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradmaker.blocks import Block
from gradmaker.curvature.evidence import Evidence, Pair
from gradmaker.curvature.roles import OfSecants
from gradmaker.curvature.step import Pass, Previous
from gradmaker.step.state import Facts

__all__ = ["dump_secants", "incomplete", "load_secants", "remembered"]


def remembered(now: Facts, model: nn.Module, made: Pass, blocks: Iterable[Block]) -> Previous:
    """The step under way, with the pass that was measured last.  blocks: those that measure in this step"""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = {p: p.grad.clone() for p in parameters if p.grad is not None}
    before = now.previous
    if before is None or before.index != now.index:
        weights = {p: p.detach().clone() for p in parameters}
        return Previous([made], weights, gradients, now.index, older=_pending(before, blocks))
    for p, g in before.gradients.items():
        gradients[p] = g + gradients[p] if p in gradients else g
    return Previous([*before.passes, made], before.weights, gradients, now.index, older=before.older)


def _pending(before: Previous | None, blocks: Iterable[Block]) -> dict[str, Evidence]:
    """Pairs for methods whose own interval has not ended yet."""
    measured = {s.name for b in blocks for s in b.sites}
    pairs = {} if before is None or before.pairs is None else before.pairs
    return {name: pair for name, pair in pairs.items() if name not in measured}


def incomplete(now: Facts, asked: bool) -> Previous | None:
    """The last measured step, if its secants are to be measured at the present weights.

    RuntimeError in a step whose first micro-batches are unknown.  asked: whether secants are measured in this step
    """
    previous = now.previous
    if now.part and now.finite and asked and (previous is None or previous.index != now.index or not previous.passes):
        raise RuntimeError(
            "secants compare whole steps, and the first micro-batches of this one were not saved with the state that was "
            "loaded: save between steps"
        )
    return None if previous is None or not previous.passes or previous.index == now.index else previous


def dump_secants(now: Facts, blocks: Iterable[Block], secants: Callable[[Previous], Mapping[str, Evidence]]) -> dict[str, Any]:
    """The pairs of the last measured step, with an entry for every site that may have one.

    Its batch cannot be saved: if the weights have not moved yet, there are no pairs.
    """
    previous = now.previous
    pairs: Mapping[str, Evidence] | None = None if previous is None else previous.pairs
    if previous is not None and previous.passes:
        complete = previous.index != now.index and _moved(previous.weights)
        pairs = {**previous.older, **(secants(previous) if complete else {})}
    saved = {}
    for site, like in _places(blocks).items():
        pair = (pairs or {}).get(site, like)
        assert isinstance(pair, Pair)
        saved[site] = {"v": pair.v.clone(), "cv": pair.cv.clone()}
    index = -1 if previous is None or pairs is None else previous.index
    return {"index": index, "known": sorted(pairs or {}), "pairs": saved}


def _places(blocks: Iterable[Block]) -> dict[str, Pair]:
    """Pairs of zeros, by site."""
    return {
        s.name: curvature.empty_secant(s, b.frame.dtype, b.frame.device)
        for b in blocks
        if isinstance(curvature := b.triple.curvature, OfSecants)
        for s in b.sites
    }


def _moved(weights: Mapping[nn.Parameter, Tensor]) -> bool:
    return not all(torch.equal(p, w) for p, w in weights.items())


def load_secants(saved: Mapping[str, Any], blocks: Iterable[Block]) -> Previous | None:
    """Restore what `dump_secants` returned."""
    if saved["index"] < 0:
        return None
    places, pairs = _places(blocks), dict[str, Evidence]()
    for name in saved["known"]:
        v, cv = (saved["pairs"][name][part].to(places[name].v, copy=True) for part in ("v", "cv"))
        pairs[name] = replace(places[name], v=v, cv=cv)
    return Previous([], {}, {}, int(saved["index"]), pairs)
