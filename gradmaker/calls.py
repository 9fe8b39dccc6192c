"""Calls of layers, and what a rule must say of them: inputs ``a`` and output gradients ``g`` with ``dL/dW = sum g a^T``."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradmaker.curvature.evidence import OneHot

__all__ = ["Call", "Kind", "LayerRule", "batch_first", "broadcasts", "check_lookup", "example_axis", "to_examples"]

Kind: TypeAlias = Literal["matrix", "embedding", "scale", "generic", "tensor"]
"""What a block of parameters is: a linear map, a lookup table, a norm layer's affine map, anything else, a bare tensor."""


@dataclass
class Call:
    """One call of a module during a recorded forward pass."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    training: bool
    edges: list[Any]  # one gradient edge for each differentiable output tensor
    shapes: list[torch.Size]
    dtype: torch.dtype
    gradients: list[Tensor | None] = field(default_factory=list)  # filled while a backward pass is collected

    @property
    def input(self) -> Tensor:
        """The first tensor argument."""
        return next(v for v in tree_leaves((self.args, self.kwargs)) if isinstance(v, Tensor))


def to_examples(x: Tensor, n: int, axes: int, lead: int = 0) -> Tensor:
    """Lay a tensor out as examples and positions.  x: (*lead, ..., *axes) -> (*lead, n, r, *axes)

    The example axis is the first one, or the second if only that has ``n`` entries (time first); a first axis that is a
    multiple of ``n`` is read as examples times positions.
    """
    middle = x.shape[lead : x.ndim - axes]
    if len(middle) > 1 and middle[0] != n and middle[1] == n:
        x = x.transpose(lead, lead + 1)
    elif prod(middle) % n:
        raise ValueError(f"cannot find {n} examples in a tensor of shape {tuple(x.shape)}: give the batch axis first")
    return x.reshape(*x.shape[:lead], n, -1, *x.shape[x.ndim - axes :])


def batch_first(x: Tensor, n: int, axes: int, lead: int = 0) -> Tensor:
    """As `to_examples`, where the first axis is known to be the batch: examples, or examples times windows."""
    if x.shape[lead] % n:
        raise ValueError(
            f"cannot find {n} examples in a batch of {x.shape[lead]}: the first axis of the model's first argument is read as "
            "the examples; give an unbatched input an axis of its own, or leave the layer out with ignore="
        )
    return x.reshape(*x.shape[:lead], n, -1, *x.shape[x.ndim - axes :])


def broadcasts(value: Tensor, call_input: Tensor | None, n: int) -> bool:
    """Whether a module's output is one for all examples, as that of positions ``(1, T)`` in an embedding.

    ``(1, n, ...)`` is read as time first, unless it was looked up at ``0 ... n-1``.
    """
    if n < 2 or value.ndim < 2 or value.shape[0] != 1:
        return False
    if value.shape[1] != n or call_input is None or call_input.is_floating_point():
        return value.shape[1] != n
    return torch.equal(call_input.reshape(-1), torch.arange(n, device=call_input.device))


def example_axis(call: Call, value: Any, n: int, first: bool) -> int | None:
    """The axis of the examples in something that goes in or out of a call (first: before all others); None if it has none."""
    if not isinstance(value, Tensor):
        return None
    module = call.module
    axes: tuple[int, ...] = (0, 1)
    if isinstance(module, nn.RNNBase):  # states have layers first, whatever ``batch_first`` says
        axes = () if value.ndim != 3 else (0,) if first and module.batch_first else (1,)
    elif isinstance(module, nn.MultiheadAttention):
        given = inspect.signature(nn.MultiheadAttention.forward).bind(module, *call.args, **call.kwargs).arguments
        mask = given.pop("attn_mask", None)
        sequence = first or any(value is given[k] for k in ("query", "key", "value"))
        axes = () if value is mask and value.ndim == 2 else (1,) if sequence and not module.batch_first else (0,)
    return next((axis for axis in axes if value.ndim > axis and value.shape[axis] == n), None)


def check_lookup(module: nn.Module, call: Call) -> None:
    """ValueError where the gradient of a lookup table is not that of its examples, one by one."""
    if getattr(module, "scale_grad_by_freq", False):
        raise ValueError(
            f"{type(module).__name__}(scale_grad_by_freq=True) divides .grad by how often a token is in the batch: that is no "
            "gradient of a loss and has no curvature; use scale_grad_by_freq=False, or leave the layer out with ignore="
        )
    if isinstance(module, nn.EmbeddingBag) and call.input.ndim == 1:
        raise ValueError(
            "EmbeddingBag was called with all bags in one axis, in which examples cannot be told apart: give it an input of "
            "shape (examples, tokens), with per_sample_weights= or padding_idx= for bags of different length, or ignore="
        )


class LayerRule(ABC):
    """How layers of some types enter the curvature."""

    types: ClassVar[tuple[type[nn.Module], ...]]
    kind: ClassVar[Kind] = "matrix"
    transposed: ClassVar[bool] = False  # the weight is stored as (i, o)
    bias_rule: ClassVar[LayerRule | None] = None  # of a bias that is no further input: it forms a block of its own

    def accepts(self, module: nn.Module) -> bool:
        """Whether this very module behaves as its type says."""
        return True

    @abstractmethod
    def shape(self, module: Any) -> tuple[int, int, int]:
        """The weight as a stack of matrices.  # (G, o, i)"""

    @abstractmethod
    def inputs(self, module: Any, call: Call, n: int) -> Tensor | OneHot:
        """``a``.  # (G, n, r, i)"""

    @abstractmethod
    def gradients(self, module: Any, call: Call, g: Tensor, n: int) -> Tensor:
        """``g`` from the gradient of the layer's output (k, *output) .  # (k, G, n, r, o)"""
