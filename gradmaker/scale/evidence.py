"""Evidence of the ranks' parts of a batch, put together at the end of a step.

*Summed*: where a statistic is a sum over examples, each rank folds its own into zeros, and the sums are added up in one
collective. *Gathered*: elsewhere every rank gets the rows of all ranks, in their order, and folds what one process would.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import replace

import torch
from torch import Tensor, nn

from gradmaker.blocks import Block
from gradmaker.capture.sites import Site
from gradmaker.curvature import Curvature
from gradmaker.curvature.evidence import Evidence, Gradient, Outer, Pair
from gradmaker.curvature.roles import OfMoments, OfSecants, Pooled
from gradmaker.curvature.tied import Tied
from gradmaker.plan import Plan
from gradmaker.representations.base import Fold
from gradmaker.scale.parts import Part, adds, zeros
from gradmaker.scale.ranks import Ranks
from gradmaker.scale.rows import gathered_rows, known_pairs, merged, shapes_of, summed_gradients, summed_moments
from gradmaker.step.draft import Draft
from gradmaker.step.held import Held
from gradmaker.step.pool import PooledEvidence
from gradmaker.step.state import StepState

__all__ = ["measure_part", "put_together", "sum_pooled", "sum_secants"]


def measure_part(
    curvature: Curvature, chunks: Iterable[Mapping[str, Evidence]], folds: Mapping[Block, Fold], examples: int
) -> Part:
    """Fold the evidence of this rank's examples into zeros where statistics add up, and keep it elsewhere.

    folds: by block of the curvature, with the weight of the micro-batch; examples: of this rank
    """
    adding = {b: replace(f, beta=1.0, mass=0.0, summed=False, refresh=False) for b, f in folds.items() if adds(b)}
    others = {s.name for b in folds if b not in adding for s in b.sites}
    sums, reached, kept = {b: zeros(b) for b in adding}, set[str](), list[Mapping[str, Evidence]]()
    with torch.no_grad():
        for chunk in chunks:
            for block, fold in adding.items():
                block.update(sums[block], chunk, fold, reached, block.names)
            kept.append({k: _settled(chunk[k]) for k in chunk if k in others})
            del chunk
    return Part(curvature, examples, sums, frozenset(reached), tuple(merged(kept)) if others else ())


def put_together(ranks: Ranks, model: nn.Module, plan: Plan, state: StepState, draft: Draft) -> None:
    """Fold what the ranks have kept in this step into a draft, one micro-batch after another."""
    parts, now = draft.take_parts(), state.now
    due = now.due or frozenset()
    for curvature in plan.curvatures(of_passes=True, due=due):
        blocks = [b for b in plan.measured(due) if b.triple.curvature == curvature]
        for j, (weight, _) in enumerate(() if isinstance(curvature, Pooled) else now.shares):
            part = parts.get((j, curvature), Part(curvature))
            _fold(ranks, model, part, state.folds(blocks, weight), draft, now.ever)


@torch.no_grad()
def sum_pooled(ranks: Ranks, plan: Plan, due: Set[str], pooled: PooledEvidence) -> PooledEvidence:
    """Pairs of one vector and its images, summed over the ranks."""
    found: dict[Pooled, list[dict[str, Pair]]] = {}
    for curvature in (c for c in plan.curvatures(of_passes=True, due=frozenset(due)) if isinstance(c, Pooled)):
        chunks, sites = pooled.get(curvature, ()), plan.sites(curvature, frozenset(due))
        most = max(int(row[0]) for row in ranks.meet([float(len(chunks))]))
        dtypes = {s.name: b.frame.dtype for b in plan.blocks for s in b.sites}
        like = {s: torch.zeros(s.shape, dtype=dtypes[s.name], device=ranks.device) for s in sites}
        empty = {s: Pair(z, z) for s, z in like.items()}
        found[curvature] = [_sum_of_pairs(ranks, empty, chunks[j] if j < len(chunks) else {}) for j in range(most)]
    return {curvature: chunks for curvature, chunks in found.items() if chunks}


@torch.no_grad()
def sum_secants(ranks: Ranks, plan: Plan, own: Mapping[str, Evidence]) -> dict[str, Evidence]:
    """Secants on the batch of all ranks: the steps are theirs together, and the changes of the gradients add up."""
    ranks.meet()
    empty = {
        s: curvature.empty_secant(s, b.frame.dtype, ranks.device)
        for b in plan.blocks
        if isinstance(curvature := b.triple.curvature, OfSecants)
        for s in b.sites
    }
    return dict(_sum_of_pairs(ranks, empty, {k: e for k, e in own.items() if isinstance(e, Pair)}))


def _sum_of_pairs(ranks: Ranks, empty: Mapping[Site, Pair], own: Mapping[str, Pair]) -> dict[str, Pair]:
    """The images of all ranks; their vectors are one, or means over the positions of each rank.  empty: pairs of zeros"""
    holders = ranks.present([s.name in own for s in empty])
    made: dict[str, Pair] = {}
    for (site, none), owners in zip(empty.items(), holders, strict=True):
        if owners:
            known = own.get(site.name, none)
            counted = known.v.new_zeros(()) + (known.counted or 0)
            if none.counted is not None:
                v = known.v * counted
            else:
                v = known.v.clone() if owners[0] == ranks.rank else torch.zeros_like(none.v)
            made[site.name] = replace(known, v=v, cv=known.cv.clone(), counted=counted)
    ranks.sum_([t for pair in made.values() for t in (pair.v, pair.cv, pair.counted) if isinstance(t, Tensor)])
    means = {s.name for s, none in empty.items() if none.counted is not None and s.name in made}
    return made | {k: replace(made[k], v=made[k].v / torch.as_tensor(made[k].counted).clamp(min=1)) for k in means}


@torch.no_grad()
def _fold(ranks: Ranks, model: nn.Module, part: Part, folds: Mapping[Block, Fold], draft: Draft, known: Set[str]) -> None:
    """Fold the evidence of all ranks into a draft.  known: sites with evidence from before this step"""
    adding = {b: f for b, f in folds.items() if adds(b)}
    _fold_sums(ranks, part, adding, draft, known)
    others = {b: f for b, f in folds.items() if b not in adding}
    if not others:
        return
    sites = {s: b.frame.dtype for b in others for s in b.sites}
    if isinstance(part.curvature, OfMoments):
        moments = summed_moments(ranks, part.chunks)
        reached = [s for s in sites if moments is not None and s.name in moments.sites]
        draft.fold([] if moments is None else [part.curvature.recursion(model, reached, moments)], others, known)
        return
    shapes = shapes_of(ranks, list(sites), part.chunks, part.examples)
    own = part.chunks[0] if part.chunks else {}
    for block, fold in others.items():  # one after another: the rows of a block are as many as its layers have on all ranks
        if any(any(shapes[s.name]) for s in block.sites):
            draft.fold([gathered_rows(ranks, block.sites, own, shapes, block.frame.dtype)], {block: fold}, known)
    if isinstance(part.curvature, OfSecants):
        draft.fold([known_pairs(ranks, part.curvature, sites, part.chunks)], others, known)
    if any(kind.evidence is Gradient for kind in part.curvature.gives):
        draft.fold(summed_gradients(ranks, sites, part.chunks, part.curvature), others, known)


def _fold_sums(ranks: Ranks, part: Part, folds: Mapping[Block, Fold], draft: Draft, known: Set[str]) -> None:
    """Let the statistics of the sites with evidence on any rank decay, and add the sums of all ranks."""
    sites = [(b, s) for b in folds for s in b.sites]
    reached = [pair for pair, r in zip(sites, ranks.present([s.name in part.reached for _, s in sites]), strict=True) if r]
    own = {b: part.sums[b] if b in part.sums else zeros(b) for b in dict.fromkeys(b for b, _ in reached)}
    _reduce(ranks, own)
    empty = {s.name: _nothing(s, part.curvature, b.frame.dtype, ranks.device) for b, s in reached}
    draft.fold([empty], {b: folds[b] for b in own}, known)
    for block, held in ((b, h) for b, h in own.items() if b.owned):
        state = draft.writable(block, False).state
        for name, value in held.state.items():
            state[name] += value


def _reduce(ranks: Ranks, own: Mapping[Block, Held]) -> None:
    """Add up the sums of all ranks: on the owner of a block, or on all."""
    for owner in dict.fromkeys(b.owner for b in own):
        ranks.sum_([value for b, held in own.items() if b.owner == owner for value in held.state.values()], owner)


def _settled(evidence: Evidence) -> Evidence:
    return evidence.settled() if isinstance(evidence, Outer) else evidence


def _nothing(site: Site, curvature: Curvature, dtype: torch.dtype, device: torch.device) -> Evidence:
    """Evidence of no examples."""
    if site.uses:
        return Tied(tuple(_no_rows(use, curvature, dtype, device) for use in site.uses))
    return _no_rows(site, curvature, dtype, device)


def _no_rows(site: Site, curvature: Curvature, dtype: torch.dtype, device: torch.device) -> Outer:
    G, o, i = site.shape
    transposed, bias = site.rule is not None and site.rule.transposed, site.bias if site.rule is not None else True
    o, i = (i, o) if transposed else (o, i)
    inputs = torch.zeros(G, 0, 1, i - bias, dtype=dtype, device=device)
    made = Outer(inputs, inputs.new_zeros(1, G, 0, 1, o), bias, transposed)
    return made.inputs_alone() if any(kind.kind == "inputs" for kind in curvature.gives) else made
