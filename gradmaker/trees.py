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
    for tree in trees:
        kind = type(tree)
        if isinstance(tree, Tensor):
            yield tree
        elif kind is tuple or kind is list:  # most calls: a generic tree takes ten times as long
            yield from tensors(*tree)
        elif kind is dict:
            yield from tensors(*tree.values())
        else:
            yield from _of_leaves(tree)


def _of_leaves(tree: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, PackedSequence):
            yield from (v for v in leaf if isinstance(v, Tensor))
        elif isinstance(leaf, Tensor):
            yield leaf
