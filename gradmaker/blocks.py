"""Blocks: stacks of equal sites that are represented, prepared and solved together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from gradmaker.capture.sites import Site
from gradmaker.curvature.evidence import WHOLE, Evidence, Gradient, Joint, Outer, Pair
from gradmaker.placement import Placement
from gradmaker.representations.base import Fold, Frame, State
from gradmaker.step.held import Held

__all__ = ["WHOLE", "Block"]


class Block:
    """A stack of equal blocks.

    What it holds changes at the end of a step alone: until then a step works on copies, `writable`, and verbs return what
    the block would hold.
    """

    def __init__(self, placements: list[Placement]) -> None:
        first = placements[0]
        self.sites = [p.site for p in placements]
        self.triple, self.grafting, self.momentum, self.decay = first.triple, first.grafting, first.momentum, first.decay
        self.nesterov, self.averaging, self.precision = first.nesterov, first.averaging, first.precision
        self.method = first.method
        self.full, self.joins_groups = self.triple.representation.grain == "full", first.joins_groups
        self.frame = _joined_frame(placements, self.full)
        self.slots = _slots(placements, self.full)
        whole = "full" if self.method == "method" else f"full, {self.method}"
        self.name = whole if self.full else self.sites[0].name
        self.held = self.empty()
        self.share = 0.0  # where in a period its refresh falls

    def empty(self) -> Held:
        """What it holds before any evidence."""
        average = {"average": self.frame.zeros(*self.frame.shape), "mass": self.frame.zeros()} if self.momentum else {}
        grafting_state = self.grafting.init(self.frame) if self.grafting else {}
        return Held(self.triple.representation.init(self.frame), {}, average, grafting_state)

    @property
    def state(self) -> State:
        """The statistic."""
        return self.held.state

    @property
    def cache(self) -> State:
        """What the last refresh has made of the statistic; empty before the first."""
        return self.held.cache

    @property
    def average(self) -> State:
        """The running average of gradients, with its mass; empty without momentum."""
        return self.held.average

    @property
    def grafting_state(self) -> State:
        """What the grafting rule remembers."""
        return self.held.grafting_state

    @property
    def ready(self) -> frozenset[str]:
        """Sites for which the cache holds more than an empty statistic."""
        return self.held.ready

    @property
    def cost(self) -> float:
        """Relative cost of a refresh: the cubes of its matrices."""
        sides = [s for j, s in enumerate(self.frame.shape) if j not in self.frame.diagonal]
        if not self.triple.representation.factored_axes:
            sides = [prod(self.frame.shape)]
        longest = self.frame.longest or max(sides, default=1)
        return float(self.frame.stack * sum(s * min(s, longest) ** 2 for s in sides) + 1)

    def holds_like(self, other: Block) -> bool:
        """Whether a member of this block has the statistic that one of another block would have."""
        own, given = self.triple, other.triple
        same = (own.curvature, own.representation) == (given.curvature, given.representation)
        return same and self.frame.shape == other.frame.shape

    def members(self) -> list[str]:
        """Names of the members of the stack: of the site, with a number where it has several."""
        if self.full:
            return [self.name]
        counts = [slot.stop - slot.start for slot in self.slots]
        named = zip(self.sites, counts, strict=True)
        return [s.name if count == 1 else f"{s.name}[{j}]" for s, count in named for j in range(count)]

    # ---------------------------------------------------------------- statistics
    def fold(self, weight: float) -> Fold:
        """How evidence of a micro-batch with this share of the loss enters the statistic."""
        if self.decay is None:
            return Fold(1.0, weight, 1.0, summed=True, of_step=1.0)
        if self.averaging != "corrected":
            of_step = 1.0 if self.averaging == "raw" else 1 - self.decay
            return Fold(self.decay, of_step * weight, 1.0, summed=True, of_step=of_step)
        return Fold(self.decay, (1 - self.decay) * weight, 1 - self.decay, of_step=1 - self.decay)

    def writable(self, held: Held) -> Held:
        """The same, with a copy of the statistic that `update` may write to."""
        representation = self.triple.representation
        return replace(held, state=representation.adopt(representation.duplicate(held.state)))

    def update(self, held: Held, chunk: Mapping[str, Evidence], fold: Fold, reached: set[str]) -> None:
        """Fold one chunk of a step's evidence into a statistic, in place.

        held: `writable`
        reached: names whose first evidence of this step has been folded in before; extended here.
        """
        for slot, evidence, names in self._evidence(chunk):
            again = names[0] in reached
            self._update(held.state, slot, evidence, replace(fold, beta=1.0, mass=0.0) if again else fold)
            reached.update(names)

    def _update(self, state: State, slot: slice, evidence: Evidence, fold: Fold) -> None:
        whole = self.full or self.triple.representation.unstacked
        self.triple.representation.update(state if whole else {k: v[slot] for k, v in state.items()}, evidence, fold)

    def _evidence(self, chunk: Mapping[str, Evidence]) -> Iterator[tuple[slice, Evidence, list[str]]]:
        names = [s.name for s in self.sites if s.name in chunk]
        if self.full and WHOLE in chunk:
            yield slice(0, 1), chunk[WHOLE], names or [s.name for s in self.sites]
        elif not self.full:
            slots = dict(zip((s.name for s in self.sites), self.slots, strict=True))
            yield from ((slots[n], _as_one(chunk[n]) if self.joins_groups else chunk[n], [n]) for n in names)
        elif names:
            yield slice(0, 1), self._joined(chunk), names

    def _joined(self, chunk: Mapping[str, Evidence]) -> Evidence:
        """All layers as one piece of evidence; a layer that took no part contributes zeros."""
        known = [chunk.get(s.name) for s in self.sites]
        if any(isinstance(e, Gradient) for e in known):
            return Gradient(self._flat([e.gradient if isinstance(e, Gradient) else None for e in known]))
        if any(isinstance(e, Pair) for e in known):
            pairs = [e if isinstance(e, Pair) else None for e in known]
            v, cv = ([None if e is None else getattr(e, part) for e in pairs] for part in ("v", "cv"))
            kind = next(type(e) for e in pairs if e is not None)
            return kind(self._flat(v), self._flat(cv))
        like = next(e for e in known if isinstance(e, Outer))
        k, _, n = like.gradients.shape[:3]
        return Joint(
            tuple(e if isinstance(e, Outer) else self._silent(s, k, n) for s, e in zip(self.sites, known, strict=True))
        )

    def _flat(self, pieces: list[Tensor | None]) -> Tensor:
        """One vector of a tensor for each site, zeros where there is none.  # (1, P)"""
        full = [self._zeros(s) if x is None else x.reshape(-1) for s, x in zip(self.sites, pieces, strict=True)]
        return torch.cat(full).unsqueeze(0)

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
        pieces = [
            self._zeros(s).reshape(s.shape) if g is None else g.to(self.frame.dtype)
            for s, g in zip(self.sites, found, strict=True)
        ]
        if self.full:
            return torch.cat([p.reshape(-1) for p in pieces]).unsqueeze(0)
        shaped = [p.reshape(-1, *self.frame.shape) for p in pieces]
        return shaped[0] if len(shaped) == 1 else torch.cat(shaped)

    def assign(self, held: Held, value: Tensor, into: dict[nn.Parameter, Tensor]) -> None:
        """What ``.grad`` will be, by parameter, of a preconditioned gradient; nothing is written to ``.grad``."""
        for site, slot in zip(self.sites, self.slots, strict=True):
            if self.full or site.name in held.ready:
                piece = value[0, slot] if self.full else value[slot]
                site.assign(piece.reshape(site.shape), into)

    def averaged(self, average: State, g: Tensor) -> tuple[Tensor, State]:
        """The running average of gradients, bias-corrected: ``m / (1 - momentum^t)``; the gradient itself without momentum.

        With ``nesterov`` this gradient enters it twice: ``(momentum m + (1 - momentum) g) / (1 - momentum^(t + 1))``.
        Comes with what the average is from now on.
        """
        if not self.momentum:
            return g, {}
        moved = average["average"].lerp(g, 1 - self.momentum)
        total = average["mass"] * self.momentum + (1 - self.momentum)
        held, mass = {"average": moved, "mass": total}, total.reshape(-1, *[1] * (g.ndim - 1))
        if self.nesterov:
            return moved.lerp(g, 1 - self.momentum) / (self.momentum * mass + 1 - self.momentum), held
        return moved / mass, held

    def prepare(self, held: Held, measured: Set[str], due: bool = True) -> tuple[Held, bool]:
        """Refresh the cache from the statistic; where that is not due, only for sites that were never in it.

        Returns what is held then, and whether anything was refreshed.

        measured: names of the sites that have given evidence at all.
        """
        known = frozenset(measured & {s.name for s in self.sites})
        due = due or self.triple.representation.per_step or self.triple.representation.immediate
        refreshed = bool(known) if due else bool(known - held.ready)
        cache = held.cache
        if self.full and refreshed:
            cache = self.refreshed(held.state, held.cache or None)
        elif not self.full:
            again, first = known & held.ready if due else frozenset[str](), known - held.ready
            parts = [self._prepared(held, names, before) for names, before in ((again, held.cache), (first, None))]
            for slots, new in parts:
                cache = self._placed(cache, slots, new)
        fresh = known - held.ready if self.triple.representation.skips_first else frozenset[str]()
        if cache is held.cache and (known, fresh) == (held.ready, held.fresh):
            return held, refreshed
        return replace(held, cache=cache, ready=known, fresh=fresh), refreshed

    def refreshed(self, state: State, previous: State | None) -> State:
        """What a refresh makes of statistics of some members."""
        return self.precision.prepare(self.triple, state, previous, self.frame.dtype)

    @property
    def late(self) -> bool:
        """Whether names and shapes of its tensors are known only when it has been measured."""
        return self.triple.representation.unstacked and not self.triple.representation.per_step

    def empty_cache(self) -> State:
        """The names and shapes of a cache, all zero; none where these are not known yet."""
        if self.late:
            return {}
        one = self.triple.representation.init(self.frame if self.full else replace(self.frame, stack=1))
        like = self.refreshed(one, None)
        return {k: v.new_zeros(len(v) if self.full else self.frame.stack, *v.shape[1:]) for k, v in like.items()}

    def applied(self, cache: State, g: Tensor) -> Tensor:
        """``P g``.  # (B, *shape)"""
        return self.precision.solve(self.triple, cache, g)

    def _prepared(self, held: Held, names: Set[str], before: State | None) -> tuple[list[slice], State]:
        """A refreshed cache of some members, and where these are.  before: the cache that they are in, if they are"""
        slots = [slot for site, slot in zip(self.sites, self.slots, strict=True) if site.name in names]
        if not slots:
            return [], {}
        whole = len(slots) == len(self.slots)
        state, previous = (s if whole or s is None else _picked(s, slots) for s in (held.state, before))
        assert state is not None
        return slots, self.refreshed(state, previous)

    def _placed(self, cache: State, slots: list[slice], new: State) -> State:
        """The cache with refreshed members in it; the former one is not written to."""
        if not slots or len(slots) == len(self.slots):
            return new if slots else cache
        made = {k: cache[k].clone() if cache else v.new_zeros(self.frame.stack, *v.shape[1:]) for k, v in new.items()}
        for key, value in new.items():
            pieces = value.split([slot.stop - slot.start for slot in slots])
            for slot, piece in zip(slots, pieces, strict=True):
                made[key][slot] = piece
        return made

    def solve(self, held: Held, raw: Tensor, started: bool = True) -> tuple[Tensor, Held]:
        """The preconditioned gradient, averaged and rescaled as configured, and what is held then.

        raw: this step's gradient; started: False for what `grafting` takes the length from, instead
        """
        (g, average), cache = self.averaged(held.average, raw), self.triple.representation.snapshot(held.cache)
        value, grafting_state = self.applied(cache, g), {k: v.clone() for k, v in held.grafting_state.items()}
        if rule := self.grafting:
            value = rule.rescale(grafting_state, value, g, raw) if started else rule.target(grafting_state, g, raw)
        for slot in self._without_gradient(held):
            for new, old in ((average, held.average), (grafting_state, held.grafting_state)):
                for key, moved in new.items():
                    moved[slot] = old[key][slot]
        return value, replace(held, cache=cache, average=average, grafting_state=grafting_state)

    def _without_gradient(self, held: Held) -> list[slice]:
        """Members of the stack that have no gradient or no statistic: their averages stand still, as if they were alone."""
        if self.full:
            return []
        members = zip(self.sites, self.slots, strict=True)
        return [slot for site, slot in members if _lacks_gradient(held, site)]


def _lacks_gradient(held: Held, site: Site) -> bool:
    return site.name not in held.ready or site.name in held.fresh or site.read() is None


def _as_one(evidence: Evidence) -> Evidence:
    """What is said of the groups of a layer, of all as one block.  # (G, o, i) -> (1, G, o, i)"""
    if isinstance(evidence, Gradient):
        return replace(evidence, gradient=evidence.gradient.unsqueeze(0))
    if isinstance(evidence, Pair):
        return replace(evidence, v=evidence.v.unsqueeze(0), cv=evidence.cv.unsqueeze(0))
    return evidence  # rows and products speak of the layer as it is


def _picked(state: State, slots: list[slice]) -> State:
    return {key: torch.cat([value[slot] for slot in slots]) for key, value in state.items()}


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
