"""Iteration over the tensors in nested arguments and outputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

__all__ = ["tensors"]


def tensors(*trees: Any) -> Iterator[Tensor]:
    """Yields every tensor, in order, also those inside of packed sequences, which are leaves in torch 2.6."""
    for leaf in tree_leaves(trees):
        if isinstance(leaf, PackedSequence):
            yield from (v for v in leaf if isinstance(v, Tensor))
        elif isinstance(leaf, Tensor):
            yield leaf
