"""Blocks: stacks of equal sites that are represented, prepared and solved together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Evidence, Gradient, Joint, Outer
from gradmaker.norms import Norm
from gradmaker.representations.base import Fold, Frame, State
from gradmaker.sites import Site
from gradmaker.triple import Triple

__all__ = ["STACK_LIMIT", "Block", "Placement", "build_blocks"]

STACK_LIMIT = 128
"""Blocks with a longer axis are not stacked: on a CPU, stacking 48 layers halves the time at 32 and costs up to 1.6x at 512."""


@dataclass(frozen=True)
class Placement:
    """A site with the parts that were chosen for it."""

    site: Site
    triple: Triple
    norm: Norm | None
    momentum: float
    max_dim: int
    dtype: torch.dtype | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one block."""
        grain = self.triple.representation.grain
        if grain == "unit":
            return self.site.shape[-1:]
        return (prod(self.site.shape),) if grain == "full" else self.site.shape[1:]

    @property
    def count(self) -> int:
        """How many blocks the site gives."""
        grain = self.triple.representation.grain
        if grain == "unit":
            return prod(self.site.shape[:-1])
        return 1 if grain == "full" else self.site.shape[0]

    def frame(self) -> Frame:
        """What its representation is allocated for."""
        like = next(iter(self.site.parameters.values()))
        dtype = self.dtype or torch.promote_types(like.dtype, torch.float32)
        diagonal = self.triple.representation.wide(self.shape, self.max_dim)
        own = self.site.one_hot_axis
        if own is not None and self.triple.representation.factored_axes:
            diagonal |= {own}
        return Frame(self.count, self.shape, diagonal, dtype, like.device)


class Block:
    """A stack of equal blocks: statistic, cache and gradient average lead with the stack axis ``B``."""

    def __init__(self, placements: list[Placement]) -> None:
        first = placements[0]
        self.sites = [p.site for p in placements]
        self.triple, self.norm, self.momentum = first.triple, first.norm, first.momentum
        self.full = self.triple.representation.grain == "full"
        self.frame = _joined_frame(placements, self.full)
        self.slots = _slots(placements, self.full)
        self.name = "full" if self.full else self.sites[0].name
        self.state: State = self.triple.representation.init(self.frame)
        self.cache: State = {}
        self.norm_state: State = self.norm.init(self.frame) if self.norm else {}
        self.average: State = {}
        if self.momentum:
            self.average = {"average": self.frame.zeros(*self.frame.shape), "mass": self.frame.zeros()}
        self.share = 0.0  # where in a period its refresh falls

    @property
    def cost(self) -> float:
        """Relative cost of a refresh: the cubes of its matrices."""
        sides = [s for j, s in enumerate(self.frame.shape) if j not in self.frame.diagonal]
        if not self.triple.representation.factored_axes:
            sides = [prod(self.frame.shape)]
        return float(self.frame.stack * sum(s**3 for s in sides) + 1)

    # ---------------------------------------------------------------- statistics
    def update(self, portion: Mapping[str, Evidence], fold: Fold, further: set[str]) -> None:
        """Fold in one portion of a step's evidence.

        further: names whose first evidence of this step has been folded in before; extended here.
        """
        for slot, evidence, names in self._evidence(portion):
            state = {k: v[slot] for k, v in self.state.items()}
            again = names[0] in further
            self.triple.representation.update(state, evidence, replace(fold, beta=1.0, mass=0.0) if again else fold)
            further.update(names)

    def _evidence(self, portion: Mapping[str, Evidence]) -> Iterator[tuple[slice, Evidence, list[str]]]:
        names = [s.name for s in self.sites if s.name in portion]
        if not self.full:
            slots = dict(zip((s.name for s in self.sites), self.slots, strict=True))
            yield from ((slots[n], portion[n], [n]) for n in names)
        elif names:
            yield slice(0, 1), self._joined(portion), names

    def _joined(self, portion: Mapping[str, Evidence]) -> Evidence:
        """All layers as one piece of evidence; a layer that took no part contributes zeros."""
        known = [portion.get(s.name) for s in self.sites]
        if any(isinstance(e, Gradient) for e in known):
            flat = [self._zeros(s) if e is None else e.rows().reshape(-1) for s, e in zip(self.sites, known, strict=True)]
            return Gradient(torch.cat(flat).unsqueeze(0))
        like = next(e for e in known if isinstance(e, Outer))
        k, _, n = like.gradients.shape[:3]
        return Joint(tuple(e if isinstance(e, Outer) else self._silent(s, k, n) for s, e in zip(self.sites, known, strict=True)))

    def _zeros(self, site: Site) -> Tensor:
        return torch.zeros(prod(site.shape), dtype=self.frame.dtype, device=self.frame.device)

    def _silent(self, site: Site, k: int, n: int) -> Outer:
        empty = torch.zeros(1, n, 1, 0, dtype=self.frame.dtype, device=self.frame.device)
        return Outer(empty, empty.new_zeros(k, 1, n, 1, prod(site.shape)), bias=True)

    # ---------------------------------------------------------------- gradients
    def read(self) -> Tensor | None:
        """The gradients of all sites, zeros where there is none; None if there is none at all.  # (B, *shape)"""
        found = [site.read() for site in self.sites]
        if all(g is None for g in found):
            return None
        pieces = [self._zeros(s).reshape(s.shape) if g is None else g.to(self.frame.dtype) for s, g in zip(self.sites, found, strict=True)]
        if self.full:
            return torch.cat([p.reshape(-1) for p in pieces]).unsqueeze(0)
        shaped = [p.reshape(-1, *self.frame.shape) for p in pieces]
        return shaped[0] if len(shaped) == 1 else torch.cat(shaped)

    def write(self, value: Tensor) -> None:
        """Put preconditioned gradients back into ``.grad``, in place."""
        for site, slot in zip(self.sites, self.slots, strict=True):
            piece = value[0, slot] if self.full else value[slot]
            site.write(piece.reshape(site.shape))

    def averaged(self, g: Tensor) -> Tensor:
        """The running average of gradients, bias-corrected: ``m / (1 - momentum^t)``; the gradient itself without momentum."""
        if not self.momentum:
            return g
        self.average["average"].lerp_(g, 1 - self.momentum)
        mass = self.average["mass"]
        mass.mul_(self.momentum).add_(1 - self.momentum)
        return self.average["average"] / mass.reshape(-1, *[1] * (g.ndim - 1))

    def prepare(self) -> None:
        """Refresh the cache from the statistic."""
        self.cache = self.triple.solver.prepare(self.triple.representation, self.state, self.cache or None)

    def solve(self, g: Tensor, raw: Tensor) -> Tensor:
        """The preconditioned gradient, rescaled as ``norm`` says.  g: averaged gradient, raw: this step's"""
        value = self.triple.solver.solve(self.triple.representation, self.cache, g)
        return self.norm.rescale(self.norm_state, value, g, raw) if self.norm else value


def _joined_frame(placements: list[Placement], full: bool) -> Frame:
    frame = placements[0].frame()
    if not full:
        return replace(frame, stack=sum(p.count for p in placements))
    shape = (sum(prod(p.site.shape) for p in placements),)
    placements[0].triple.representation.wide(shape, placements[0].max_dim)
    return replace(frame, shape=shape)


def _slots(placements: list[Placement], full: bool) -> list[slice]:
    sizes = [prod(p.site.shape) if full else p.count for p in placements]
    ends = [sum(sizes[: j + 1]) for j in range(len(sizes))]
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def build_blocks(placements: list[Placement]) -> list[Block]:
    """Group placements into blocks: everything for granularity ``full``, equal small shapes otherwise."""
    groups: dict[object, list[Placement]] = {}
    for p in placements:
        frame = p.frame() if p.triple.representation.grain != "full" else None
        key: tuple[object, ...] = (p.triple, p.norm, p.momentum, p.dtype)
        if frame is not None:
            alone = p.site.name if max(frame.shape, default=1) > STACK_LIMIT else ""
            key = (*key, replace(frame, stack=0), alone)
        groups.setdefault(key, []).append(p)
    blocks = [Block(group) for group in groups.values()]
    total, before = sum(b.cost for b in blocks), 0.0
    for block in blocks:
        block.share = before / total
        before += block.cost
    return blocks
