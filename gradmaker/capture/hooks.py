"""Module hooks that do nothing in a copy of the model, and what they read of an output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

__all__ = ["ModuleHook", "edge_of"]


def edge_of(output: Tensor) -> Any:
    """The gradient edge of a tensor, read without the modes that record the calls of a pass."""
    with torch._C.DisableTorchFunction():
        return get_gradient_edge(output)


class ModuleHook:
    """A hook that calls a function; a copied or pickled one does nothing and holds no reference."""

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return None if self.function is None else self.function(*args)

    def __reduce__(self) -> tuple[type[ModuleHook], tuple[()]]:
        return ModuleHook, ()
