"""Batches as trees of tuples, lists and mappings with tensors at their leaves."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """The tree with a function applied to its leaves."""
    if isinstance(value, Mapping):
        return {key: mapped(function, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [mapped(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return function(value)


def leaves(value: Any, tensors_only: bool = True) -> list[Any]:
    """The leaves of a tree in order."""
    found: list[Any] = []
    mapped(found.append, value)
    return [leaf for leaf in found if isinstance(leaf, Tensor)] if tensors_only else found


def rows_of(value: Any, rows: Tensor) -> Any:
    """The tree of these rows of its tensors."""
    return mapped(lambda tensor: tensor[rows], value)


def moved(value: Any, device: str) -> Any:
    """The tree with what can be moved on a device."""
    return mapped(lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf, value)


def length(value: Any) -> int:
    """The number of examples: rows of the first tensor, or 1 without any."""
    return next((len(leaf) for leaf in leaves(value) if leaf.dim()), 1)
