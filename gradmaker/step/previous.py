"""The last measured step, seen again when the weights have moved: what secants are made of, and how they are saved."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradmaker.curvature.evidence import Evidence, Pair
from gradmaker.curvature.roles import OfSecants
from gradmaker.curvature.step import LayerSums, Pass, Previous
from gradmaker.passes.replay import Replay

if TYPE_CHECKING:
    from gradmaker.measuring import MeasuringMaker

__all__ = ["bookmark", "complete", "dump_secants", "load_secants"]


def bookmark(maker: MeasuringMaker, replay: Replay, weight: float, notes: dict[str, LayerSums]) -> Previous:
    """The step that is under way, with the pass that has just been measured.  weight: its share in the loss"""
    parameters = [p for p in maker.model.parameters() if p.requires_grad]
    made = Pass(replay, weight, notes)
    gradients = {p: p.grad.clone() for p in parameters if p.grad is not None}
    begun = maker._previous
    if begun is None or maker._part == 0 or begun.index != maker.step:  # part 0: a step may begin again after an exception
        weights = {p: p.detach().clone() for p in parameters}
        return Previous([made], weights, gradients, maker.step, older=_waiting(maker, begun))
    for p, g in begun.gradients.items():
        gradients[p] = g + gradients[p] if p in gradients else g
    return Previous([*begun.passes, made], begun.weights, gradients, maker.step, older=begun.older)


def _waiting(maker: MeasuringMaker, begun: Previous | None) -> dict[str, Evidence]:
    """Pairs of methods whose own interval has not passed yet."""
    if begun is None or begun.index == maker.step:
        return {} if begun is None else begun.older
    measured = {s.name for b in maker.plan.measured(maker._due) for s in b.sites}
    return {name: pair for name, pair in (begun.pairs or {}).items() if name not in measured}


def complete(maker: MeasuringMaker) -> None:
    """Evaluate the last measured step at the weights as they are now, once, and let go of its batch."""
    previous = maker._previous
    if maker._part >= 0 and maker._finite and maker.plan.asks("previous", maker._due):
        if previous is None or previous.index != maker.step or not previous.passes:
            raise RuntimeError(
                "secants compare whole steps, and the first micro-batches of this one were not saved with the state that was "
                "loaded: save between steps"
            )
    if previous is None or not previous.passes or previous.index == maker.step:
        return
    previous.pairs = previous.older | _secants(maker, previous)
    maker._previous = Previous([], {}, {}, previous.index, previous.pairs)


def _secants(maker: MeasuringMaker, previous: Previous) -> dict[str, Evidence]:
    found: dict[str, Evidence] = {}
    for curvature in maker.plan.curvatures(of_passes=True):
        if isinstance(curvature, OfSecants):
            step = maker._step(curvature)
            step.previous = previous
            with torch.enable_grad():
                found |= curvature.secants(step)
    return found


def dump_secants(maker: MeasuringMaker) -> dict[str, Any]:
    """The pairs of the last measured step, with a place for every site that may have one.

    Its batch cannot be saved: if the weights have not moved yet, there are none.
    """
    previous = maker._previous
    pairs = None if previous is None else previous.pairs
    if previous is not None and previous.passes:
        complete = previous.index != maker.step and _moved(previous.weights)
        pairs = previous.older | (_secants(maker, previous) if complete else {})
    saved = {}
    for site, like in _places(maker).items():
        pair = (pairs or {}).get(site, like)
        assert isinstance(pair, Pair)
        saved[site] = {"v": pair.v.clone(), "cv": pair.cv.clone()}
    index = -1 if previous is None or pairs is None else previous.index
    return {"index": index, "known": sorted(pairs or {}), "pairs": saved}


def _places(maker: MeasuringMaker) -> dict[str, Pair]:
    """Pairs of zeros, by site."""
    return {
        s.name: curvature.empty_secant(s, b.frame.dtype, b.frame.device)
        for b in maker.plan.blocks
        if isinstance(curvature := b.triple.curvature, OfSecants)
        for s in b.sites
    }


def _moved(weights: dict[nn.Parameter, Tensor]) -> bool:
    return not all(torch.equal(p, w) for p, w in weights.items())


def load_secants(maker: MeasuringMaker, saved: dict[str, Any]) -> None:
    """Go on from `dump_secants`."""
    if saved["index"] < 0:
        maker._previous = None
        return
    places, pairs = _places(maker), dict[str, Evidence]()
    for name in saved["known"]:
        v, cv = (saved["pairs"][name][part].to(places[name].v, copy=True) for part in ("v", "cv"))
        pairs[name] = replace(places[name], v=v, cv=cv)
    maker._previous = Previous([], {}, {}, int(saved["index"]), pairs)
