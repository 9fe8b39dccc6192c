"""Blocks: stacks of equal sites that are represented, prepared and solved together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from gradmaker.capture.sites import Site
from gradmaker.curvature.evidence import WHOLE, Evidence, Gradient, Joint, Outer, Pair
from gradmaker.placement import Placement
from gradmaker.representations.base import Fold, Frame, State

__all__ = ["WHOLE", "Block", "Solved"]


@dataclass(frozen=True)
class Solved:
    """The preconditioned gradient of a block, and what its cache and its averages are once that has been written."""

    value: Tensor
    cache: State
    average: State
    grafting_state: State


class Block:
    """A stack of equal blocks: statistic, cache and gradient average lead with the stack axis ``B``."""

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
        self.state: State = self.triple.representation.init(self.frame)
        self.cache: State = {}
        self.ready: set[str] = set()  # sites for which the cache holds more than an empty statistic
        self.fresh: set[str] = set()  # sites whose first step this is and is left out
        self.grafting_state: State = self.grafting.init(self.frame) if self.grafting else {}
        self.average: State = {}
        if self.momentum:
            self.average = {"average": self.frame.zeros(*self.frame.shape), "mass": self.frame.zeros()}
        self.share = 0.0  # where in a period its refresh falls
        self.torn = ""  # the exception that has left its statistic half changed

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

    def update(self, chunk: Mapping[str, Evidence], fold: Fold, further: set[str], done: set[str] | None = None) -> None:
        """Fold in one chunk of a step's evidence.

        further: names whose first evidence of this step has been folded in before; extended here.
        done: what of this chunk has been folded in before, when the step began for the first time; extended here.
        """
        self.check_whole()
        done = set() if done is None else done
        self.state = self.triple.representation.adopt(self.state)
        for slot, evidence, names in self._evidence(chunk):
            key = self.name if self.full else names[0]
            if key not in done:
                again = names[0] in further
                self._update(slot, evidence, replace(fold, beta=1.0, mass=0.0) if again else fold)
                further.update(names)
                done.add(key)

    def _update(self, slot: slice, evidence: Evidence, fold: Fold) -> None:
        whole = self.full or self.triple.representation.unstacked
        state = self.state if whole else {k: v[slot] for k, v in self.state.items()}
        before = _versions(self.state)
        try:
            self.triple.representation.update(state, evidence, fold)
        except BaseException as error:
            if _versions(self.state) != before:
                self.torn = type(error).__name__
            raise

    def check_whole(self) -> None:
        """RuntimeError if an exception has left the statistic half changed."""
        if self.torn:
            raise RuntimeError(
                f"{self.name}: its statistic was left half changed by an exception ({self.torn}) in its update, so that the "
                "step cannot be repeated: load a state that was saved before, or make the maker anew"
            )

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
        like = next(e for e in known if e is not None)
        if isinstance(like, Gradient):
            return replace(like, gradient=self._flat([e.gradient if isinstance(e, Gradient) else None for e in known]))
        if isinstance(like, Pair):
            pairs = [e if isinstance(e, Pair) else None for e in known]
            v, cv = ([None if e is None else getattr(e, part) for e in pairs] for part in ("v", "cv"))
            return replace(like, v=self._flat(v), cv=self._flat(cv))
        assert isinstance(like, Outer)
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

    def write(self, value: Tensor) -> None:
        """Put preconditioned gradients back into ``.grad``, in place."""
        for site, slot in zip(self.sites, self.slots, strict=True):
            if self.full or site.name in self.ready:
                piece = value[0, slot] if self.full else value[slot]
                site.write(piece.reshape(site.shape))

    def averaged(self, g: Tensor) -> tuple[Tensor, State]:
        """The running average of gradients, bias-corrected: ``m / (1 - momentum^t)``; the gradient itself without momentum.

        With ``nesterov`` this gradient enters it twice: ``(momentum m + (1 - momentum) g) / (1 - momentum^(t + 1))``.
        Comes with what the average is from now on.
        """
        if not self.momentum:
            return g, {}
        average = self.average["average"].lerp(g, 1 - self.momentum)
        total = self.average["mass"] * self.momentum + (1 - self.momentum)
        moved, mass = {"average": average, "mass": total}, total.reshape(-1, *[1] * (g.ndim - 1))
        if self.nesterov:
            return average.lerp(g, 1 - self.momentum) / (self.momentum * mass + 1 - self.momentum), moved
        return average / mass, moved

    def prepare(self, measured: set[str], due: bool = True) -> bool:
        """Refresh the cache from the statistic; where that is not due, only for sites that were never in it.

        Returns whether anything was refreshed.

        measured: names of the sites that have given evidence at all.
        """
        known = measured & {s.name for s in self.sites}
        due = due or self.triple.representation.per_step or self.triple.representation.immediate
        refreshed = bool(known) if due else bool(known - self.ready)
        if self.full and refreshed:
            self.cache = self.refreshed(self.state, self.cache or None)
        elif not self.full:  # all is computed before anything is changed: an exception leaves the cache as it was
            groups = ((known & self.ready if due else set[str](), True), (known - self.ready, False))
            for slots, new in [self._prepared(names, again) for names, again in groups]:
                self._place(slots, new)
        self.fresh = known - self.ready if self.triple.representation.skips_first else set()
        self.ready = known
        return refreshed

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

    def _prepared(self, names: set[str], again: bool) -> tuple[list[slice], State]:
        """A refreshed cache of some members, and where these are.  again: whether they have been prepared before"""
        slots = [slot for site, slot in zip(self.sites, self.slots, strict=True) if site.name in names]
        if not slots:
            return [], {}
        whole = len(slots) == len(self.slots)
        state, before = (s if whole else _picked(s, slots) for s in (self.state, self.cache if again else {}))
        return slots, self.refreshed(state, before if again else None)

    def _place(self, slots: list[slice], new: State) -> None:
        """Put refreshed members into the cache."""
        if len(slots) == len(self.slots):
            self.cache = new
            return
        if not self.cache:
            self.cache = {k: v.new_zeros(self.frame.stack, *v.shape[1:]) for k, v in new.items()}
        for key, value in new.items():
            pieces = value.split([slot.stop - slot.start for slot in slots])
            for slot, piece in zip(slots, pieces, strict=True):
                self.cache[key][slot] = piece

    def solve(self, raw: Tensor, started: bool = True) -> Solved:
        """The preconditioned gradient, averaged and rescaled as configured. Nothing is changed before `keep`.

        raw: this step's gradient; started: False for what `grafting` takes the length from, instead
        """
        (g, average), cache = self.averaged(raw), self.triple.representation.snapshot(self.cache)
        value, grafting_state = self.applied(cache, g), {k: v.clone() for k, v in self.grafting_state.items()}
        if rule := self.grafting:
            value = rule.rescale(grafting_state, value, g, raw) if started else rule.target(grafting_state, g, raw)
        for slot in self._without_gradient():
            for new, old in ((average, self.average), (grafting_state, self.grafting_state)):
                for key, moved in new.items():
                    moved[slot] = old[key][slot]
        return Solved(value, cache, average, grafting_state)

    def keep(self, solved: Solved) -> None:
        """Go on from what a solve has left."""
        self.cache, self.average, self.grafting_state = solved.cache, solved.average, solved.grafting_state

    def _without_gradient(self) -> list[slice]:
        """Members of the stack that have no gradient or no statistic: their averages stand still, as if they were alone."""
        if self.full:
            return []
        members = zip(self.sites, self.slots, strict=True)
        return [slot for site, slot in members if self._lacks_gradient(site)]

    def _lacks_gradient(self, site: Site) -> bool:
        return site.name not in self.ready or site.name in self.fresh or site.read() is None


def _versions(state: State) -> list[tuple[str, int, int]]:
    """What shows whether any tensor was replaced or written to."""
    return [(key, id(value), value._version) for key, value in state.items()]


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
