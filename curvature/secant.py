"""Secants: steps of the weights with the change of the gradient over them, on one batch.

The batch, in its micro-batches, is evaluated again, with its random numbers, at the start of the next pass: then the weights
have moved. Saving a state in between completes the secant first. A state that is saved after the backward pass and before the
optimizer's step has no secant to complete: that one pair is left out after loading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from gradmaker.capture.sites import Site
from gradmaker.capture.vjps import VJPs
from gradmaker.curvature.base import NO_CALLS, NO_DRAWS, NO_OUTPUTS, NO_REDUCTION, Need
from gradmaker.curvature.evidence import Evidence, Gradient, Outer, Pair, PairKind
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.curvature.layer_evidence import outer
from gradmaker.curvature.roles import OfSecants
from gradmaker.curvature.step import LayerSums, Pass, Step

__all__ = ["LayerSecant", "Secant"]


NO_OPTIONS = NO_DRAWS | NO_OUTPUTS | NO_REDUCTION


def _completed(step: Step) -> dict[str, Evidence]:
    """The secants of the previous step, which its second evaluation has completed."""
    pairs = step.previous.pairs if step.previous is not None else None
    return {} if pairs is None else {s.name: pairs[s.name] for s in step.sites if s.name in pairs}


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, kind: PairKind) -> Pair:
    zeros = torch.zeros(shape, dtype=dtype, device=device)
    return Pair(zeros, zeros.clone(), kind)


@dataclass(frozen=True, kw_only=True)
class Secant(OfSecants):
    """Secants on one batch ``t``: ``s = theta_(t+1) - theta_t``, ``y = grad L_t(theta_(t+1)) - grad L_t(theta_t)``.

    One more forward and backward pass a step. The gradients are evidence too: a solver sets the length of a first step by them,
    and checks the descent direction. Micro-batches make one batch, with the weights of their losses.

    Reference: Liu, Nocedal, Math. Programming 1989; the same batch for both: Schraudolph, Yu, Guenter, AISTATS 2007.
    """

    inapplicable = NO_OPTIONS | NO_CALLS
    gives: ClassVar[frozenset[Kind]] = kinds((Pair, "secant"), (Gradient, "initial_scaling"))
    by_parts: ClassVar[bool] = True
    layerwise: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"previous"})

    def measure(self, step: Step) -> Iterator[Mapping[str, Evidence]]:
        yield _completed(step)
        earlier, found = step.earlier(), dict[str, Evidence]()
        for site in step.sites:
            gradients = {p: _sum(p.grad, earlier.get(p)) for p in site.parameters.values()}
            if any(g is not None for g in gradients.values()):
                g = site.lay_out(gradients).to(step.statistics_dtype(site))
                found[site.name] = Gradient(g, kind="initial_scaling")
        yield found

    def empty_secant(self, site: Site, dtype: torch.dtype, device: torch.device) -> Pair:
        return _zeros(site.shape, dtype, device, "secant")

    def secants(self, step: Step) -> dict[str, Evidence]:
        previous = step.previous
        assert previous is not None
        now: dict[nn.Parameter, Tensor | None] = {}
        for each in (made for made in previous.passes if made.weight):  # without those of no examples
            for p, g in each.replay.gradient_at({}).items():
                now[p] = _sum(each.weight * g, now.get(p))
        found: dict[str, Evidence] = {}
        for site in step.sites:
            if any(p in previous.gradients for p in site.parameters.values()):
                weights: Mapping[nn.Parameter, Tensor | None] = {p: p.detach() for p in site.parameters.values()}
                s = _difference(step, site, weights, previous.weights)
                found[site.name] = Pair(s, _difference(step, site, now, previous.gradients), "secant")
        return found


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def _difference(
    step: Step, site: Site, after: Mapping[nn.Parameter, Tensor | None], before: Mapping[nn.Parameter, Tensor]
) -> Tensor:
    dtype = step.statistics_dtype(site)
    old: dict[nn.Parameter, Tensor | None] = {p: before.get(p) for p in site.parameters.values()}
    return site.lay_out(after).to(dtype) - site.lay_out(old).to(dtype)


@dataclass(frozen=True, kw_only=True)
class LayerSecant(OfSecants):
    """For each layer the inputs of this batch, and the secant of its mean output ``s`` and mean output gradient ``g``.

    ``s = mean_nr W a_nr`` over the positions that count, and ``g = (1/R) sum_nr dL/ds_nr`` for ``R`` sharing positions: for a
    mean over examples that is the mean of unscaled gradients. Before the step both are those of the ordinary passes, after it
    those of one more of each. Over micro-batches they are the mean output of all positions and the gradient of the step's loss.

    Reference: Goldfarb, Ren, Bahamou, NeurIPS 2020, arXiv:2006.08877, section 3.
    """

    gives: ClassVar[frozenset[Kind]] = kinds((Outer, "with_secants"), (Pair, "output_secant"))
    by_parts: ClassVar[bool] = True

    inapplicable = NO_OPTIONS

    @property
    def needs(self) -> frozenset[Need]:
        """The calls, with the output gradients of the ordinary backward pass, and the previous step."""
        return frozenset({"calls", "main_backward", "previous"})

    def measure(self, step: Step) -> Iterator[Mapping[str, Evidence]]:
        if step.output_gradients is not None:  # None: this rank has no examples
            yield self._of_inputs(step, VJPs(step.output_gradients))
        yield _completed(step)

    def _of_inputs(self, step: Step, vjps: VJPs) -> dict[str, Evidence]:
        mask = step.mask(step.terms[0]) if step.terms else None
        found: dict[str, Evidence] = {}
        for site in step.active():
            pairs = outer(site, step.tape, vjps, mask, step.statistics_dtype(site)).regrouped(step.tape.batch)
            found[site.name] = paired = replace(pairs, kind="with_secants")
            sums = _sums(site, paired)
            own = 1.0 if step.share is None else step.share.factor  # which is in the weight of the pass, too
            step.notes[site.name] = LayerSums(sums.outputs, sums.gradients / own, sums.counted, sums.weights)
        return found

    def empty_secant(self, site: Site, dtype: torch.dtype, device: torch.device) -> Pair:
        return replace(_zeros(site.shape[:2], dtype, device, "output_secant"), counted=0)  # (G, o)

    def secants(self, step: Step) -> dict[str, Evidence]:
        assert step.previous is not None
        before: dict[str, LayerSums] = {}
        after: dict[str, LayerSums] = {}
        for each in (made for made in step.previous.passes if made.notes):  # without those of no examples
            _add_sums(before, each.notes, each.weight)
            _add_sums(after, self._evaluate_again(step, each), each.weight)
        return {k: _change(before[k], now) for k, now in after.items()}

    def _evaluate_again(self, step: Step, made: Pass) -> dict[str, LayerSums]:
        """The sums of a pass that is evaluated again at the weights of now."""
        sites = [s for s in step.sites if s.name in made.notes]
        tape = step.tape.again(m for s in sites for m in s.modules)
        tape.assume(made.replay.examples)
        with tape.recording():
            _, loss = made.replay.run()
            tape.end_forward([loss])
            vjps = VJPs(tape.vjp([loss], [torch.ones_like(loss).unsqueeze(0)]))
        found: dict[str, LayerSums] = {}
        for site in sites:
            if site.fired(tape):
                pairs = outer(site, tape, vjps, None, step.statistics_dtype(site)).regrouped(tape.batch)
                counted = replace(pairs, weights=made.notes[site.name].weights)
                found[site.name] = _sums(site, counted)
        return found


def _change(before: LayerSums, now: LayerSums) -> Pair:
    """The secant between two evaluations of the same positions and loss."""
    total = torch.as_tensor(now.counted, dtype=now.outputs.dtype, device=now.outputs.device).clamp(min=1)
    change = now.gradients - before.gradients
    return Pair((now.outputs - before.outputs) / total, change, "output_secant", now.counted)


def _add_sums(total: dict[str, LayerSums], found: Mapping[str, LayerSums], weight: float) -> None:
    """Add the sums of a pass, with the weight of its loss in that of the step, to ``total``."""
    for name, (s, g, n, _) in found.items():
        s0, g0, n0, _ = total.get(name, LayerSums(torch.zeros_like(s), torch.zeros_like(g), 0))
        total[name] = LayerSums(s0 + s, g0 + weight * g, n0 + n)


@torch.no_grad()
def _sums(site: Site, paired: Outer) -> LayerSums:
    """Sums of a layer's outputs and output gradients in a pass."""
    a = paired.total()
    weights: dict[nn.Parameter, Tensor | None] = {p: p.detach() for p in site.parameters.values()}
    s = (site.lay_out(weights).to(a.dtype) @ a.unsqueeze(-1)).squeeze(-1)
    return LayerSums(s, paired.gradients.sum((0, 2, 3)) / paired.gradients.shape[3], paired.counted, paired.weights)
