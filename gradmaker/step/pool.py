"""Evidence that the micro-batches of a step make together, before any statistic takes it in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gradmaker.curvature.evidence import Evidence, Pair
from gradmaker.curvature.roles import Pooled

if TYPE_CHECKING:
    from gradmaker.plan import Plan

__all__ = ["Pool"]


class Pool:
    """``(v, sum_j weight_j H_j v)`` of the step that is under way, for curvatures that are `Pooled`.

    No tensor is written to once it is held, so that a copy is one of references.
    """

    def __init__(self, held: Mapping[Pooled, list[dict[str, Pair]]] | None = None) -> None:
        self.held = dict(held or {})
        """By curvature, chunk and site."""

    def copy(self) -> Pool:
        """The same pairs, of which one may be extended."""
        return Pool(self.held)

    def add(self, curvature: Pooled, chunks: Iterable[Mapping[str, Evidence]], weight: float) -> None:
        """One more micro-batch, after all of it has been measured.  weight: of its loss in that of the step"""
        fresh = [{name: _pair(e) for name, e in chunk.items()} for chunk in chunks]
        before = self.held.get(curvature, [{} for _ in fresh])
        self.held[curvature] = [_sum(old, new, weight) for old, new in zip(before, fresh, strict=True)]

    # ---------------------------------------------------------------- state
    def dump(self) -> dict[str, dict[str, dict[str, Tensor]]]:
        """By site and chunk: tensors alone."""
        found: dict[str, dict[str, dict[str, Tensor]]] = {}
        for chunks in self.held.values():
            for index, chunk in enumerate(chunks):
                for name, pair in chunk.items():
                    found.setdefault(name, {})[str(index)] = {"v": pair.v.clone(), "cv": pair.cv.clone()}
        return found

    @classmethod
    def load(cls, plan: Plan, saved: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Pool:
        """Go on from `dump`."""
        held: dict[Pooled, list[dict[str, Pair]]] = {}
        for block in plan.blocks:
            curvature = block.triple.curvature
            if not isinstance(curvature, Pooled):
                continue
            for site in block.sites:
                pairs = saved.get(site.name, {})
                chunks = held.setdefault(curvature, []) if pairs else []
                for index, pair in pairs.items():
                    chunks += [{} for _ in range(int(index) + 1 - len(chunks))]
                    chunk = chunks[int(index)]
                    v, cv = (pair[key].to(block.frame.device, copy=True) for key in ("v", "cv"))
                    chunk[site.name] = Pair(v, cv)
        return cls(held)


def _pair(evidence: Evidence) -> Pair:
    assert isinstance(evidence, Pair)
    return evidence


def _sum(old: dict[str, Pair], new: dict[str, Pair], weight: float) -> dict[str, Pair]:
    """Images add, of vectors that are the same; a site that one of the micro-batches did not reach has none there."""
    scaled = {name: replace(pair, cv=pair.cv * weight) for name, pair in new.items()}
    both = {name: replace(pair, cv=old[name].cv + pair.cv) for name, pair in scaled.items() if name in old}
    return {**old, **scaled, **both}
