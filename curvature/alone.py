"""Per-example gradients by an evaluation of the declared calls on each example, where a recorded pass cannot separate them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gradmaker.capture.arrangement import Arrangement
from gradmaker.capture.one_hot import OneHot
from gradmaker.capture.tape import Tape
from gradmaker.capture.vjps import VJPs
from gradmaker.curvature.evidence import Evidence, Outer
from gradmaker.curvature.layer_evidence import LayerEvidence, layer_evidence
from gradmaker.curvature.step import Step
from gradmaker.curvature.tied import Tied
from gradmaker.errors import SelfCheckWarning
from gradmaker.loss.weights import numbers
from gradmaker.passes.batches import Batch

__all__ = ["examples_alone"]

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Relative error that the sum over examples may have against the batch gradient; half precision has `HALF`."""
HALF = 3e-2
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError, AttributeError)
"""Exceptions of calls that cannot be evaluated on a single example."""


@dataclass
class _Single:
    """One example: evidence by site, in the scale of the example's own loss, its gradient, and its number of loss terms."""

    evidence: dict[str, LayerEvidence]
    gradient: list[Tensor]
    number: Tensor  # (1,)


@torch.enable_grad()
def examples_alone(step: Step) -> Mapping[str, Evidence] | None:
    """Per-example gradients, by ``n`` evaluations of the declared calls on one example each.

    Returns None where such an evaluation fails, or where no choice of weights makes the per-example gradients add up to the
    gradient of the batch: the examples then depend on each other. The weight of an example is 1 in a sum, ``1 / n`` in a mean,
    or ``M_n / M`` in a mean over ``M`` terms, ``M_n`` of them its own.
    """
    head, n = step.head, step.tape.batch
    if step.own is None or head is None or head.loss is None or not step.tape.sized or n < 2:
        return None
    parameters = list(dict.fromkeys(p for s in step.sites for p in s.parameters.values() if p.requires_grad))
    expected = step.tape.vjp_parameters([head.loss], [torch.ones_like(head.loss)], parameters)
    plain, weighed = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    found: list[_Single | None] = []
    try:
        batch = step.own()
        with step.tape.paused(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for e in range(n):
                single = _single(step, batch, e, parameters)
                found.append(single)
                for j, g in enumerate([] if single is None else single.gradient):
                    assert single is not None
                    plain[j] += g
                    weighed[j] += g * single.number.to(g)
    except FAILURES:
        return None
    weights = _weights(step, found, (plain, weighed), expected)
    if weights is None:
        return None
    _warn_cost(step)
    factors = _factors(step, found, weights)
    names = dict.fromkeys(k for single in found if single is not None for k in single.evidence)
    return {k: _joined([None if s is None else s.evidence.get(k) for s in found]).scaled(factors) for k in names}


def _single(step: Step, batch: Batch, e: int, parameters: Sequence[nn.Parameter]) -> _Single | None:
    """Evaluate the declared calls on example ``e``.  Returns None where the example has no term in the loss."""
    own = batch.part(torch.tensor([e]), step.tape.batch)
    modules = dict.fromkeys(m for s in step.sites for m in s.modules)
    tape = Tape(step.tape.root, modules, Arrangement(direct=step.tape.arrangement.direct))
    tape.assume(1)
    with tape.recording(sized=True):
        loss, terms = own.evaluate()
        tape.end_forward([loss])
        if terms and not any(bool(t.valid().any()) for t in terms):
            return None
        one = torch.ones_like(loss)
        gradient = tape.vjp_parameters([loss], [one], parameters)
        rows = {p: g.unsqueeze(0) for p, g in zip(parameters, gradient, strict=True)}
        vjps = VJPs(tape.vjp([loss], [one.unsqueeze(0)]), {}, rows)
    alone = replace(step, tape=tape, terms=terms, masked=any(bool(t.masked()) for t in terms))
    mask = alone.mask(terms[0]) if terms else None
    evidence = {s.name: layer_evidence(s, tape, vjps, mask, step.statistics_dtype(s)) for s in alone.active()}
    return _Single(evidence, gradient, numbers(terms, 1) if terms else torch.ones(1, dtype=torch.float64))


def _weights(
    step: Step, found: Sequence[_Single | None], sums: tuple[list[Tensor], list[Tensor]], expected: list[Tensor]
) -> Tensor | None:
    """Weights of the examples' losses in the batch loss; None where the gradients add up with no choice.  # (n,)"""
    n, like = len(found), expected[0].device
    counts = torch.cat([torch.zeros(1, dtype=torch.float64) if s is None else s.number.cpu() for s in found]).to(like)
    one = torch.ones_like(counts)
    trials: list[tuple[Tensor, list[Tensor], Tensor]] = [(one / n, sums[0], one[0] / n), (one, sums[0], one[0])]
    if step.terms:
        M = numbers(step.terms, 1).to(counts)[0]
        trials.append((counts / M, sums[1], 1 / M))
    size = _norm(expected)
    limit = _tolerance(step, expected) * max(size, torch.finfo(torch.float32).tiny)
    for weights, total, factor in trials:
        if _norm([a * factor.to(a) - b for a, b in zip(total, expected, strict=True)]) <= limit:
            return weights
    return None


def _factors(step: Step, found: Sequence[_Single | None], weights: Tensor) -> Tensor:
    """Factors ``w_n sqrt(M_n)`` of the gradients: ``w_n`` times the example's own loss has its ``M_n`` over ``w_n``.  # (n,)"""
    if not step.terms:
        M = len(found) if step.reduction == "mean" else 1
        return weights * math.sqrt(M)
    counts = torch.cat([torch.ones_like(weights[:1]) if s is None else s.number.to(weights) for s in found])
    return (weights * counts).sqrt()


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([t.detach().abs().double().square().sum() for t in tensors]).sum().sqrt())


def _tolerance(step: Step, tensors: Sequence[Tensor]) -> float:
    calls = [call for each in step.tape.calls.values() for call in each]
    if any(call.autocast is not None for call in calls):
        return HALF
    return max(TOLERANCES.get(t.abs().dtype, HALF) for t in tensors)


def _joined(found: Sequence[LayerEvidence | None]) -> LayerEvidence:
    """The evidence of single examples as that of a batch, each use of a tied table by itself."""
    if not any(isinstance(e, Tied) for e in found):
        return _concatenated([e if isinstance(e, Outer) else None for e in found])
    tied = [e if isinstance(e, Tied) else None for e in found]
    uses = ([None if e is None else getattr(e, use) for e in tied] for use in ("lookup", "head"))
    return Tied(tuple(_concatenated(use) for use in uses if any(use)))


def _concatenated(outers: Sequence[Outer | None]) -> Outer:
    """Concatenate the evidence of single examples to that of a batch, padded with positions of weight zero."""
    like = next(o for o in outers if o is not None)
    r = max(o.gradients.shape[3] for o in outers if o is not None)
    padded = [_padded(_empty(like) if o is None else o, r) for o in outers]
    weighed = any(o is None or o.weights is not None or o.gradients.shape[3] < r for o in outers)
    inputs = [o.inputs for o in padded]
    lookups = [x for x in inputs if isinstance(x, OneHot)]
    joined = (
        replace(lookups[0], index=torch.cat([x.index for x in lookups]))
        if lookups
        else torch.cat([x for x in inputs if isinstance(x, Tensor)], 1)
    )
    weights = torch.cat([o.weights for o in padded if o.weights is not None]) if weighed else None
    return replace(like, inputs=joined, gradients=torch.cat([o.gradients for o in padded], 2), weights=weights)


def _empty(like: Outer) -> Outer:
    zeros = torch.zeros_like(like.gradients)
    return replace(like, gradients=zeros, weights=zeros.new_zeros(1, zeros.shape[3]))


def _padded(o: Outer, r: int) -> Outer:
    own = o.gradients.shape[3]
    weights = o.gradients.new_ones(1, own) if o.weights is None else o.weights
    inputs = replace(o.inputs, index=_pad(o.inputs.index, 1, r)) if isinstance(o.inputs, OneHot) else _pad(o.inputs, 2, r)
    return replace(o, inputs=inputs, gradients=_pad(o.gradients, 3, r), weights=_pad(weights, 1, r))


def _pad(x: Tensor, axis: int, size: int) -> Tensor:
    missing = list(x.shape)
    missing[axis] = size - missing[axis]
    return torch.cat([x, x.new_zeros(missing)], axis) if missing[axis] else x


def _warn_cost(step: Step) -> None:
    """Warn once of the cost of a pass for each example."""
    notes = step.tape.arrangement.notes
    if "examples" not in notes:
        notes["examples"] = f"the gradients of {step.tape.batch} examples took a pass of the declared calls for each"
        warnings.warn(f"FisherEmp: {notes['examples']}, at every measurement", SelfCheckWarning, stacklevel=2)
