"""Blocks: stacks of equal sites that are represented, prepared and solved together."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor

from gradmaker.capture.sites import Site
from gradmaker.curvature.evidence import WHOLE, Evidence
from gradmaker.gathering import Members, Piece, picked, placed
from gradmaker.placement import Placement
from gradmaker.representations.base import Fold, Frame, State
from gradmaker.representations.roles import (
    FactoredAxes,
    OwnOrder,
    PerStep,
    Unstacked,
    diagonal_axes,
    duplicate,
    has_refresh,
    renewal,
    skips_first,
    snapshot,
)

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
        self.triple, self.options = first.triple, first.options
        self.full = self.triple.representation.grain == "full"
        self.frame = _joined_frame(placements, self.full)
        self.slots = _slots(placements, self.full)
        self.layout = Members(self.sites, self.slots, self.frame, self.full, first.joins_groups)
        whole = "full" if self.options.method == "method" else f"full, {self.options.method}"
        self.name = whole if self.full else self.sites[0].name
        self.state: State = self.triple.representation.init(self.frame)
        self.cache: State = {}
        self.ready: set[str] = set()  # sites for which the cache holds more than an empty statistic
        self.fresh: set[str] = set()  # sites whose first step this is and is left out
        self.grafting_state: State = self.options.grafting.init(self.frame) if self.options.grafting else {}
        self.average: State = {}
        if self.options.momentum:
            self.average = {"average": self.frame.zeros(*self.frame.shape), "mass": self.frame.zeros()}
        self.share = 0.0  # where in a period its refresh falls
        self.torn = ""  # the exception that has left its statistic half changed

    @property
    def cost(self) -> float:
        """Relative cost of a refresh: the cubes of its matrices."""
        sides = [s for j, s in enumerate(self.frame.shape) if j not in self.frame.diagonal]
        if not isinstance(self.triple.representation, FactoredAxes):
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
    def fold(self, weight: float, refresh: bool = False, index: int = 0) -> Fold:
        """How evidence of a micro-batch with this share of the loss enters the statistic.

        refresh: whether the statistic's refresh is due in this step; index: how many measured steps came before
        """
        decay, turn = self.options.decay, {"refresh": refresh, "index": index}
        if decay is None:
            return Fold(1.0, weight, 1.0, summed=True, of_step=1.0, **turn)  # type: ignore[arg-type]
        if self.options.averaging != "corrected":
            of_step = 1.0 if self.options.averaging == "raw" else 1 - decay
            return Fold(decay, of_step * weight, 1.0, summed=True, of_step=of_step, **turn)  # type: ignore[arg-type]
        return Fold(decay, (1 - decay) * weight, 1 - decay, of_step=1 - decay, **turn)  # type: ignore[arg-type]

    def update(
        self,
        chunk: Mapping[str, Evidence],
        fold: Fold,
        further: set[str],
        done: set[str] | None = None,
        known: Set[str] = frozenset(),
    ) -> None:
        """Fold in one chunk of a step's evidence.

        further: names whose first evidence of this step has been folded in before; extended here.
        done: what of this chunk has been folded in before, when the step began for the first time; extended here.
        known: names that had given evidence before this step.
        """
        self.check_whole()
        done = set() if done is None else done
        if self.full and self.name in done:
            return

        def of(piece: Piece) -> Fold:
            return fold.of(again=piece.names[0] in further, first=known.isdisjoint(piece.names))

        for piece, own in self.layout.stacks(chunk, done, of):
            self._update(piece, own)
            further.update(piece.names)
            done.update([self.name] if self.full else piece.names)

    def _update(self, piece: Piece, fold: Fold) -> None:
        whole = self.full or isinstance(self.triple.representation, Unstacked)
        state = self.state if whole else picked(self.state, piece.slots)
        before = _versions(self.state)
        try:
            self.triple.representation.update(state, piece.evidence, fold)
            if not whole:
                placed(self.state, piece.slots, state)
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

    # ---------------------------------------------------------------- gradients
    def read(self) -> Tensor | None:
        """The gradients of all sites, zeros where there is none; None if there is none at all.  # (B, *shape)"""
        return self.layout.read()

    def write(self, value: Tensor) -> None:
        """Put preconditioned gradients back into ``.grad``, in place."""
        self.layout.write(value, self.ready)

    def averaged(self, g: Tensor) -> tuple[Tensor, State]:
        """The running average of gradients, bias-corrected: ``m / (1 - momentum^t)``; the gradient itself without momentum.

        With ``nesterov`` this gradient enters it twice: ``(momentum m + (1 - momentum) g) / (1 - momentum^(t + 1))``.
        Comes with what the average is from now on.
        """
        momentum = self.options.momentum
        if not momentum:
            return g, {}
        average = self.average["average"].lerp(g, 1 - momentum)
        total = self.average["mass"] * momentum + (1 - momentum)
        moved, mass = {"average": average, "mass": total}, total.reshape(-1, *[1] * (g.ndim - 1))
        if self.options.nesterov:
            return average.lerp(g, 1 - momentum) / (momentum * mass + 1 - momentum), moved
        return average / mass, moved

    def prepare(self, measured: Set[str], due: bool = True, evidence: Set[str] = frozenset()) -> bool:
        """Refresh the statistic, and from it the cache; where that is not due, only for sites that were never in it.

        Returns whether anything of the cache was renewed.

        measured: names of the sites that have given evidence at all; evidence: in this step.
        """
        known = {s.name for s in self.sites if s.name in measured}
        representation, new = self.triple.representation, known - self.ready
        state = self._renewed((known if due else new).difference(evidence if isinstance(representation, OwnOrder) else ()))
        if due or renewal(representation) == "step":
            old = known & self.ready
        else:
            old = (known & self.ready).intersection(evidence) if self.follows_measurements else set()
        if self.full and (old or new):
            self.cache = self.refreshed(state, self.cache or None)
        elif not self.full:  # all is computed before anything is changed: an exception leaves the cache as it was
            for slots, cache in [self._prepared(state, names, again) for names, again in ((old, True), (new, False))]:
                self._place(slots, cache)
        self.state, self.fresh, self.ready = state, new if skips_first(representation) else set(), known
        return bool(old or new)

    @property
    def follows_measurements(self) -> bool:
        """Whether the cache is renewed after every measurement, and the refresh clock is that of the statistic's slow part."""
        representation = self.triple.representation
        return renewal(representation) == "measurement" or (self.options.slow_part and not has_refresh(representation))

    def _renewed(self, names: set[str]) -> State:
        """The statistic after a refresh of these members; out of place, so that an exception leaves it as it was."""
        representation = self.triple.representation
        if not names or not has_refresh(representation):
            return self.state
        state = duplicate(representation, self.state)
        slots = [slice(None)] if self.full else [t for s, t in zip(self.sites, self.slots, strict=True) if s.name in names]
        part = picked(state, slots)
        representation.refresh(part)
        placed(state, slots, part)
        return state

    def refreshed(self, state: State, previous: State | None) -> State:
        """What a refresh makes of statistics of some members."""
        return self.options.precision.prepare(self.triple, state, previous, self.frame.dtype)

    @property
    def late(self) -> bool:
        """Whether names and shapes of its tensors are known only when it has been measured."""
        return isinstance(self.triple.representation, Unstacked) and not isinstance(self.triple.representation, PerStep)

    def empty_cache(self) -> State:
        """The names and shapes of a cache, all zero; none where these are not known yet."""
        if self.late:
            return {}
        one = self.triple.representation.init(self.frame if self.full else replace(self.frame, stack=1))
        like = self.refreshed(one, None)
        return {k: v.new_zeros(len(v) if self.full else self.frame.stack, *v.shape[1:]) for k, v in like.items()}

    def applied(self, cache: State, g: Tensor) -> Tensor:
        """``P g``.  # (B, *shape)"""
        return self.options.precision.solve(self.triple, cache, g)

    def _prepared(self, state: State, names: set[str], again: bool) -> tuple[list[slice], State]:
        """A refreshed cache of some members, and where these are.  again: whether they have been prepared before"""
        slots = [slot for site, slot in zip(self.sites, self.slots, strict=True) if site.name in names]
        if not slots:
            return [], {}
        whole = len(slots) == len(self.slots)
        state, before = (s if whole else picked(s, slots) for s in (state, self.cache if again else {}))
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
        (g, average), cache = self.averaged(raw), snapshot(self.triple.representation, self.cache)
        value, grafting_state = self.applied(cache, g), {k: v.clone() for k, v in self.grafting_state.items()}
        if rule := self.options.grafting:
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
        return site.name not in self.ready or site.name in self.fresh or not site.has_gradient


def _versions(state: State) -> list[tuple[str, int, int]]:
    """What shows whether any tensor was replaced or written to."""
    return [(key, id(value), value._version) for key, value in state.items()]


def _joined_frame(placements: list[Placement], full: bool) -> Frame:
    frame = placements[0].frame()
    if not full:
        return replace(frame, stack=sum(p.count for p in placements))
    shape = (sum(prod(p.site.shape) for p in placements),)
    diagonal_axes(placements[0].triple.representation, shape, placements[0].options.max_dim)
    return replace(frame, shape=shape)


def _slots(placements: list[Placement], full: bool) -> list[slice]:
    sizes = [prod(p.site.shape) if full else p.count for p in placements]
    ends = [sum(sizes[: j + 1]) for j in range(len(sizes))]
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
