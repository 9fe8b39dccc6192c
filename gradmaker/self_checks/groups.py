"""Check of groups: are rows that are grouped computed from one example of the inputs?

`gradmaker.self_checks.examples` compares layers with the outputs. Where rows are independent, layers and outputs may agree on
groups that are no examples of the inputs. So two examples are evaluated alone: the inputs of a layer for them have to equal
their rows in the batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradmaker.capture.arrangement import APART, key_of
from gradmaker.capture.rules.calls import Call, Layout, to_examples
from gradmaker.capture.sites import Site
from gradmaker.capture.tape import Tape
from gradmaker.passes.batches import Declared
from gradmaker.passes.deferred import Deferred, resolve
from gradmaker.passes.replay import Replay, in_modes
from gradmaker.representations.roles import groups_rows
from gradmaker.triple import Triple

__all__ = ["Inputs", "check_groups"]

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Relative to the largest entry: products of other sizes are rounded differently."""
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError, AttributeError)
"""Exceptions of a call that cannot be evaluated on one example."""
PIECE = 1 << 22
"""Distances computed at once."""

Calls = dict[nn.Module, list[Call]]


@dataclass
class Inputs:
    """The call of the model, to be repeated on one of its examples."""

    model: nn.Module
    call: Deferred
    axis: int  # of the examples, in the first tensor of the call
    strict: bool  # whether a statistic groups rows itself, so that there is no fallback

    @classmethod
    def of(cls, model: nn.Module, call: Deferred | None, tape: Tape, triples: Sequence[Triple], axis: int) -> Inputs | None:
        """None if nothing that is measured by the calls groups rows, or if the call was not recorded."""
        strict = any(groups_rows(t.representation) for t in triples)
        if not strict and not any("examples" in t.curvature.needs for t in triples):
            return None
        if call is None and tape.called is not None:
            call = Deferred(model, *tape.called, type(model).__name__)
        return None if call is None else cls(model, call, axis, strict)

    def run(self, tape: Tape, example: int | None) -> Calls:
        """The calls of layers for one example, or for all."""
        call = self.call if example is None else Declared(self.call).part(torch.tensor([example]), self.axis, tape.batch).call
        known: dict[int, object] = {}
        made = Tape(tape.root, dict.fromkeys(tape.calls), tape.arrangement)
        replay = Replay(self.model, lambda: (resolve(call, known), torch.zeros(())))
        with tape.paused(), made.recording(sized=True), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            replay.run()
        return made.calls


def check_groups(tape: Tape, sites: Sequence[Site], inputs: Inputs, generator: torch.Generator) -> bool | None:
    """Whether the rows of examples are those of the inputs; None if undecided, as where single examples cannot be evaluated.

    With dropout or batch norm a layer of the recorded pass may get other inputs than for an example alone: what this pass
    cannot decide is repeated in evaluation mode.
    """
    pair = [int(e) for e in torch.randperm(tape.batch, generator=generator)[:2]]
    found = None
    for evaluating in (False, True):
        if found is None and (not evaluating or any(m.training for m in inputs.model.modules())):
            try:
                with in_modes(dict.fromkeys(inputs.model.modules(), False)) if evaluating else nullcontext():
                    whole = inputs.run(tape, None) if evaluating else tape.calls
                    alone = [inputs.run(tape, e) for e in pair]
            except FAILURES:
                continue
            found = _verdict(tape, sites, whole, alone, pair)
    return found


@torch.no_grad()
def _verdict(tape: Tape, sites: Sequence[Site], whole: Calls, alone: Sequence[Calls], pair: Sequence[int]) -> bool | None:
    """The answer of the first decisive call among those with several rows an example, or of the others if there are none.

    Only calls count that were compared with the outputs, which takes a gradient.
    """
    found: dict[bool, list[bool | None]] = {}
    for module in dict.fromkeys(m for s in sites if _has_rows(s) for m in s.modules):
        for j, own in enumerate(tape.calls.get(module, ())):
            layout = tape.layout(own)
            seen = layout is not APART and key_of(own, tape.batch) in tape.arrangement.orders
            if not seen or any(len(calls[module]) <= j for calls in (whole, *alone)):
                continue
            several, same = _same_rows(
                whole[module][j].input, [calls[module][j].input for calls in alone], layout, module, pair
            )
            if several and same is not None:
                return same
            found.setdefault(several, []).append(same)
    return None if True in found else next((same for same in found.get(False, []) if same is not None), None)


def _has_rows(site: Site) -> bool:
    """Whether the rows of its layer are those of the first argument of a call, in the order of the call's layout."""
    return site.kind in ("matrix", "embedding", "tied") and not (site.rule is not None and site.rule.repeats)


def _same_rows(
    x: Tensor, single: Sequence[Tensor], layout: Layout, module: nn.Module, pair: Sequence[int]
) -> tuple[bool, bool | None]:
    """Whether an example has several rows, and whether the rows of two examples equal those of the examples alone.

    None if they do not, but the rows of the examples alone are nowhere in the batch, or if the two examples are equal.
    """
    axes = max(1, getattr(module, "weight", x.new_zeros(1, 1)).ndim - 1) if x.is_floating_point() else 0
    try:
        rows = to_examples(x.detach(), layout, axes)  # (n, r, ...)
        own = [to_examples(y.detach(), Layout(1, "first"), axes)[0] for y in single]  # (r, ...)
    except ValueError:
        return True, None
    several = rows.shape[1] > 1
    if any(y.shape[1:] != rows.shape[2:] for y in own):
        return several, None
    size = rows.shape[2:].numel()
    rows, own = rows.double().reshape(*rows.shape[:2], size), [y.double().reshape(len(y), size) for y in own]
    limit = TOLERANCES.get(x.dtype, 1e-3 if x.is_floating_point() else 0.0) * float(rows.abs().max())
    if all(len(y) == rows.shape[1] and _near(rows[e], y, limit) for e, y in zip(pair, own, strict=True)):
        return several, None if _near(own[0], own[1], limit) else True  # equal examples
    everything = rows.flatten(0, 1)
    return several, False if all(_contained(y, everything, limit) for y in own) else None


def _near(a: Tensor, b: Tensor, limit: float) -> bool:
    return bool((a - b).abs().max() <= limit)


def _contained(own: Tensor, everything: Tensor, limit: float) -> bool:
    """Whether every row occurs in the others."""
    step = max(1, PIECE // max(1, everything.numel()))
    for piece in own.split(step):
        if bool(((piece.unsqueeze(1) - everything).abs().amax(-1).amin(1) > limit).any()):
            return False
    return True
