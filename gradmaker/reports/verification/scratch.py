"""A scratch copy of a block, with a statistic of one piece of evidence."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor, nn

from gradmaker.blocks import Block
from gradmaker.capture.sites import Site
from gradmaker.curvature.evidence import WHOLE, Evidence, Gradient, Outer, Pair, PairKind
from gradmaker.curvature.evidence_kinds import kinds
from gradmaker.curvature.layer_evidence import LayerEvidence
from gradmaker.curvature.products import Product
from gradmaker.curvature.tied import Tied
from gradmaker.reports.verification.passes import Measured
from gradmaker.representations.base import Fold
from gradmaker.representations.roles import PerStep

__all__ = ["ONCE", "Scratch", "fill"]

ONCE = Fold(1.0, 1.0, 1.0)
"""How the evidence enters an empty statistic. Some representations refuse a decay of zero."""


PAIRS: tuple[PairKind, ...] = ("probe", "secant", "noise_and_gradient")
"""Kinds of pairs that are of whole blocks."""


@dataclass
class Scratch:
    """A copy of a block with its own statistic, and the findings on it."""

    block: Block
    found: Measured
    evidence: dict[str, Evidence] = field(default_factory=dict)
    how: set[str] = field(default_factory=set)
    unchecked: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.block.frame.device).manual_seed(1)
        self.triple = self.block.triple
        self.size = prod(self.block.frame.shape)

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal numbers."""
        frame = self.block.frame
        return torch.randn(*shape, dtype=dtype or frame.dtype, device=frame.device, generator=self.generator)


def fill(scratch: Scratch) -> None:
    """Fold evidence into the empty statistic."""
    block, gives = scratch.block, scratch.triple.curvature.gives
    evidence = {s.name: e for s in block.sites if (e := _evidence(scratch, s)) is not None}
    if isinstance(block.triple.representation, PerStep) and evidence:
        evidence = {WHOLE: _whole(scratch)}
    scratch.evidence = evidence
    if evidence:
        block.update(block.held, evidence, ONCE, set())
    if kinds((Pair, "output_secant")) <= gives and evidence:  # a secant of outputs is folded after the inputs
        v = {s.name: scratch.draw(*s.shape[:2]) for s in block.sites if s.name in evidence}
        block.update(block.held, {k: Pair(x, 2 * x, "output_secant") for k, x in v.items()}, ONCE, set())


def _evidence(scratch: Scratch, site: Site) -> Evidence | None:
    """Evidence of a site; None if the pass does not reach it."""
    gives, takes = scratch.triple.curvature.gives, scratch.triple.representation.takes
    kind = next((k for k in PAIRS if kinds((Pair, k)) <= gives), None)
    if kind is not None:
        v = scratch.draw(*site.shape)
        return Pair(v, v * (0.5 + scratch.draw(*site.shape).sigmoid()), kind)
    if any(k.evidence is Gradient for k in gives) or (kinds(Product) <= gives and kinds(Gradient) <= takes):
        return Gradient(_gradient(scratch, site))
    if kinds(Product) <= gives:
        return Product(_Rows(_rows(scratch, [site])))
    outer = scratch.found.evidence.get(site.name)
    return None if outer is None else _of_kind(scratch, outer)


def _of_kind(scratch: Scratch, outer: LayerEvidence) -> Evidence:
    """Evidence of the curvature's kind, with a mean diagonal of one: damping is then neither rounded away nor dominant."""
    gives = scratch.triple.curvature.gives
    if isinstance(outer, Tied):
        mean = _mean_square(scratch, outer, outer.parts[0])
        return outer.of_parts(lambda part: _over(part, mean))
    if kinds((Outer, "inputs")) <= gives:
        return outer.inputs_alone()
    scaled = _over(outer, _mean_square(scratch, outer, outer))
    return replace(scaled, kind="with_secants") if kinds((Outer, "with_secants")) <= gives else scaled


def _over(outer: Outer, mean: Tensor) -> Outer:
    return replace(outer, gradients=outer.gradients / torch.where(mean > 0, mean, 1.0).sqrt())


def _mean_square(scratch: Scratch, evidence: LayerEvidence, outer: Outer) -> Tensor:
    """The mean diagonal of ``C``, by a random vector.  outer: of the same block, for its shape  # ()"""
    G, o = outer.gradients.shape[1], outer.gradients.shape[-1]
    i = (outer.inputs.shape[-1] if isinstance(outer.inputs, Tensor) else outer.inputs.size) + outer.bias
    shape = (G, i, o) if outer.transposed else (G, o, i)
    return evidence.project(scratch.draw(*shape, dtype=outer.gradients.dtype)).sum(0).square().sum() / prod(shape)


def _gradient(scratch: Scratch, site: Site) -> Tensor:
    """The gradient of the loss, with a mean square of one; random where there is none.  # (G, *shape)"""
    g = site.lay_out(scratch.found.gradients).to(scratch.block.frame.dtype)
    mean = g.square().mean()
    return g / mean.sqrt() if bool(torch.isfinite(1 / mean)) else scratch.draw(*g.shape)


def _rows(scratch: Scratch, sites: list[Site]) -> Tensor:
    """A few gradients at random cotangents, as unit rows.  # (k, P)"""
    found = [torch.cat([s.lay_out(row).reshape(-1) for s in sites]) for row in scratch.found.rows]
    J = torch.stack(found).to(scratch.block.frame.dtype)
    return J / torch.where(J.any(1), J.norm(dim=1), 1.0).unsqueeze(1)


@dataclass(frozen=True)
class _Rows:
    """The product ``v -> J^T J v``."""

    J: Tensor  # (k, P)

    def __call__(self, v: Tensor) -> Tensor:
        J = self.J.to(v.dtype)
        return ((v.reshape(len(v), -1) @ J.mT) @ J).reshape(v.shape)


def _whole(scratch: Scratch) -> Evidence:
    """Evidence of all sites as one vector, for representations that last one step."""
    block = scratch.block
    if kinds(Product) <= block.triple.representation.takes:
        return Product(_Rows(_rows(scratch, block.sites)))
    weights: dict[nn.Parameter, Tensor | None] = {p: p.detach() for s in block.sites for p in s.parameters.values()}
    g, w = (
        torch.cat([part(s).reshape(-1).to(block.frame.dtype) for s in block.sites]).unsqueeze(0)
        for part in (lambda s: _gradient(scratch, s), lambda s: s.lay_out(weights))
    )
    return Gradient(g, w, "located")
