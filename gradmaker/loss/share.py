"""What the batch of one rank is of the batch of all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradmaker.loss.terms import Place, Terms

__all__ = ["Share"]


@dataclass(frozen=True)
class Share:
    """The batch of all ranks is that of one process, in the order of the ranks: ``L = sum_r factor_r L_r``."""

    rank: int
    examples: tuple[int, ...]  # by rank; -1: not known
    rows: tuple[tuple[int, ...], ...]  # of each call of a loss, the number of its terms by rank
    factor: float  # of this rank's loss in that of all
    empty: bool  # whether this rank has no example, or none that counts

    @property
    def total(self) -> int:
        """The number of examples of all ranks. RuntimeError where it is not known."""
        if min(self.examples) < 0:
            raise RuntimeError(
                "several processes: the number of examples of this pass is not known; give the batch as the first tensor "
                "argument of the declared call"
            )
        return sum(self.examples)

    def place(self, terms: Terms, index: int) -> Place:
        """The rows of a call's terms among those of all ranks.  index: of the call"""
        m = terms.omega.numel()
        if index < len(self.rows):
            rows = self.rows[index]
        else:
            R = terms.positions(self.examples[self.rank])
            rows = tuple(n * R for n in self.examples)
        start, total = sum(rows[: self.rank]), sum(rows)
        if terms.order == "first" or min(self.examples) < 0:
            return Place(total, start + torch.arange(m))
        n, first = self.examples[self.rank], sum(self.examples[: self.rank])
        position, example = torch.arange(m) // n, torch.arange(m) % n
        return Place(total, position * self.total + first + example)
