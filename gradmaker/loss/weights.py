"""Weights of examples and positions in a loss, for the empirical Fisher matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradmaker.loss.terms import Terms

__all__ = ["numbers", "together"]


def together(terms: Sequence[Terms]) -> list[tuple[Terms, Tensor]]:
    """Weights of terms; those of one likelihood at the same logits add, as for mixed labels: ``a l_m + b l_m`` is one term."""
    found: dict[object, tuple[Terms, Tensor]] = {}
    for t in terms:
        base = t.z if t.z._base is None else t.z._base
        key = (type(t), id(base), t.z.storage_offset(), t.z.shape, t.z.stride())
        found[key] = (t, found[key][1] + t.weights() if key in found else t.weights())
    return list(found.values())


@torch.no_grad()
def numbers(terms: Sequence[Terms], examples: int, positions: int = 1) -> Tensor:
    """``M = sum omega / sum omega^2`` over the terms of each example, or of each of its positions; 1 if all are masked.

    ``1 / M`` is the weight of a term where all have the same. As it does not depend on the other examples of the batch, the
    matrices of micro-batches add up.  # (n positions,)
    """
    laid = [t.by_example(w, examples).reshape(examples * positions, -1).double() for t, w in together(terms)]
    total, squares = (torch.stack([x.sum(1) for x in each]).sum(0) for each in (laid, [x.square() for x in laid]))
    return torch.where(squares > 0, total / torch.where(squares > 0, squares, 1.0), 1.0)
