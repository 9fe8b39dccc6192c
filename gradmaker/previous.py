"""The last measured pass, seen again when the weights have moved: what secants are made of, and how they are saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradmaker.capture import Tape
from gradmaker.curvature.evidence import Evidence, Pair
from gradmaker.replay import Replay
from gradmaker.step import Previous

if TYPE_CHECKING:
    from gradmaker.preconditioner import PreconditionedGradientMaker

__all__ = ["bookmark", "complete", "dump_secants", "load_secants"]


def bookmark(maker: PreconditionedGradientMaker, replay: Replay, weight: float, notes: dict[str, Any]) -> Previous:
    """The pass that has just been measured.  weight: its share in the loss, which ``.grad`` holds"""
    parameters = [p for p in maker.model.parameters() if p.requires_grad]
    gradients = {p: p.grad / weight for p in parameters if p.grad is not None}
    return Previous(replay, {p: p.detach().clone() for p in parameters}, gradients, notes, maker.step)


def complete(maker: PreconditionedGradientMaker) -> None:
    """Evaluate the last measured pass at the weights as they are now, once, and let go of its batch."""
    previous = maker._previous
    if previous is None or previous.replay is None or previous.index == maker.step:
        return
    previous.pairs = _secants(maker, previous)
    maker._previous = Previous(None, {}, {}, {}, previous.index, previous.pairs)


def _secants(maker: PreconditionedGradientMaker, previous: Previous) -> dict[str, Evidence]:
    found: dict[str, Evidence] = {}
    for curvature in maker.plan.curvatures(of_passes=True):
        if "previous" in curvature.asks:
            step = maker._step(curvature, Tape(maker.model, ()), [], False)
            step.previous = previous
            with torch.enable_grad():
                found |= curvature.secants(step)
    return found


def dump_secants(maker: PreconditionedGradientMaker) -> dict[str, Any]:
    """The pairs of the last measured step. Its batch cannot be saved: if the weights have not moved yet, there are none."""
    previous = maker._previous
    if previous is None:
        return {}
    pairs = previous.pairs
    if previous.replay is not None and previous.index != maker.step and _moved(previous.weights):
        pairs = _secants(maker, previous)
    if pairs is None:
        return {}
    saved = {k: {"v": e.v.clone(), "cv": e.cv.clone()} for k, e in pairs.items() if isinstance(e, Pair)}
    return {"index": previous.index, "pairs": saved}


def _moved(weights: dict[nn.Parameter, Tensor]) -> bool:
    return not all(torch.equal(p, w) for p, w in weights.items())


def load_secants(maker: PreconditionedGradientMaker, saved: dict[str, Any]) -> None:
    """Go on from `dump_secants`."""
    if not saved:
        maker._previous = None
        return
    device = {s.name: b.frame.device for b in maker.plan.blocks for s in b.sites}
    pairs: dict[str, Evidence] = {
        k: Pair(e["v"].to(device[k], copy=True), e["cv"].to(device[k], copy=True)) for k, e in saved["pairs"].items()
    }
    maker._previous = Previous(None, {}, {}, {}, int(saved["index"]), pairs)
