"""Rows of the evidence of all ranks, in their order, so that each rank folds what one process with all examples would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from gradmaker.capture.one_hot import OneHot
from gradmaker.capture.sites import Site
from gradmaker.curvature.evidence import Evidence, Gradient, Outer
from gradmaker.scale.ranks import Ranks, RefusedError

__all__ = ["gathered", "merged"]

LENGTH = 12
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
    inputs_alone: int
    bias: int

    @classmethod
    def of(cls, outer: Outer) -> _Shape:
        (k, G, _, _, o), a = outer.gradients.shape, outer.inputs
        n, r = a.index.shape if isinstance(a, OneHot) else a.shape[1:3]
        padding = a.padding if isinstance(a, OneHot) and a.padding is not None else -1
        i, size = (-1, a.size) if isinstance(a, OneHot) else (a.shape[3], 0)
        flags = outer.weights is not None, outer.transposed, outer.kind == "inputs", outer.bias
        return cls(k, G, n, r, o, i, size, padding, *map(int, flags))

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


def gathered(
    ranks: Ranks, sites: Sequence[Site], chunks: Sequence[Mapping[str, Evidence]], examples: Sequence[int], dtype: torch.dtype
) -> list[dict[str, Evidence]]:
    """The evidence of all ranks. RefusedError for evidence that is neither rows nor a gradient.

    sites: of one block, with what any rank may have; examples: of the ranks; dtype: of the statistics
    """
    for chunk in chunks:
        if other := {type(e).__name__ for e in chunk.values() if not isinstance(e, (Outer, Gradient))}:
            raise RefusedError(f"several processes: evidence of the class {', '.join(sorted(other))} cannot be gathered")
    rows = {name: e for name, e in (chunks[0] if chunks else {}).items() if isinstance(e, Outer)}
    first: dict[str, Evidence] = dict(_gathered_rows(ranks, sites, rows, examples, dtype))
    sums = [{k: e.gradient for k, e in chunk.items() if isinstance(e, Gradient)} for chunk in chunks]
    made = _summed_gradients(ranks, sites, [chunk for chunk in sums if chunk], dtype)
    return [{**first, **(made[0] if made else {})}, *made[1:]]


# ------------------------------------------------------------------ gradients: linear in the examples
def _summed_gradients(
    ranks: Ranks, sites: Sequence[Site], chunks: Sequence[Mapping[str, Tensor]], dtype: torch.dtype
) -> list[dict[str, Evidence]]:
    most = max(int(row[0]) for row in ranks.meet([float(len(chunks))]))
    made: list[dict[str, Evidence]] = []
    for chunk in (chunks[j] if j < len(chunks) else {} for j in range(most)):
        holders = ranks.present([site.name in chunk for site in sites])
        reached = [site for site, owners in zip(sites, holders, strict=True) if owners]
        zeros = {s.name: torch.zeros(s.shape, dtype=dtype, device=ranks.device) for s in reached if s.name not in chunk}
        values = {s.name: zeros[s.name] if s.name in zeros else chunk[s.name].clone() for s in reached}
        ranks.sum_(list(values.values()))
        made.append({name: Gradient(value) for name, value in values.items()})
    return made


# ------------------------------------------------------------------ rows: in the order of the ranks
def _gathered_rows(
    ranks: Ranks, sites: Sequence[Site], own: Mapping[str, Outer], examples: Sequence[int], dtype: torch.dtype
) -> dict[str, Outer]:
    table = torch.zeros(ranks.size, len(sites), LENGTH, dtype=torch.int64)
    for j, site in enumerate(sites):
        if site.name in own:
            table[ranks.rank, j] = torch.tensor(astuple(_Shape.of(own[site.name])))
    table = table.to(ranks.device)
    dist.all_reduce(table, group=ranks.group)
    shapes = [[_Shape(*row) if row[0] else None for row in each] for each in table.tolist()]  # by rank and site
    parts = _exchanged(ranks, sites, own, shapes, dtype)
    found: dict[str, Outer] = {}
    for j, site in enumerate(sites):
        each = [_outer(shapes[r][j], parts[r], j) for r in range(ranks.size)]
        if had := [outer for outer in each if outer is not None]:
            found[site.name] = _concatenated(had, 2 if _together(site, shapes, j, examples) else 1)
    return found


def _together(site: Site, shapes: Sequence[Sequence[_Shape | None]], j: int, examples: Sequence[int]) -> bool:
    """Whether all rows of a batch are one: no row is one example's. RefusedError where the ranks do not agree on it."""
    known = [(row[j], n) for row, n in zip(shapes, examples, strict=True)]
    several = [shape.n == 1 for shape, n in known if shape is not None and n > 1]
    if any(several) and not all(several):
        raise RefusedError(f"{site.name}: some ranks separate the examples of their batches, and some do not")
    return any(several)


def _exchanged(
    ranks: Ranks, sites: Sequence[Site], own: Mapping[str, Outer], shapes: Sequence[Sequence[_Shape | None]], dtype: torch.dtype
) -> list[dict[tuple[int, str], Tensor]]:
    """The tensors of all ranks, by site and name."""
    made: list[dict[tuple[int, str], Tensor]] = [{} for _ in range(ranks.size)]
    for kind, names in ((torch.int64, ("index",)), (dtype, ("inputs", "gradients", "weights"))):
        wanted = [
            {(j, name): shape for j, each in enumerate(row) if each for name, shape in each.parts().items() if name in names}
            for row in shapes
        ]
        flat = [_tensor(own[sites[j].name], name).reshape(-1).to(kind) for j, name in wanted[ranks.rank]]
        mine = torch.cat(flat) if flat else torch.empty(0, dtype=kind, device=ranks.device)
        sizes = [sum(prod(shape) for shape in each.values()) for each in wanted]
        for r, values in enumerate(ranks.gather(mine, sizes)):
            pieces = values.split([prod(shape) for shape in wanted[r].values()])
            made[r] |= {key: piece.view(wanted[r][key]) for key, piece in zip(wanted[r], pieces, strict=True)}
    return made


def _tensor(outer: Outer, name: str) -> Tensor:
    if name == "index":
        assert isinstance(outer.inputs, OneHot)
        return outer.inputs.index
    found: Tensor = getattr(outer, name)
    return found


def _outer(shape: _Shape | None, parts: Mapping[tuple[int, str], Tensor], j: int) -> Outer | None:
    """The evidence of a rank at the site ``j``."""
    if shape is None:
        return None
    padding = None if shape.padding < 0 else shape.padding
    inputs = OneHot(parts[j, "index"], shape.size, padding) if shape.i < 0 else parts[j, "inputs"]
    made = Outer(inputs, parts[j, "gradients"], bool(shape.bias), bool(shape.transposed), parts.get((j, "weights")))
    return made.inputs_alone() if shape.inputs_alone else made


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
