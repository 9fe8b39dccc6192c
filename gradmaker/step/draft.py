"""Drafts: the changes of a step to blocks, which stay unchanged until the step ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from gradmaker.blocks import Block
from gradmaker.curvature.evidence import Evidence
from gradmaker.curvature.roles import Pooled
from gradmaker.representations.base import Fold
from gradmaker.representations.roles import SlowTensors
from gradmaker.scale.parts import Part, Parts
from gradmaker.stacking import carry
from gradmaker.step import late, pool
from gradmaker.step.held import Held
from gradmaker.step.late import Late
from gradmaker.step.pool import PooledEvidence

__all__ = ["Draft", "Work"]


@dataclass(frozen=True)
class Work:
    """The changes of a step to its blocks so far; immutable."""

    held: Mapping[Block, Held] = field(default_factory=dict)  # by block that the step has changed
    reached: frozenset[str] = frozenset()  # sites with evidence in this step
    pooled: PooledEvidence = field(default_factory=dict)
    parts: Parts = field(default_factory=dict)  # of several processes, until the end of the step
    late: Mapping[Block, Late] = field(default_factory=dict)  # evidence that is not in the statistic yet

    def moved(self, blocks: Iterable[Block]) -> Work:
        """The same changes for the blocks of another plan, which hold what the old blocks held."""
        blocks = list(blocks)
        parts = {key: part.moved(blocks) for key, part in self.parts.items()}
        if not self.held and not self.late:
            return replace(self, parts=parts)
        fresh = {block: block.writable(block.held) for block in blocks}
        folded = {b: late.folded(b, self.held.get(b, b.held), own) for b, own in self.late.items()}
        carry({**self.held, **folded}.items(), fresh.items(), ("state",))
        return Work(fresh, self.reached, self.pooled, parts)


class Draft:
    """Changes that are not part of the step yet: a block is copied when it is first changed here."""

    def __init__(self, base: Work, part: int) -> None:
        """part: index of the micro-batch that is measured"""
        self.base, self.part = base, part
        self._held, self._reached, self._pooled = dict(base.held), set(base.reached), base.pooled
        self._parts = dict(base.parts)
        self._late = dict(base.late)
        self._own: dict[Block, bool] = {}  # blocks with a statistic of this draft's own; whether its slow tensors are, too

    def look(self, block: Block) -> Held:
        """What a block holds in this draft; read-only."""
        return self._held.get(block, block.held)

    def writable(self, block: Block, refresh: bool = True) -> Held:
        """The same, with a statistic that may be changed in place.  refresh: by a refresh, too"""
        if block in self._late:
            self._held[block], self._own[block] = late.folded(block, self.look(block), self._late[block]), True
            del self._late[block]
        elif block not in self._own or (refresh and not self._own[block]):
            self._held[block] = block.writable(self.look(block), refresh)
            self._own[block] = refresh or not isinstance(block.triple.representation, SlowTensors)
        return self._held[block]

    def put(self, block: Block, held: Held, reached: Set[str] = frozenset()) -> None:
        """Replace what a block holds in this draft.  reached: sites whose evidence is in it now"""
        if held is not self.look(block):
            self._held[block] = held
        self._reached |= reached

    @torch.no_grad()
    def fold(
        self, chunks: Iterable[Mapping[str, Evidence]], folds: Mapping[Block, Fold], known: Set[str], last: bool = False
    ) -> None:
        """Fold evidence into statistics.

        folds: how it enters that of each block of its curvature; known: sites with evidence from before this step;
        last: whether nothing that evidence is made of changes before the step ends, so that it may be folded then
        """
        for chunk in chunks:
            for block, fold in folds.items():
                if not block.owned:
                    self._reached |= block.names.intersection(chunk) if not block.full or chunk else frozenset()
                elif not (last and self._record(block, chunk, fold, known)):
                    held = self.writable(block, block.may_refresh(chunk, fold, known))
                    block.update(held, chunk, fold, self._reached, known)
            del chunk  # before the next one is made: the budget of a curvature is for one

    def _record(self, block: Block, chunk: Mapping[str, Evidence], fold: Fold, known: Set[str]) -> bool:
        """Keep the evidence of a chunk for the end of the step, where that is possible."""
        held = self.look(block)
        if block in self._late or held.state is not block.held.state:
            return False
        found = late.recorded(block, held, chunk, fold, self._reached, known)
        if found is None:
            return False
        if not found.pieces:  # no call of this layer: as where evidence is folded at once, nothing changes
            return True
        self._late[block] = found
        if found.whole:
            self._held[block] = replace(held, current=False)
            self._reached |= block.names
        else:
            self._held[block] = block.writable(held, block.may_refresh(chunk, fold, known), found.names)
            block.update(self._held[block], chunk, replace(fold, postponed=True), self._reached, known)
        return True

    def whole(self, block: Block) -> Held:
        """What a block holds in this draft, with all evidence, for a refresh of its cache."""
        held = self.look(block)
        return late.settled(block, held, self._late[block]) if block in self._late else held

    def writes(self) -> list[partial[object]]:
        """What folds the evidence that is kept into the statistics: the last action of a step."""
        return late.writes((block, self.look(block), own) for block, own in self._late.items())

    def owns(self, block: Block) -> bool:
        """Whether the statistic of a block in this draft may be changed in place by a refresh."""
        return self._own.get(block, False)

    def pool(self, curvature: Pooled, chunks: Iterable[Mapping[str, Evidence]], weight: float) -> None:
        """Keep evidence of a pooled curvature for the end of the step."""
        self._pooled = pool.add(self._pooled, curvature, list(chunks), weight)

    def keep(self, part: Part) -> None:
        """Keep the evidence of this rank for the end of the step."""
        self._parts[self.part, part.curvature] = part

    def take_parts(self) -> Parts:
        """The evidence of this rank, which is no longer kept."""
        parts, self._parts = self._parts, {}
        return parts

    @property
    def reached(self) -> frozenset[str]:
        """Sites with evidence in this step."""
        return frozenset(self._reached)

    def work(self) -> Work:
        """The changes of the step, those of this draft included."""
        return Work(dict(self._held), self.reached, self._pooled, dict(self._parts), dict(self._late))
