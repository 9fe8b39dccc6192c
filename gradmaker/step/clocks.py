"""The clocks of a plan: a pair for each of its methods."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Set
from typing import TYPE_CHECKING

from gradmaker.blocks import Block
from gradmaker.representations.base import Fold
from gradmaker.schedule import Clocks

if TYPE_CHECKING:
    from gradmaker.config import GradientConfig

__all__ = ["PlanClocks"]


class PlanClocks:
    """A pair of clocks for each method of a plan; the intervals of methods are independent."""

    def __init__(self, methods: Mapping[str, GradientConfig]) -> None:
        self.methods = dict(methods)
        self.of = {
            name: Clocks(c.curvature_interval, c.preconditioner_interval, c.warmup_steps, c.refreshes_in_warmup)
            for name, c in methods.items()
        }

    def copy(self) -> PlanClocks:
        """A copy of all clocks."""
        made = PlanClocks.__new__(PlanClocks)
        made.methods, made.of = self.methods, {name: clocks.copy() for name, clocks in self.of.items()}
        return made

    def serving(self, methods: Mapping[str, GradientConfig]) -> PlanClocks:
        """Clocks for another plan: copies for methods in both, new ones for new methods."""
        made = PlanClocks(methods)
        made.of |= {name: clocks.copy() for name, clocks in self.of.items() if name in made.of}
        return made

    def forced(self, step: int, measures: Collection[str], refreshes: Collection[str]) -> PlanClocks:
        """Clocks by which, at ``step``, exactly these methods measure, and exactly these refresh all of their blocks."""
        made = self.copy()
        for name, clocks in made.of.items():
            clocks.measure.force(step, name in measures)
            clocks.refresh.force(step, name in refreshes)
        return made

    def measure(self, step: int, blocks: Iterable[Block], among: Collection[str] | None = None) -> frozenset[str]:
        """The methods that measure at this step; to be called once for each step.  among: methods to consider; None: all"""
        ending = {b.options.method for b in blocks if b.per_step}
        asked = [(name, clocks) for name, clocks in self.of.items() if among is None or name in among]
        return frozenset(name for name, clocks in asked if clocks.measure.tick(step) | (name in ending))

    def retried(self, due: Collection[str], reached: Set[str], step: int, blocks: Collection[Block]) -> PlanClocks:
        """Clocks by which measurements that brought no evidence are due again at ``step``.  reached: sites with evidence"""
        lost = [name for name in due if all(b.names.isdisjoint(reached) for b in blocks if b.options.method == name)]
        made = self.copy() if lost else self
        for name in lost:
            made.of[name].measure.retry(step)
        return made

    def folds(self, step: int, blocks: Iterable[Block], weight: float) -> dict[Block, Fold]:
        """How evidence of a micro-batch enters the statistics of blocks; changes nothing.  weight: its share of the loss"""
        shown = self.copy()
        shown.tick(step)
        found = {}
        for block in blocks:
            clocks = shown.of[block.options.method]
            found[block] = block.fold(weight, shown._is_due(block, step), clocks.measure.ticks - 1)
        return found

    def _is_due(self, block: Block, step: int) -> bool:
        name = block.options.method
        return self.of[name].refresh.due(step, block.share if self.methods[name].stagger else 0.0)

    def tick(self, step: int) -> None:
        """Begin the intervals of refreshes that begin at this step; may be called again for the same step."""
        for clocks in self.of.values():
            clocks.refresh.tick(step)

    def refreshes(self, step: int, blocks: Collection[Block]) -> list[tuple[Block, bool]]:
        """Every block, and whether it is to be refreshed; may be called again for the same step."""
        self.tick(step)
        return [(b, self._is_due(b, step)) for name in self.of for b in blocks if b.options.method == name]

    def dump(self) -> dict[str, dict[str, dict[str, int]]]:
        """The state of all clocks, by method."""
        return {name: clocks.dump() for name, clocks in self.of.items()}

    def load(self, saved: Mapping[str, Mapping[str, Mapping[str, int]]]) -> None:
        """Restore the state that `dump` returned."""
        for name, clocks in self.of.items():
            clocks.load(saved[name])
