"""Statistics with a pass in them, beside those without it: nothing changes before it is known to be part of the step."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from gradmaker.blocks import Block

__all__ = ["Pending"]


@dataclass
class Pending:
    """What the statistics will be. An exception, or a pass that turns out to be of no step, leaves them as they are."""

    further: set[str]  # sites that have given evidence in this step
    passes: int = 0  # of this step, that are in it
    part: int | None = None  # which of them is measured, where the maker does not count them itself
    blocks: dict[Block, Block] = field(default_factory=dict)  # copies with statistics of their own

    def block(self, block: Block) -> Block:
        """The copy of a block, made when it is first asked for."""
        if block not in self.blocks:
            self.blocks[block] = _copied(block)
        return self.blocks[block]

    def copy(self) -> Pending:
        """Another one, to measure a further pass into."""
        return Pending(set(self.further), self.passes, None, {block: _copied(held) for block, held in self.blocks.items()})


def _copied(block: Block) -> Block:
    held = copy.copy(block)
    held.state = block.triple.representation.duplicate(block.state)
    return held
