"""Folds that come last in a step: evidence by a few rows is kept, and enters the statistic where that lies.

Until then the statistic is unchanged, and no copy of it is made; a refresh in the same step folds into a copy of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from gradmaker.blocks import Block
from gradmaker.curvature.evidence import Evidence, Gradient, Outer
from gradmaker.curvature.row_gradient import RowGradient
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.writes import Recorder, at_once
from gradmaker.representations.base import Fold
from gradmaker.representations.roles import FoldsLast, has_refresh
from gradmaker.step.held import Held

__all__ = ["Late", "folded", "recorded", "settled", "writes"]


@dataclass(frozen=True)
class Late:
    """Evidence of a block that its statistic lacks."""

    pieces: Sequence[tuple[Evidence | FactoredGradient, Fold]]  # in order, with how each enters
    names: frozenset[str]  # of the tensors of the statistic that it enters at the end
    whole: bool  # whether these are all; otherwise no solver reads them


def recorded(
    block: Block, held: Held, chunk: Mapping[str, Evidence], fold: Fold, reached: Set[str], known: Set[str]
) -> Late | None:
    """The evidence of a chunk, where it takes less memory than the statistic; None where it has to be folded at once."""
    representation = block.triple.representation
    if not isinstance(representation, FoldsLast) or not representation.folds_last:
        return None
    often = fold.refresh and getattr(block.triple.solver, "interval", None) == 1
    if block.full or len(block.sites) != 1 or (often and not representation.folds_twice):
        return None
    found, names = list[tuple[Evidence | FactoredGradient, Fold]](), frozenset(held.state)
    for piece in block.layout.evidence(chunk):
        given = _rows_of(piece.evidence)
        if given is None:
            return None
        own = fold.of(again=piece.names[0] in reached, first=known.isdisjoint(piece.names))
        found.append((given, own))
        names &= representation.last(held.state, given, own)
    whole = len(names) == len(held.state)
    if not names or (whole and has_refresh(representation)) or _shares(held, names):
        return None
    size = sum(x.numel() for given, _ in found for x in _tensors(given))
    return Late(found, names, whole) if 2 * size <= sum(held.state[k].numel() for k in names) else None


def _rows_of(evidence: Evidence) -> Evidence | FactoredGradient | None:
    """Evidence that no later write of the step changes, as one of ``.grad`` would; None for other evidence."""
    if isinstance(evidence, RowGradient):
        rows = evidence.factored
        return rows if type(rows) is FactoredGradient and not rows.cancels() else None
    if type(evidence) is Gradient and type(evidence.gradient) is Tensor:
        return replace(evidence, gradient=evidence.gradient.clone())
    return evidence if isinstance(evidence, Outer) and type(evidence.inputs) is Tensor else None


def _tensors(given: Evidence | FactoredGradient) -> list[Tensor]:
    return [x for x in vars(given).values() if isinstance(x, Tensor)]


def _shares(held: Held, names: Set[str]) -> bool:
    """Whether something else that a block holds is one of these tensors of its statistic, or a view of it."""
    parts = (held.cache, held.average, held.grafting_state)
    others = {x.untyped_storage().data_ptr() for part in parts for x in part.values()}
    return any(held.state[k].untyped_storage().data_ptr() in others for k in names)


def folded(block: Block, held: Held, late: Late) -> Held:
    """What a block would hold with evidence folded into a copy of its statistic."""
    made = block.writable(held)
    _fold(block, made, late, at_once)
    return made


def settled(block: Block, held: Held, late: Late) -> Held:
    """The same to be read by a solver alone, with averages in the place of sums."""
    if not late.whole:
        return held
    made, representation = folded(block, held, late), block.triple.representation
    assert isinstance(representation, FoldsLast)
    representation.settle(made.state)
    return made


def writes(late: Iterable[tuple[Block, Held, Late]]) -> list[partial[object]]:
    """What folds evidence into the statistics that are held; all that is not a write is done already."""
    recorder = Recorder()
    for block, held, own in late:
        _fold(block, held, own, recorder)
    return recorder.calls


def _fold(block: Block, held: Held, late: Late, write: Callable[..., object]) -> None:
    representation = block.triple.representation
    assert isinstance(representation, FoldsLast)
    for given, fold in late.pieces:
        representation.fold(held.state, given, fold, write)
