"""Rows of the evidence of all ranks, in their order, so that each rank folds what one process with all examples would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from gradmaker.capture.one_hot import OneHot
from gradmaker.capture.sites import Site
from gradmaker.curvature import Curvature
from gradmaker.curvature.evidence import Evidence, Gradient, Outer, Pair
from gradmaker.curvature.products import Moments
from gradmaker.curvature.roles import OfSecants
from gradmaker.scale.ranks import Ranks, RefusedError

__all__ = ["gathered_rows", "merged", "shapes_of", "summed_gradients", "summed_moments"]

LENGTH = 13
"""Numbers that describe the evidence of a site."""


@dataclass(frozen=True)
class _Shape:
    """The evidence of a site on one rank, without its numbers."""

    k: int  # cotangents
    G: int
    n: int
    r: int
    o: int
    i: int  # of inputs; -1: one-hot
    size: int  # of one-hot inputs
    padding: int  # -1: none
    weights: int
    transposed: int
    kind: int  # index in those of `Outer`
    bias: int
    examples: int  # of the rank

    @classmethod
    def of(cls, outer: Outer, examples: int) -> _Shape:
        (k, G, _, _, o), a = outer.gradients.shape, outer.inputs
        n, r = a.index.shape if isinstance(a, OneHot) else a.shape[1:3]
        padding = a.padding if isinstance(a, OneHot) and a.padding is not None else -1
        i, size = (-1, a.size) if isinstance(a, OneHot) else (a.shape[3], 0)
        kind = Outer.kinds.index(outer.kind)
        flags = map(int, (outer.weights is not None, outer.transposed, kind, outer.bias, examples))
        return cls(k, G, n, r, o, i, size, padding, *flags)

    def parts(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its tensors."""
        inputs = {"index": (self.n, self.r)} if self.i < 0 else {"inputs": (self.G, self.n, self.r, self.i)}
        weights = {"weights": (self.n, self.r)} if self.weights else {}
        return {**inputs, "gradients": (self.k, self.G, self.n, self.r, self.o), **weights}


def merged(chunks: Sequence[Mapping[str, Evidence]]) -> list[dict[str, Evidence]]:
    """Evidence in as few chunks as possible: rows in one, with all of their cotangents, and sums each in its own."""
    made: list[dict[str, Evidence]] = [{} for _ in chunks]
    for j, chunk in enumerate(chunks):
        for name, evidence in chunk.items():
            first = made[0].get(name)
            if j and isinstance(evidence, Outer) and isinstance(first, Outer):
                made[0][name] = replace(first, gradients=torch.cat([first.gradients, evidence.gradients]))
            else:
                made[j][name] = evidence
    return [chunk for j, chunk in enumerate(made) if chunk or not j]


# ------------------------------------------------------------------ gradients: linear in the examples
def summed_gradients(
    ranks: Ranks, sites: Mapping[Site, torch.dtype], chunks: Sequence[Mapping[str, Evidence]], curvature: Curvature
) -> Iterator[dict[str, Evidence]]:
    """Gradients of the examples of all ranks, chunk by chunk.  sites: with the dtypes of their statistics"""
    (like,) = (Gradient(torch.empty(0), kind=k.kind) for k in curvature.gives if k.evidence is Gradient)  # type: ignore[arg-type]
    own = [{k: e.gradient for k, e in chunk.items() if isinstance(e, Gradient)} for chunk in chunks]
    own = [chunk for chunk in own if chunk]
    most = max(int(row[0]) for row in ranks.meet([float(len(own))]))
    for chunk in (own[j] if j < len(own) else {} for j in range(most)):
        holders = ranks.present([site.name in chunk for site in sites])
        found: dict[str, Tensor] = {}
        for (site, dtype), owners in zip(sites.items(), holders, strict=True):
            if owners:
                known = site.name in chunk
                zeros = torch.zeros(() if known else site.shape, dtype=dtype, device=ranks.device)
                found[site.name] = chunk[site.name].clone() if known else zeros
        ranks.sum_(list(found.values()))
        yield {name: replace(like, gradient=value) for name, value in found.items()}


def summed_moments(ranks: Ranks, chunks: Sequence[Mapping[str, Evidence]]) -> Moments | None:
    """The moments of the examples of all ranks; None if there are none."""
    own = next((e for chunk in chunks for e in chunk.values() if isinstance(e, Moments)), None)
    described = None if own is None else (own.sites, [(tuple(t.shape), t.dtype) for t in own.sums])
    told = [each for each in ranks.objects(described) if each is not None]
    if not told:
        return None
    if any(each != told[0] for each in told):
        raise RefusedError(f"several processes: the ranks have measured {[each[0] for each in told]} in one pass")
    names, shapes = told[0]
    zeros = [torch.zeros(shape, dtype=dtype, device=ranks.device) for shape, dtype in shapes]
    sums = zeros if own is None else [t.clone() for t in own.sums]
    ranks.sum_(sums)
    return Moments(names, tuple(sums))


# ------------------------------------------------------------------ pairs that all ranks have found together
def known_pairs(
    ranks: Ranks, curvature: OfSecants, sites: Mapping[Site, torch.dtype], chunks: Sequence[Mapping[str, Evidence]]
) -> dict[str, Evidence]:
    """The secants of all ranks, also on those that had no examples to measure."""
    own = {name: e for chunk in chunks for name, e in chunk.items() if isinstance(e, Pair)}
    holders = ranks.present([site.name in own for site in sites])
    found: dict[str, Evidence] = {}
    values: list[Tensor] = []
    for (site, dtype), owners in zip(sites.items(), holders, strict=True):
        if owners:
            pair = own[site.name] if owners[0] == ranks.rank else curvature.empty_secant(site, dtype, ranks.device)
            found[site.name] = pair = replace(pair, v=pair.v.clone(), cv=pair.cv.clone())
            values += [pair.v, pair.cv]
    ranks.sum_(values)
    return found


# ------------------------------------------------------------------ rows: in the order of the ranks
def shapes_of(
    ranks: Ranks, sites: Sequence[Site], chunks: Sequence[Mapping[str, Evidence]], examples: int
) -> dict[str, list[_Shape | None]]:
    """The rows that the ranks have, by site and rank. RefusedError for evidence that is neither rows nor a gradient.

    examples: of this rank
    """
    for chunk in chunks:
        if other := {type(e).__name__ for e in chunk.values() if not isinstance(e, (Outer, Gradient, Pair))}:
            raise RefusedError(f"several processes: evidence of the class {', '.join(sorted(other))} cannot be gathered")
    own = chunks[0] if chunks else {}
    table = torch.zeros(ranks.size, len(sites), LENGTH, dtype=torch.int64)
    for j, site in enumerate(sites):
        outer = own.get(site.name)
        if isinstance(outer, Outer):
            table[ranks.rank, j] = torch.tensor(astuple(_Shape.of(outer, examples)))
    table = table.to(ranks.device)
    dist.all_reduce(table, group=ranks.group)
    rows = table.tolist()
    return {s.name: [_Shape(*row[j]) if row[j][1] else None for row in rows] for j, s in enumerate(sites)}


def gathered_rows(
    ranks: Ranks,
    sites: Sequence[Site],
    own: Mapping[str, Evidence],
    shapes: Mapping[str, Sequence[_Shape | None]],
    dtype: torch.dtype,
) -> dict[str, Evidence]:
    """The rows of all ranks at the sites of a block.  dtype: of its statistic"""
    known = [site.name for site in sites if any(shapes[site.name])]
    parts = _exchanged(ranks, known, own, shapes, dtype)
    found: dict[str, Evidence] = {}
    for name in known:
        had = [_outer(shape, parts[r], name) for r, shape in enumerate(shapes[name]) if shape is not None]
        found[name] = _concatenated(had, 2 if _together(name, shapes[name]) else 1)
    return found


def _together(name: str, shapes: Sequence[_Shape | None]) -> bool:
    """Whether all rows of a batch are one: no row is one example's. RefusedError where the ranks do not agree on it."""
    several = [shape.n == 1 for shape in shapes if shape is not None and shape.examples > 1]
    if any(several) and not all(several):
        raise RefusedError(f"{name}: some ranks separate the examples of their batches, and some do not")
    return any(several)


def _exchanged(
    ranks: Ranks,
    names: Sequence[str],
    own: Mapping[str, Evidence],
    shapes: Mapping[str, Sequence[_Shape | None]],
    dtype: torch.dtype,
) -> list[dict[tuple[str, str], Tensor]]:
    """The tensors of all ranks, by site and name."""
    made: list[dict[tuple[str, str], Tensor]] = [{} for _ in range(ranks.size)]
    for kind, parts in ((torch.int64, ("index",)), (dtype, ("inputs", "gradients", "weights"))):
        each = [[(name, shapes[name][r]) for name in names] for r in range(ranks.size)]
        wanted = [
            {(name, part): size for name, shape in of_rank if shape for part, size in shape.parts().items() if part in parts}
            for of_rank in each
        ]
        sizes = [sum(prod(size) for size in of_rank.values()) for of_rank in wanted]
        if not any(sizes):
            continue
        flat = [_tensor(own[name], part).reshape(-1).to(kind) for name, part in wanted[ranks.rank]]
        mine = torch.cat(flat) if flat else torch.empty(0, dtype=kind, device=ranks.device)
        for r, values in enumerate(ranks.gather(mine, sizes)):
            pieces = values.split([prod(size) for size in wanted[r].values()])
            made[r] |= {key: piece.view(wanted[r][key]) for key, piece in zip(wanted[r], pieces, strict=True)}
    return made


def _tensor(outer: Evidence, name: str) -> Tensor:
    assert isinstance(outer, Outer)
    if name == "index":
        assert isinstance(outer.inputs, OneHot)
        return outer.inputs.index
    found: Tensor = getattr(outer, name)
    return found


def _outer(shape: _Shape, parts: Mapping[tuple[str, str], Tensor], name: str) -> Outer:
    """The rows of one rank at a site."""
    padding = None if shape.padding < 0 else shape.padding
    inputs = OneHot(parts[name, "index"], shape.size, padding) if shape.i < 0 else parts[name, "inputs"]
    made = Outer(inputs, parts[name, "gradients"], bool(shape.bias), bool(shape.transposed), parts.get((name, "weights")))
    return replace(made, kind=Outer.kinds[shape.kind])  # type: ignore[arg-type]


def _concatenated(each: Sequence[Outer], axis: int) -> Outer:
    """One after another, along the examples (1) or the positions (2) of the inputs; shorter ones are padded without weight."""
    k = max(o.gradients.shape[0] for o in each)
    other = 3 - axis
    longest = max(_inputs(o).shape[other - hot(o)] for o in each)
    weighed = any(o.weights is not None or _inputs(o).shape[other - hot(o)] < longest for o in each)
    padded = [_padded(o, k, other, longest, weighed) for o in each]
    first, at = padded[0].inputs, axis - hot(padded[0])
    inputs = torch.cat([_inputs(o) for o in padded], at)
    joined = replace(first, index=inputs) if isinstance(first, OneHot) else inputs
    weights = torch.cat([o.weights for o in padded if o.weights is not None], axis - 1) if weighed else None
    return replace(padded[0], inputs=joined, gradients=torch.cat([o.gradients for o in padded], axis + 1), weights=weights)


def hot(outer: Outer) -> int:
    """How many axes the inputs lack."""
    return int(isinstance(outer.inputs, OneHot))


def _inputs(outer: Outer) -> Tensor:
    return outer.inputs.index if isinstance(outer.inputs, OneHot) else outer.inputs


def _padded(outer: Outer, k: int, axis: int, size: int, weighed: bool) -> Outer:
    """axis: of the inputs, examples (1) or positions (2)"""
    weights = outer.weights
    if weights is None and weighed:
        n, r = _inputs(outer).shape[1 - hot(outer) : 3 - hot(outer)]
        weights = outer.gradients.new_ones(n, r)
    inputs = pad(_inputs(outer), axis - hot(outer), size)
    gradients = outer.gradients if not len(outer.gradients) else pad(pad(outer.gradients, axis + 1, size), 0, k)
    made = replace(outer.inputs, index=inputs) if isinstance(outer.inputs, OneHot) else inputs
    return replace(outer, inputs=made, gradients=gradients, weights=None if weights is None else pad(weights, axis - 1, size))


def pad(x: Tensor, axis: int, size: int) -> Tensor:
    """The tensor with zeros at the end of an axis."""
    missing = list(x.shape)
    missing[axis] = size - missing[axis]
    return torch.cat([x, x.new_zeros(missing)], axis) if missing[axis] else x
