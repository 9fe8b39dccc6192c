"""Calls of layers, and the interface of layer rules: inputs ``a`` and output gradients ``g`` with ``dL/dW = sum g a^T``."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from gradmaker.capture.one_hot import OneHot
from gradmaker.trees import tensors

__all__ = [
    "ORDERS",
    "Call",
    "Kind",
    "LayerRule",
    "Layout",
    "Order",
    "batch_first",
    "check_lookup",
    "example_axis",
    "to_examples",
]

Kind: TypeAlias = Literal["matrix", "embedding", "tied", "scale", "generic", "tensor"]
"""Type of a parameter block: a linear map, an embedding, a table that is both (an embedding tied to a head), a norm layer's
affine map, a parameter without a rule, a tensor."""


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
    gradients: list[Tensor | None] = field(default_factory=list)  # filled by hooks during a backward pass
    autocast: torch.dtype | None = None  # its dtype, where the call ran under autocast
    key: tuple[nn.Module, bool, tuple[str, ...]] | None = None  # by which self-checks of equal calls are found
    repeated: Any = None  # what a rule keeps of the call made again

    @property
    def tensor_shapes(self) -> list[torch.Size]:
        """Shapes of all tensor arguments."""
        return [v.shape for v in tensors(self.args, self.kwargs)]

    @property
    def input(self) -> Tensor:
        """The first tensor argument. ValueError if there is none."""
        found = next(tensors(self.args, self.kwargs), None)
        if found is None:
            raise ValueError("a layer was called without a tensor among its arguments: leave it out with ignore=")
        return found


Order: TypeAlias = Literal["first", "second", "last"]
"""Position of a call's examples: first axis, alone or times positions; second axis; first axis, examples running fastest."""
ORDERS: tuple[Order, ...] = ("first", "second", "last")


@dataclass(frozen=True)
class Layout:
    """Number and position of the examples in a call; ``order`` None infers it from the sizes, which may coincide."""

    count: int
    order: Order | None = None


def to_examples(x: Tensor, layout: Layout, axes: int, lead: int = 0) -> Tensor:
    """Lay a tensor out as examples and positions.  x: (*lead, ..., *axes) -> (*lead, n, r, *axes)

    first: (n, ...) or (n r, ...); second: (r, n, ...), as time first; last: (r n, ...), as of concatenated views. Raises
    ValueError where the sizes do not allow this order.
    """
    n, middle = layout.count, x.shape[lead : x.ndim - axes]
    order = layout.order or _guess(n, middle)
    if order == "second" and len(middle) > 1 and middle[1] == n:
        x = x.transpose(lead, lead + 1)
    elif order == "last" and len(middle) > 0 and middle[0] % n == 0:
        x = x.unflatten(lead, (-1, n)).transpose(lead, lead + 1)
    elif order != "first" or (middle[0] if len(middle) else 1) % n:
        raise ValueError(f"cannot find {n} examples in a tensor of shape {tuple(x.shape)}: give the batch axis first")
    return x.reshape(*x.shape[:lead], n, -1, *x.shape[x.ndim - axes :])


def _guess(n: int, middle: Sequence[int]) -> Order:
    return "second" if len(middle) > 1 and middle[0] != n and middle[1] == n else "first"


def batch_first(x: Tensor, layout: Layout, axes: int, lead: int = 0) -> Tensor:
    """`to_examples` where the first axis is the batch: examples, or examples times windows. ValueError if it is not."""
    if x.shape[lead] % layout.count or layout.order == "second":
        raise ValueError(
            f"cannot find {layout.count} examples in a batch of {x.shape[lead]}: the first axis of the model's first argument "
            "is read as the examples; give an unbatched input an axis of its own, or leave the layer out with ignore="
        )
    return to_examples(x, Layout(layout.count, layout.order or "first"), axes, lead)


def example_axis(call: Call, value: Any, n: int, first: bool) -> int | None:
    """The axis of examples in an argument or output of a call (first: the first of them); None if it has none."""
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


def check_lookup(module: nn.Module) -> None:
    """ValueError for an embedding whose ``.grad`` is not the gradient of a loss."""
    if getattr(module, "scale_grad_by_freq", False):
        raise ValueError(
            f"{type(module).__name__}(scale_grad_by_freq=True) divides .grad by how often a token is in the batch: that is no "
            "gradient of a loss and has no curvature; use scale_grad_by_freq=False, or leave the layer out with ignore="
        )


class LayerRule(ABC):
    """Layer rule: how layers of some types enter the curvature, as ``G`` linear maps (o, i)."""

    types: ClassVar[tuple[type[nn.Module], ...]]
    kind: ClassVar[Kind] = "matrix"
    weight_name: ClassVar[str] = "weight"
    transposed: ClassVar[bool] = False  # the weight is stored as (i, o), and so is the block
    inputs_first: ClassVar[bool] = False  # the weight is stored as (i, o), and the block is (o, i) all the same
    rounding: ClassVar[float] = 0.0  # unit roundoff of the layer's arithmetic, if coarser than that of its parameters
    repeats: ClassVar[bool] = False  # the call is made again, with roundings of its own
    multiplies: ClassVar[bool] = False  # its one argument (..., i) gives (..., o): the gradient of the weight is ``g^T a``
    bias_rule: ClassVar[LayerRule | None] = None  # for a bias that is not one more input column: its block is separate

    def knows(self, module: nn.Module) -> bool:
        """Whether a module is of these types; a subclass with a ``forward`` of its own is not."""
        return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in self.types)

    def accepts(self, module: nn.Module) -> bool:
        """Whether this instance behaves as its type says."""
        return True

    def refuses(self, call: Call) -> str | None:
        """Why the rule cannot read a call, whose parameters are then measured without it; None if it can."""
        return None

    def of_outputs(self, module: Any, call: Call, gradients: list[Tensor], layout: Layout) -> Tensor:
        """`gradients` from those of all outputs of a call, of which most layers have one.  # each (k, *output)"""
        return self.gradients(module, call, gradients[0], layout)

    def weight_gradient(self, module: Any, call: Call, g: Tensor) -> Tensor | None:
        """``dL/dW`` of a call by torch's kernel, where `inputs` takes much memory; None: by `inputs`.  g: (*output)"""
        return None

    @abstractmethod
    def shape(self, module: Any) -> tuple[int, int, int]:
        """The weight as a stack of matrices.  # (G, o, i)"""

    @abstractmethod
    def inputs(self, module: Any, call: Call, layout: Layout) -> Tensor | OneHot:
        """Layer inputs ``a``.  # (G, n, r, i)"""

    @abstractmethod
    def gradients(self, module: Any, call: Call, g: Tensor, layout: Layout) -> Tensor:
        """Output gradients ``g``, from the gradient of the layer's output (k, *output).  # (k, G, n, r, o)"""
