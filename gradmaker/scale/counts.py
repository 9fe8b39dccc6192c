"""What the batch of each rank is of the batch of all: counted once for each pass, before its backward pass."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose, isfinite

import torch
from torch import Tensor

from gradmaker.loss.likelihood import weightings
from gradmaker.loss.recorder import LossRecorder
from gradmaker.loss.share import Share
from gradmaker.loss.terms import Terms
from gradmaker.scale.ranks import Ranks, RefusedError

__all__ = ["UnevenRanksWarning", "count", "share_of", "share_of_replica"]


class UnevenRanksWarning(UserWarning):
    """The ranks have means over different numbers of terms, whose mean is not that of the whole batch."""


CALLS = 4
REDUCTIONS = ("none", "mean", "sum")
CLOSE = 1e-5  # of sums of weights in float32


@dataclass(frozen=True)
class _Call:
    """One call of a recognised loss, on one rank."""

    rows: int  # loss terms
    divisor: float  # of a mean
    weight: float  # sum of the weights of its terms
    reduction: int


@torch.no_grad()
def count(recorder: LossRecorder, loss: Tensor) -> list[float]:
    """The numbers of a pass for the counts: for each call of a recognised loss its rows, divisor, weight and reduction."""
    found = weightings(recorder, loss)
    if len(found) > CALLS:
        raise RuntimeError(f"several processes: a loss of at most {CALLS} calls of torch's losses, got {len(found)}")
    numbers = [float(len(found))]
    for call, rows, w in found:
        weight = w.weight.double().sum() / (w.total.double() if w.reduction == "mean" else 1.0)
        divisor = float(w.total) if w.reduction == "mean" else float((w.weight != 0).sum())
        numbers += [float(rows), divisor, float(weight), float(REDUCTIONS.index(call.reduction))]
    return numbers


def share_of(ranks: Ranks, examples: int | None, numbers: Sequence[float], weight: float, reduction: str) -> Share:
    """The share of this rank. RefusedError, on all ranks, where the loss of all is no sum of those of the ranks.

    examples: of this rank, if known; weight: of its micro-batch; reduction: of a loss that is not recognised
    """
    given = [-1.0 if examples is None else float(examples), weight, *numbers]
    table = ranks.meet(given + [0.0] * (3 + 4 * CALLS - len(given)))
    sizes = tuple(int(row[0]) for row in table)
    if len({row[1] for row in table}) > 1:
        raise RefusedError(
            f"the weights of this micro-batch differ between ranks, {[row[1] for row in table]}: give its share of the loss of "
            "the step on all ranks; what each rank has of it is counted"
        )
    calls = [[_Call(int(m), d, w, int(c)) for m, d, w, c in _groups(row[3 : 3 + 4 * int(row[2])])] for row in table]
    if len({len(each) for each in calls}) > 1:
        raise RefusedError(f"the ranks call {[len(each) for each in calls]} losses in one pass: all have to call the same")
    found = [_factors([each[j] for each in calls], reduction) for j in range(len(calls[0]))]
    if not found:
        found = [_of_examples(sizes, reduction)]
    if any(not all(isclose(a, b, rel_tol=CLOSE) for a, b in zip(f, found[0], strict=True)) for f in found):
        raise RefusedError(
            "the losses of this pass are means over different numbers on the ranks, so that no one factor makes their sum "
            f"that of the whole batch (shares {found}): give all ranks equally many terms, or use sums"
        )
    rows = tuple(tuple(each[j].rows for each in calls) for j in range(len(calls[0])))
    own = found[0][ranks.rank]
    if not any(found[0]):  # nothing on any rank: as one process has it
        return Share(ranks.rank, sizes, rows, 1 / ranks.size, False)
    return Share(ranks.rank, sizes, rows, own, own == 0 or sizes[ranks.rank] == 0)


def share_of_replica(ranks: Ranks, terms: Sequence[Terms], examples: int, trouble: float) -> tuple[Share, float]:
    """The share of this rank where another loop averages the gradients of the ranks: ``L = (1 / W) sum_r L_r``.

    trouble: 0, or more where this rank cannot measure its pass. Returns the largest of them, too.
    """
    omega = [t.omega.double() for t in terms]
    weight, counted = sum(float(w.sum()) for w in omega), sum(float((w != 0).sum()) for w in omega)
    rows = [float(w.numel()) for w in omega[:CALLS]]
    table = ranks.meet([float(examples), trouble, weight, counted, *rows] + [0.0] * (CALLS - len(rows)))
    each = [row for row in table if row[3]]
    if len({row[3] for row in each}) > 1 and _alike([row[2] for row in each]):
        numbers = [int(row[3]) for row in table]
        warnings.warn(
            f"the losses of the ranks are means over {numbers} terms, and the mean of their gradients is not that of the whole "
            "batch: the curvature is that of the mean of the ranks' losses. Drop uneven last batches, or scale each loss by its"
            " share",
            UnevenRanksWarning,
            stacklevel=2,
        )
    found = tuple(tuple(int(row[4 + j]) for row in table) for j in range(len(rows)))
    sizes = tuple(int(row[0]) for row in table)
    return Share(ranks.rank, sizes, found, 1 / ranks.size, examples == 0), max(row[1] for row in table)


def _groups(flat: Sequence[float]) -> list[tuple[float, float, float, float]]:
    return [(flat[j], flat[j + 1], flat[j + 2], flat[j + 3]) for j in range(0, len(flat), 4)]


def _of_examples(sizes: Sequence[int], reduction: str) -> list[float]:
    """The factors of a loss that is not recognised."""
    if reduction == "sum":
        return [1.0] * len(sizes)
    if min(sizes) < 0:
        raise RefusedError(
            "several processes: the number of examples of this pass is not known, and the loss is not recognised, so that its "
            "mean over all ranks is not either: give the batch as the first tensor argument of the declared call"
        )
    return [n / max(1, sum(sizes)) for n in sizes]


def _factors(calls: Sequence[_Call], reduction: str) -> list[float]:
    """The factor of each rank's loss in that of all: its share of the divisor of a mean, 1 for a sum."""
    total = sum(call.divisor for call in calls)
    full = [call for call in calls if call.divisor and isfinite(call.weight)]
    if not full:
        return [call.divisor / total if total else 0.0 for call in calls]
    mean = _alike([call.weight for call in full])
    summed = _alike([call.weight / call.divisor for call in full])
    if mean and summed:
        mean = _is_mean(full[0], reduction)
    elif not (mean or summed):
        raise RefusedError(
            "the loss is neither a mean nor a sum over its terms on all ranks (sums of weights "
            f"{[call.weight for call in calls]} of {[call.divisor for call in calls]} terms): leave the ranks' shares of the "
            "loss to the maker"
        )
    return [call.divisor / total for call in calls] if mean else [float(call.divisor > 0) for call in calls]


def _is_mean(call: _Call, reduction: str) -> bool:
    """Whether a loss is a mean, where all ranks have equally many terms."""
    named = REDUCTIONS[call.reduction]
    if named != "none":
        return named == "mean"
    if isclose(call.weight, 1.0, rel_tol=CLOSE):
        return True
    return False if isclose(call.weight, call.divisor, rel_tol=CLOSE) else reduction == "mean"


def _alike(values: Sequence[float]) -> bool:
    return all(isclose(v, values[0], rel_tol=CLOSE) for v in values)
