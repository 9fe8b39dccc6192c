"""Evidence of one rank: kept until the end of a step, when that of all ranks is put together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from gradmaker.blocks import Block
from gradmaker.curvature import Curvature
from gradmaker.curvature.evidence import Evidence, Outer
from gradmaker.representations.roles import Additive
from gradmaker.stacking import carry
from gradmaker.step.held import Held

__all__ = ["Part", "Parts", "adds", "zeros"]


@dataclass(frozen=True)
class Part:
    """The evidence of one rank in one micro-batch, for one curvature."""

    curvature: Curvature
    examples: int = 0  # of this rank
    sums: Mapping[Block, Held] = field(default_factory=dict)  # of blocks whose statistics add up, folded into zeros
    reached: frozenset[str] = frozenset()  # sites in there
    chunks: Sequence[Mapping[str, Evidence]] = ()  # for the other blocks

    def moved(self, blocks: Iterable[Block]) -> Part:
        """The same for the blocks of another plan."""
        fresh = {b: zeros(b) for b in blocks if b.triple.curvature == self.curvature and adds(b)}
        carry(self.sums.items(), fresh.items(), ("state",))
        return replace(self, sums=fresh)


Parts: TypeAlias = Mapping[tuple[int, Curvature], Part]
"""By micro-batch and curvature."""


def adds(block: Block) -> bool:
    """Whether the statistic of a block is a sum over examples."""
    gives = block.triple.curvature.gives
    return any(kind.evidence is Outer for kind in gives) and isinstance(block.triple.representation, Additive)


def zeros(block: Block) -> Held:
    """A statistic without evidence."""
    return Held(block.triple.representation.init(block.frame))
