"""Secants: how the gradient of one and the same batch has changed over a step of the weights.

The batch is evaluated again, with its random numbers, at the start of the next pass: then the weights have moved. A state that
is saved in between is completed first. Saved after the backward pass and before the optimizer's step, it has nothing to
complete: that one pair is left out after loading.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from gradmaker.capture import Tape
from gradmaker.curvature.base import NO_DRAWS, NO_OUTPUTS, NO_REDUCTION, Curvature
from gradmaker.curvature.evidence import Evidence, OneHot, Opening, Outer, OutputPair, PairedInputs, SecantPair

if TYPE_CHECKING:
    from gradmaker.sites import Site
    from gradmaker.step import Previous, Step

__all__ = ["LayerSecant", "Secant"]


class _Lazy(Curvature):
    """Evidence about the step before."""

    idle = NO_DRAWS | NO_OUTPUTS | NO_REDUCTION

    @property
    def asks(self) -> frozenset[str]:
        return frozenset({"previous"})

    @abstractmethod
    def secants(self, step: Step) -> dict[str, Evidence]:
        """Of ``step.previous``, by site, with the weights as they are now."""

    def _completed(self, step: Step) -> dict[str, Evidence]:
        pairs = step.previous.pairs if step.previous is not None else None
        return {} if pairs is None else {s.name: pairs[s.name] for s in step.sites if s.name in pairs}


@dataclass(frozen=True, kw_only=True)
class Secant(_Lazy):
    """``s = theta_(t+1) - theta_t`` and ``y = grad L_t(theta_(t+1)) - grad L_t(theta_t)``, both on batch ``t``.

    One more forward and backward pass a step. Gradients are passed on as well: they say how long a first step should be, and
    whether what was made of the pairs is still sound. With micro-batches the pair is that of the last one.

    Reference: Liu, Nocedal, Math. Programming 1989; the same batch for both: Schraudolph, Yu, Guenter, AISTATS 2007.
    """

    gives: ClassVar[tuple[type[Evidence], ...]] = (SecantPair, Opening)
    layerwise: ClassVar[bool] = False

    def measure(self, step: Step) -> Iterator[Mapping[str, Evidence]]:
        if step.previous is not None:
            yield self._completed(step)
        found = ((site, site.read()) for site in step.sites)
        yield {site.name: Opening(g.to(step.statistics_dtype(site))) for site, g in found if g is not None}

    def secants(self, step: Step) -> dict[str, Evidence]:
        previous = step.previous
        assert previous is not None and previous.replay is not None
        now = previous.replay.gradient_at({})
        found: dict[str, Evidence] = {}
        for site in step.sites:
            if any(p in previous.gradients for p in site.parameters.values()):
                weights: Mapping[nn.Parameter, Tensor | None] = {p: p.detach() for p in site.parameters.values()}
                s = _difference(step, site, weights, previous.weights)
                found[site.name] = SecantPair(s, _difference(step, site, dict(now), previous.gradients))
        return found


def _difference(
    step: Step, site: Site, after: Mapping[nn.Parameter, Tensor | None], before: Mapping[nn.Parameter, Tensor]
) -> Tensor:
    dtype = step.statistics_dtype(site)
    old: dict[nn.Parameter, Tensor | None] = {p: before.get(p) for p in site.parameters.values()}
    return site.lay_out(after).to(dtype) - site.lay_out(old).to(dtype)


@dataclass(frozen=True, kw_only=True)
class LayerSecant(_Lazy):
    """For each layer the inputs of this batch, and the secant of its mean output ``s`` and mean output gradient ``g``.

    ``s = mean_nr W a_nr`` and ``g = (1/R) sum_nr dL/ds_nr`` for ``R`` sharing positions: for a mean over examples that is the
    mean of unscaled gradients. Before the step they come with the ordinary passes, after it with one more of each.

    Reference: Goldfarb, Ren, Bahamou, NeurIPS 2020, arXiv:2006.08877, section 3.
    """

    gives: ClassVar[tuple[type[Evidence], ...]] = (PairedInputs, OutputPair)

    @property
    def rides(self) -> bool:
        """The output gradients before the step are those of the ordinary backward pass."""
        return True

    def measure(self, step: Step) -> Iterator[Mapping[str, Evidence]]:
        assert step.ridden is not None
        mask = step.mask(step.terms[0]) if step.terms else None
        found: dict[str, Evidence] = {}
        for site in step.active():
            outer = site.outer(step.tape, step.ridden, mask, step.statistics_dtype(site))
            step.notes[site.name] = _means(site, outer)
            found[site.name] = PairedInputs(**vars(outer))
        yield found
        yield self._completed(step)

    def secants(self, step: Step) -> dict[str, Evidence]:
        previous = step.previous
        assert previous is not None and previous.replay is not None
        sites = [s for s in step.sites if s.name in previous.notes]
        tape = Tape(step.tape.root, dict.fromkeys(m for s in sites for m in s.modules))
        with tape.recording():
            _, loss = previous.replay.run()
            tape.end_forward()
            pulled = tape.pull(loss, torch.ones_like(loss).unsqueeze(0))
        after = {s: _means(s, s.outer(tape, pulled, None, step.statistics_dtype(s))) for s in sites if s.fired(tape)}
        return {s.name: _change(previous, s, now) for s, now in after.items()}


def _change(previous: Previous, site: Site, now: tuple[Tensor, Tensor]) -> OutputPair:
    s, g = previous.notes[site.name]
    return OutputPair(now[0] - s, now[1] - g)


@torch.no_grad()
def _means(site: Site, outer: Outer) -> tuple[Tensor, Tensor]:
    """Mean output, less a bias that is not trained, and mean output gradient.  # (G, o), (G, o)"""
    assert not isinstance(outer.inputs, OneHot)
    a = outer.inputs.mean((1, 2))
    a = torch.cat([a, a.new_ones(len(a), 1)], 1) if outer.bias else a
    weights: dict[nn.Parameter, Tensor | None] = {p: p.detach() for p in site.parameters.values()}
    s = (site.lay_out(weights).to(a.dtype) @ a.unsqueeze(-1)).squeeze(-1)
    return s, outer.gradients.sum((0, 2, 3)) / outer.gradients.shape[3]
