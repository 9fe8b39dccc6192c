"""What passes bring, beside what the blocks hold: nothing there changes before it is known to be part of the step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field

import torch

from gradmaker.blocks import Block
from gradmaker.curvature.evidence import Evidence
from gradmaker.curvature.roles import Pooled
from gradmaker.representations.base import Fold
from gradmaker.representations.roles import SlowTensors
from gradmaker.stacking import carry
from gradmaker.step import pool
from gradmaker.step.held import Held
from gradmaker.step.pool import PooledEvidence

__all__ = ["Draft", "Work"]


@dataclass(frozen=True)
class Work:
    """What a step has brought so far; never written to."""

    held: Mapping[Block, Held] = field(default_factory=dict)  # of the blocks that it has changed
    reached: frozenset[str] = frozenset()  # sites that have given evidence in this step
    pooled: PooledEvidence = field(default_factory=dict)

    def moved(self, blocks: Iterable[Block]) -> Work:
        """The same for the blocks of another plan, which have taken over what the former blocks hold."""
        if not self.held:
            return self
        fresh = {block: block.writable(block.held) for block in blocks}
        carry(self.held.items(), fresh.items(), ("state",))
        return Work(fresh, self.reached, self.pooled)


class Draft:
    """More work on that of a step, until it is part of it: a block is copied when it is first changed here."""

    def __init__(self, base: Work, part: int) -> None:
        """part: which micro-batch of the step is measured"""
        self.base, self.part = base, part
        self._held, self._reached, self._pooled = dict(base.held), set(base.reached), base.pooled
        self._own: dict[Block, bool] = {}  # whose statistic is a copy of this draft's; whether it is so with what is slow in it

    def look(self, block: Block) -> Held:
        """What a block holds here; not to be written to."""
        return self._held.get(block, block.held)

    def writable(self, block: Block, refresh: bool = True) -> Held:
        """The same, with a statistic that may be written to.  refresh: by a refresh, too"""
        if block not in self._own or (refresh and not self._own[block]):
            self._held[block] = block.writable(self.look(block), refresh)
            self._own[block] = refresh or not isinstance(block.triple.representation, SlowTensors)
        return self._held[block]

    def put(self, block: Block, held: Held) -> None:
        """What a block holds from here on: with the statistic that it has here."""
        if held is not self.look(block):
            self._held[block] = held

    @torch.no_grad()
    def fold(self, chunks: Iterable[Mapping[str, Evidence]], folds: Mapping[Block, Fold], known: Set[str]) -> None:
        """Fold evidence into statistics.

        folds: how it enters that of each block of its curvature; known: sites that had given evidence before this step
        """
        for chunk in chunks:
            for block, fold in folds.items():
                held = self.writable(block, block.may_refresh(chunk, fold, known))
                block.update(held, chunk, fold, self._reached, known)

    def owns(self, block: Block) -> bool:
        """Whether the statistic that it holds here may be written to by a refresh."""
        return self._own.get(block, False)

    def pool(self, curvature: Pooled, chunks: Iterable[Mapping[str, Evidence]], weight: float) -> None:
        """Keep evidence for the end of the step."""
        self._pooled = pool.add(self._pooled, curvature, list(chunks), weight)

    @property
    def reached(self) -> frozenset[str]:
        """Sites that have given evidence in this step."""
        return frozenset(self._reached)

    def work(self) -> Work:
        """What the step has brought, with this in it."""
        return Work(dict(self._held), self.reached, self._pooled)
