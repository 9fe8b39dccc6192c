"""Blocks: stacks of equal sites that share one call of the representation and one of the solver."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from functools import cached_property

from torch import Tensor, nn

from gradmaker import by_rows
from gradmaker.averages import averaged, is_gradient, projected, turned_average
from gradmaker.capture.sites import Site
from gradmaker.curvature.evidence import Evidence
from gradmaker.gathering import NO_ROWS, Piece, picked, placed, runs
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.state import State
from gradmaker.representations.base import Fold
from gradmaker.representations.roles import (
    PROJECTED,
    OwnOrder,
    PerStep,
    Unstacked,
    duplicate,
    has_refresh,
    renewal,
    skips_first,
    slow,
    snapshot,
)
from gradmaker.stack import Stack
from gradmaker.step.held import Held

__all__ = ["Block"]

SMALL = {"failures", "failing", "diagnosis"}
"""Entries of a cache that say what happened at its refreshes."""


class Block(Stack):
    """A stack of equal blocks of a curvature matrix, and what a step does with it.

    What it holds changes only at the end of a step: until then a step works on copies, `writable`, and methods return
    what the block would hold. But for a cache that its statistic gives again: see `gradmaker.step.refreshing`.
    """

    # ---------------------------------------------------------------- statistics
    def fold(self, weight: float, refresh: bool = False, index: int = 0) -> Fold:
        """How evidence of a micro-batch with this share of the loss enters the statistic.

        refresh: whether the statistic is to be refreshed in this step; index: number of measured steps before it
        """
        decay = self.options.decay
        if decay is None:
            return Fold(1.0, weight, 1.0, summed=True, of_step=1.0, refresh=refresh, index=index)
        if self.options.averaging != "corrected":
            of_step = 1.0 if self.options.averaging == "raw" else 1 - decay
            return Fold(decay, of_step * weight, 1.0, summed=True, of_step=of_step, refresh=refresh, index=index)
        return Fold(decay, (1 - decay) * weight, 1 - decay, of_step=1 - decay, refresh=refresh, index=index)

    def writable(self, held: Held, refresh: bool = True, last: frozenset[str] = frozenset()) -> Held:
        """The same, with a copy of the statistic that `update` may change.

        refresh: whether a refresh may change it, too.  last: names of tensors that are written at the end of the step alone
        """
        return replace(held, state=duplicate(self.triple.representation, held.state, refresh, last), current=False)

    def may_refresh(self, chunk: Mapping[str, Evidence], fold: Fold, known: Set[str]) -> bool:
        """Whether a refresh, or the first evidence of a member, is in a chunk.  known: as in `update`"""
        if fold.refresh or self.names <= known:
            return fold.refresh
        return any(s.name not in known and (self.full or s.name in chunk) for s in self.sites)

    def update(
        self, held: Held, chunk: Mapping[str, Evidence], fold: Fold, reached: set[str], known: Set[str] = frozenset()
    ) -> None:
        """Fold one chunk of a step's evidence into a statistic, in place.

        held: from `writable`.
        reached: names of sites whose first evidence of this step is in the statistic already; extended here.
        known: names of sites with evidence from before this step.
        """

        def of(piece: Piece) -> Fold:
            return fold.of(again=piece.names[0] in reached, first=known.isdisjoint(piece.names))

        for piece, own in self.layout.stacks(chunk, of):
            self._update(held.state, piece, own)
            reached.update(piece.names)

    def _update(self, held: State, piece: Piece, fold: Fold) -> None:
        whole = self.full or isinstance(self.triple.representation, Unstacked)
        state = held if whole else picked(held, piece.slots)
        if fold.begins and self.basis is not None and piece.count == self.frame.stack:
            fold = replace(fold, solved=is_gradient(self.triple))
        by_rows.update(self.triple.representation, state, piece.evidence, fold)
        if not whole:
            if PROJECTED in state:
                held[PROJECTED] = state.pop(PROJECTED)
            shared = frozenset[str]() if fold.refresh or fold.first else slow(self.triple.representation, state)
            placed(held, piece.slots, {k: v for k, v in state.items() if k not in shared})

    # ---------------------------------------------------------------- gradients
    def read(self, rows: Mapping[str, FactoredGradient] = NO_ROWS) -> Tensor | FactoredGradient | None:
        """The gradients of all sites, zeros where there is none; None if there is none at all.  # (B, *shape)

        rows: by site, gradients that are held by rows, and may not be in ``.grad``
        """
        if self.full:
            return self.layout.read(rows)
        given = rows.get(self.sites[0].name)
        formed = given is None or (self.sites[0].has_gradient and not by_rows.applies(self.triple, self.options))
        return self.layout.read() if formed else given

    def assign(
        self, held: Held, value: by_rows.Value, rows: Mapping[str, FactoredGradient], into: dict[nn.Parameter, Tensor]
    ) -> None:
        """Add the ``.grad`` that a preconditioned gradient will give each parameter to ``into``; ``.grad`` itself stays."""
        pieces = by_rows.pieces(value, self.slots, self.full)
        for k, (site, piece) in enumerate(zip(self.sites, pieces, strict=True)):
            if not self.full and site.name not in held.ready:
                continue
            formed = piece.reshape(site.shape) if isinstance(piece, Tensor) else None
            if site.name in rows:
                self.row_layers[k].assign(piece if formed is None else formed, into)
            elif formed is not None:
                site.assign(formed, into)

    def prepare(
        self, held: Held, measured: Set[str], due: bool = True, evidence: Set[str] = frozenset(), own: bool = False
    ) -> tuple[Held, bool]:
        """Refresh the statistic, and from it the cache; where no refresh is due, only for sites that are not in the cache yet.

        Returns what the block then holds, and whether any of the cache has changed.

        measured: names of all sites with evidence so far; evidence: of those with evidence in this step.
        own: whether the statistic may be changed in place.
        """
        if self.is_current(held, measured, due):
            return held, False
        known = self.names & measured
        representation, new = self.triple.representation, known - held.ready
        turning = (known if due else new).difference(evidence if isinstance(representation, OwnOrder) else ())
        state, cache = self._renewed(held.state, turning, own), held.cache
        if due or renewal(representation) == "step":
            old = known & held.ready
        else:
            old = (known & held.ready).intersection(evidence) if self.follows_measurements else frozenset()
        if self.full and (old or new):
            cache = self.refreshed(state, held.cache or None)
        elif not self.full:
            parts = [self._prepared(state, names, before) for names, before in ((old, held.cache or None), (new, None))]
            for slots, made in parts:
                cache = self._placed(cache, slots, made)
        fresh = new if skips_first(representation) else frozenset[str]()
        if state is held.state and cache is held.cache and (known, fresh) == (held.ready, held.fresh):
            return held, bool(old or new)
        average = held.average
        if due:
            average = turned_average(average, self.basis, representation, held.cache, cache, self.held.state)
        return replace(held, state=state, cache=cache, average=average, ready=known, fresh=fresh), bool(old or new)

    def is_current(self, held: Held, measured: Set[str], due: bool) -> bool:
        """Whether `prepare` has nothing to do."""
        return not due and self.names & measured == held.ready and not held.fresh and self.renewed_at_refreshes

    @cached_property
    def renewed_at_refreshes(self) -> bool:
        """Whether its cache is recomputed at a refresh alone, once it is there."""
        return renewal(self.triple.representation) != "step" and not self.follows_measurements

    @cached_property
    def per_step(self) -> bool:
        """Whether its statistic is valid for one step."""
        return isinstance(self.triple.representation, PerStep)

    @property
    def follows_measurements(self) -> bool:
        """Whether the cache is refreshed at every measurement, and the refresh clock is for a slow part of the statistic."""
        representation = self.triple.representation
        return renewal(representation) == "measurement" or (self.options.slow_part and not has_refresh(representation))

    def _renewed(self, held: State, names: Set[str], own: bool) -> State:
        """The statistic with these members refreshed.  own: whether it may be changed in place"""
        representation = self.triple.representation
        if not names or not has_refresh(representation):
            return held
        members = zip(self.sites, self.slots, strict=True)
        slots = [t for s, t in members if s.name in names and not s.frozen]  # frozen sites are not refreshed
        if not slots:
            return held
        state, slots = held if own else duplicate(representation, held), [slice(None)] if self.full else slots
        part = picked(state, slots)
        representation.refresh(part)
        placed(state, slots, part)
        return state

    def refreshed(self, state: State, previous: State | None) -> State:
        """Refreshed statistics of some members."""
        return self.options.precision.prepare(self.triple, state, previous, self.frame.dtype)

    @property
    def late(self) -> bool:
        """Whether the names and shapes of its tensors are known only after a measurement."""
        return isinstance(self.triple.representation, Unstacked) and not isinstance(self.triple.representation, PerStep)

    def explicit(self, held: Held) -> Held:
        """The same with its cache."""
        return replace(held, cache=self.refreshed(held.state, None), implicit=False) if held.implicit else held

    def release(self) -> None:
        """Remove what is large from the cache, in place: whoever refers to the cache has it back after `restore`."""
        self.released = True
        for name in self.held.cache.keys() - SMALL:
            del self.held.cache[name]

    def restore(self) -> None:
        """Make a released cache again. RuntimeError where that fails, as it did not before."""
        if self.released:
            made = self.refreshed(self.held.state, None)
            if "failures" in made and not bool((made["failures"] == 0).all()):
                raise RuntimeError(f"{self.name}: the preconditioner of the last step cannot be made again from its statistic")
            cache = made | self.held.cache
            self.held.cache.clear()
            self.held.cache.update(cache)
            self.released = False

    def empty_cache(self) -> State:
        """A cache of zeros; empty where names and shapes are not known yet."""
        if self.late:
            return {}
        one = self.triple.representation.init(self.frame if self.full else replace(self.frame, stack=1))
        like = self.refreshed(one, None)
        return {k: v.new_zeros(len(v) if self.full else self.frame.stack, *v.shape[1:]) for k, v in like.items()}

    def applied(self, cache: State, g: Tensor) -> Tensor:
        """``P g``.  # (B, *shape)"""
        return self.options.precision.solve(self.triple, cache, g)

    def _prepared(self, state: State, names: Set[str], before: State | None) -> tuple[list[slice], State]:
        """A refreshed cache of some members, and their slices.  before: the cache that holds them, if any"""
        slots = [slot for site, slot in zip(self.sites, self.slots, strict=True) if site.name in names]
        if not slots:
            return [], {}
        whole = len(slots) == len(self.slots)
        if whole:
            return slots, self.refreshed(state, before)
        return slots, self.refreshed(picked(state, slots), None if before is None else picked(before, slots))

    def _placed(self, cache: State, slots: list[slice], new: State) -> State:
        """A copy of the cache with the refreshed members in it."""
        if not slots or len(slots) == len(self.slots):
            return new if slots else cache
        made = {k: cache[k].clone() if cache else v.new_zeros(self.frame.stack, *v.shape[1:]) for k, v in new.items()}
        for key, value in new.items():
            pieces = value.split([slot.stop - slot.start for slot in slots])
            for slot, piece in zip(slots, pieces, strict=True):
                made[key][slot] = piece
        return made

    def solved(
        self, held: Held, rows: Mapping[str, FactoredGradient], reached: Set[str], started: bool
    ) -> tuple[by_rows.Value, Held] | None:
        """`solve` for the gradient of this step; None without a gradient or a cache.

        rows: as in `read`.  reached: names of sites with evidence in this step
        """
        if not held.cache:
            return None
        if started and all(s.name in reached for s in self.sites):
            alone = {k: v for k, v in rows.items() if all(layer.weight.grad is None for layer in self.row_layers)}
            own = by_rows.solve_own(self.triple, self.options, held, [alone[s.name] for s in self.sites if s.name in alone])
            if own is not None:
                return own, held
        raw = self.read(rows)
        return None if raw is None else self.solve(held, raw, started)

    def solve(self, held: Held, raw: Tensor | FactoredGradient, started: bool = True) -> tuple[Tensor | FactoredGradient, Held]:
        """The preconditioned gradient, averaged and rescaled as configured, and what the block then holds.

        raw: this step's gradient; started: False for the step of the grafted method, instead
        """
        cache, given = snapshot(self.triple.representation, held.cache), isinstance(raw, FactoredGradient)
        if self.basis is None and isinstance(raw, FactoredGradient):
            if started and by_rows.applies(self.triple, self.options):  # without state of an average or a rule
                return by_rows.solve(self.triple, self.options, cache, raw), replace(held, cache=cache)
            raw = raw.form()
        grafting_state = {k: v.clone() for k, v in held.grafting_state.items()}
        if self.basis is not None:
            given_once = [projected(held.state, self.triple, self.basis, cache, raw)]
            *found, average = averaged(held.average, given_once.pop(), self.options)
            value = self.basis.solve_coordinates(cache, found.pop())
        else:
            assert isinstance(raw, Tensor)
            g, average = averaged(held.average, raw, self.options)
            kept = raw if (rule := self.options.grafting) else g
            del raw  # what nobody reads again is released before products
            value = self.applied(cache, g)
            if rule:
                value = rule.rescale(grafting_state, value, g, kept) if started else rule.target(grafting_state, g, kept)
        for slot in self._without_gradient(held, given):
            for new, old in ((average, held.average), (grafting_state, held.grafting_state)):
                for key, moved in new.items():
                    moved[slot] = old[key][slot]
        return value, replace(held, cache=cache, average=average, grafting_state=grafting_state)

    def _without_gradient(self, held: Held, given: bool) -> list[slice]:
        """Members of the stack without a gradient or a statistic: their averages do not change, as in a stack of their own.

        given: whether the gradient was held by rows, and is not in ``.grad``
        """
        if self.full:
            return []
        members = zip(self.sites, self.slots, strict=True)
        return runs([slot for site, slot in members if _lacks_gradient(held, site, given)])


def _lacks_gradient(held: Held, site: Site, given: bool) -> bool:
    return site.name not in held.ready or site.name in held.fresh or not (given or site.has_gradient)
