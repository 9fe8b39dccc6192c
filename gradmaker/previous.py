"""The last measured step, seen again when the weights have moved: what secants are made of, and how they are saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradmaker.curvature.evidence import Evidence, Pair
from gradmaker.replay import Replay
from gradmaker.step import Pass, Previous

if TYPE_CHECKING:
    from gradmaker.preconditioner import PreconditionedGradientMaker

__all__ = ["bookmark", "complete", "dump_secants", "load_secants"]


def bookmark(maker: PreconditionedGradientMaker, replay: Replay, weight: float, notes: dict[str, Any]) -> Previous:
    """The step that is under way, with the pass that has just been measured.  weight: its share in the loss"""
    parameters = [p for p in maker.model.parameters() if p.requires_grad]
    made = Pass(replay, weight, notes)
    gradients = {p: p.grad.clone() for p in parameters if p.grad is not None}
    begun = maker._previous
    if begun is None or maker._part == 0 or begun.index != maker.step:  # part 0: a step may begin again after an exception
        return Previous([made], {p: p.detach().clone() for p in parameters}, gradients, maker.step)
    for p, g in begun.gradients.items():
        gradients[p] = g + gradients[p] if p in gradients else g
    return Previous([*begun.passes, made], begun.weights, gradients, maker.step)


def complete(maker: PreconditionedGradientMaker) -> None:
    """Evaluate the last measured step at the weights as they are now, once, and let go of its batch."""
    previous = maker._previous
    if previous is None or not previous.passes or previous.index == maker.step:
        return
    previous.pairs = _secants(maker, previous)
    maker._previous = Previous([], {}, {}, previous.index, previous.pairs)


def _secants(maker: PreconditionedGradientMaker, previous: Previous) -> dict[str, Evidence]:
    found: dict[str, Evidence] = {}
    for curvature in maker.plan.curvatures(of_passes=True):
        if "previous" in curvature.asks:
            step = maker._step(curvature)
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
    if previous.passes and previous.index != maker.step and _moved(previous.weights):
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
    maker._previous = Previous([], {}, {}, int(saved["index"]), pairs)
