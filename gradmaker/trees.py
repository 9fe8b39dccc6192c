"""The tensors of nested arguments and results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

__all__ = ["tensors"]


def tensors(*trees: Any) -> Iterator[Tensor]:
    """Every tensor, in order; a packed sequence is opened, which torch 2.6 takes for one value."""
    for leaf in tree_leaves(trees):
        if isinstance(leaf, PackedSequence):
            yield from (v for v in leaf if isinstance(v, Tensor))
        elif isinstance(leaf, Tensor):
            yield leaf
