"""Evidence pooled over the micro-batches of a step before it is folded: ``(v, sum_j weight_j H_j v)``.

For `Pooled` curvatures. Tensors and containers are never changed once they are held.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from torch import Tensor

from gradmaker.blocks import Block
from gradmaker.curvature.evidence import Evidence, Pair
from gradmaker.curvature.roles import Pooled

__all__ = ["PooledEvidence", "add", "dump", "load"]

PooledEvidence: TypeAlias = Mapping[Pooled, Sequence[Mapping[str, Pair]]]
"""Pairs by curvature, chunk and site."""


def add(pooled: PooledEvidence, curvature: Pooled, chunks: Iterable[Mapping[str, Evidence]], weight: float) -> PooledEvidence:
    """Add one more micro-batch.  weight: share of its loss in that of the step"""
    fresh = [{name: _pair(e) for name, e in chunk.items()} for chunk in chunks]
    before = pooled.get(curvature, [{} for _ in fresh])
    return {**pooled, curvature: [_sum(old, new, weight) for old, new in zip(before, fresh, strict=True)]}


def _pair(evidence: Evidence) -> Pair:
    assert isinstance(evidence, Pair)
    return evidence


def _sum(old: Mapping[str, Pair], new: Mapping[str, Pair], weight: float) -> dict[str, Pair]:
    """Sum the images of equal vectors; a micro-batch adds nothing to sites that it did not reach."""
    scaled = {name: replace(pair, cv=pair.cv * weight) for name, pair in new.items()}
    both = {name: replace(pair, cv=old[name].cv + pair.cv) for name, pair in scaled.items() if name in old}
    return {**old, **scaled, **both}


def dump(pooled: PooledEvidence) -> dict[str, dict[str, dict[str, Tensor]]]:
    """The tensors, by site and chunk."""
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for chunks in pooled.values():
        for index, chunk in enumerate(chunks):
            for name, pair in chunk.items():
                found.setdefault(name, {})[str(index)] = {"v": pair.v.clone(), "cv": pair.cv.clone()}
    return found


def load(saved: Mapping[str, Mapping[str, Mapping[str, Any]]], blocks: Iterable[Block]) -> PooledEvidence:
    """Restore what `dump` returned."""
    held: dict[Pooled, list[dict[str, Pair]]] = {}
    for block in blocks:
        curvature = block.triple.curvature
        if not isinstance(curvature, Pooled):
            continue
        for site in block.sites:
            pairs = saved.get(site.name, {})
            chunks = held.setdefault(curvature, []) if pairs else []
            for index, pair in pairs.items():
                chunks += [{} for _ in range(int(index) + 1 - len(chunks))]
                v, cv = (pair[key].to(block.frame.device, copy=True) for key in ("v", "cv"))
                chunks[int(index)][site.name] = Pair(v, cv)
    return held
