"""Statistics with a pass in them, beside those without it: nothing changes before it is known to be part of the step."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field

import torch

from gradmaker.blocks import Block
from gradmaker.curvature.evidence import Evidence
from gradmaker.curvature.roles import Pooled
from gradmaker.representations.base import Fold
from gradmaker.representations.roles import duplicate
from gradmaker.stacking import carry
from gradmaker.step.ledger import Ledger
from gradmaker.step.pool import Pool

__all__ = ["Pending"]


@dataclass
class Pending:
    """What the statistics will be. An exception, or a pass that turns out to be of no step, leaves them as they are."""

    further: set[str]  # sites that have given evidence in this step
    passes: int = 0  # of this step, that are in it
    part: int | None = None  # which of them is measured, where the maker does not count them itself
    blocks: dict[Block, Block] = field(default_factory=dict)  # copies with statistics of their own
    pooled: list[tuple[Pooled, list[Mapping[str, Evidence]], float]] = field(default_factory=list)
    done: dict[tuple[int, int], set[str]] = field(default_factory=dict)  # by micro-batch and chunk: what is in them

    def block(self, block: Block) -> Block:
        """The copy of a block, made when it is first asked for."""
        if block not in self.blocks:
            self.blocks[block] = _copied(block)
        return self.blocks[block]

    def copy(self) -> Pending:
        """Another one, to measure a further pass into."""
        blocks = {block: _copied(held) for block, held in self.blocks.items()}
        done = {key: set(names) for key, names in self.done.items()}
        return Pending(set(self.further), self.passes, None, blocks, list(self.pooled), done)

    def moved(self, blocks: Iterable[Block]) -> Pending:
        """The same for the blocks of another plan."""
        fresh = {block: _copied(block) for block in blocks}
        carry(self.blocks.values(), fresh.values())
        return Pending(set(self.further), self.passes, self.part, fresh, self.pooled, self.done)

    def take(
        self,
        chunks: Iterable[Mapping[str, Evidence]],
        folds: Mapping[Block, Fold],
        part: int,
        ledger: Ledger,
        known: Set[str],
    ) -> None:
        """Fold evidence into the copies; what the ledger has of it, from a step that begins again, is left out.

        folds: how it enters the statistic of each block; known: sites that had given evidence before this step
        """
        for index, chunk in enumerate(chunks):
            done = self.done.setdefault((part, index), set(ledger.folded(part, index)))
            with torch.no_grad():
                for block, fold in folds.items():
                    self.block(block).update(chunk, fold, self.further, done, known)

    def fold(self, ledger: Ledger, pool: Pool) -> None:
        """Make the copies the statistics."""
        for block, held in self.blocks.items():
            block.state = held.state
        ledger.further |= self.further
        for key, names in self.done.items():
            ledger.folded(*key).update(names)
        for curvature, chunks, weight in self.pooled:
            pool.add(curvature, chunks, weight)


def _copied(block: Block) -> Block:
    held = copy.copy(block)
    held.state = duplicate(block.triple.representation, block.state)
    return held
