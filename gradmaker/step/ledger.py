"""The ledger of a step: what of it has been done, so that a step which begins again after an exception counts once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gradmaker.blocks import Block, Solved
from gradmaker.representations.roles import PerStep

__all__ = ["WHOLE_STEP", "Ledger"]

WHOLE_STEP = -1
"""In the place of a micro-batch: what is measured once a step, from its gradient."""


class Ledger:
    """What has entered the statistics of the step under way, which blocks are refreshed, and what their solves have given.

    A pass that is repeated gives the same evidence, as random draws are keyed by seed, name, step and micro-batch: what stands
    here is left out then. A repeated step has to have the same micro-batches.
    """

    def __init__(self) -> None:
        self.further: set[str] = set()  # sites that have given evidence in this step
        self.prepared: dict[Block, bool] = {}  # blocks that are done with refreshing, and whether they were due
        self.solved: list[tuple[Block, Solved]] | None = None  # until all of it is in `.grad`
        self._folded: dict[tuple[int, int], set[str]] = {}  # by micro-batch and chunk of its evidence: sites, or a full block
        self._parts: dict[int, tuple[float, int]] = {}  # weight and examples of the micro-batches

    def folded(self, part: int, chunk: int) -> set[str]:
        """The names whose evidence in a chunk has been folded in: to be extended."""
        return self._folded.setdefault((part, chunk), set())

    def note(self, part: int, weight: float, examples: int) -> None:
        """A micro-batch is about to be folded in. RuntimeError if it is another than before the step began again."""
        before = self._parts.get(part, (weight, examples))
        if self.measured(part) and before != (weight, examples):
            raise RuntimeError(
                f"micro-batch {part} of this step had weight {before[0]:g} and {before[1]} examples when it was measured, "
                f"before an exception ended the step, and has {weight:g} and {examples} now: repeat the step with the same "
                "micro-batches, or load a state that was saved before"
            )
        self._parts[part] = (weight, examples)

    def measured(self, part: int) -> bool:
        """Whether anything of a micro-batch has been folded in."""
        return any(done for (p, _), done in self._folded.items() if p == part)

    def check_parts(self, last: int) -> None:
        """RuntimeError if a step that began again ends before all is there that has been folded in.  last: micro-batch"""
        measured = max((part for (part, _), done in self._folded.items() if done), default=WHOLE_STEP)
        if measured > last:
            raise RuntimeError(
                f"{measured + 1} micro-batches of this step were measured before an exception ended it, and it was repeated "
                f"with {last + 1}: repeat it with all, or load a state that was saved before"
            )

    def begin_again(self, blocks: Iterable[Block]) -> None:
        """The passes of the step are to be repeated: what ends with a pass is measured anew.  blocks: those of the plan"""
        self.solved = None
        for block in blocks:
            if isinstance(block.triple.representation, PerStep):
                block.triple.representation.release(block.state)
                own = {block.name, *(s.name for s in block.sites)}
                self.prepared.pop(block, None)
                self.further -= own
                for done in self._folded.values():
                    done -= own

    # ---------------------------------------------------------------- state
    def dump(self) -> dict[str, Any]:
        """Names and numbers only."""
        folded = [f"{part}/{k}/{name}" for (part, k), done in self._folded.items() for name in done]
        return {
            "further": sorted(self.further),
            "folded": sorted(folded),
            "parts": [[part, weight, examples] for part, (weight, examples) in self._parts.items() if self.measured(part)],
            "prepared": sorted(s.name for b in self.prepared for s in b.sites),
            "refreshed": sorted(s.name for b, due in self.prepared.items() if due for s in b.sites),
        }

    @classmethod
    def load(cls, saved: dict[str, Any], blocks: Iterable[Block]) -> Ledger:
        """Go on from `dump`."""
        made = cls()
        made.further = set(saved["further"])
        for entry in saved["folded"]:
            part, chunk, name = entry.split("/", 2)
            made.folded(int(part), int(chunk)).add(name)
        made._parts = {int(part): (float(weight), int(examples)) for part, weight, examples in saved["parts"]}
        for block in blocks:
            names = {s.name for s in block.sites}
            if names <= set(saved["prepared"]):
                made.prepared[block] = names <= set(saved["refreshed"])
        return made
