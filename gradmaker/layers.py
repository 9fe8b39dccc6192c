"""Layer rules: how one call of a layer becomes inputs ``a`` and output gradients ``g`` with ``dL/dW = sum g a^T``.

This is the only place that knows layer types. A rule writes a layer's weight as ``G`` matrices ``(o, i)``; a bias is one more
column. Norm layers are ``C`` groups of one output with the normalised input as their one feature. To add a layer, write a
rule and list it in `RULES`; `tests/test_layers.py` checks every rule against single-example loops.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker.curvature.evidence import OneHot

__all__ = ["OPAQUE", "RULES", "Call", "Kind", "LayerRule", "rule_for"]

Kind: TypeAlias = Literal["matrix", "embedding", "scale", "generic", "tensor"]
"""What a block of parameters is: a linear map, a lookup table, a norm layer's affine map, anything else, a bare tensor."""

OPAQUE = (nn.MultiheadAttention,)
"""Modules that use their children's parameters without calling the children: hooks on the children would never fire."""


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
        return next(v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor))


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


class LayerRule(ABC):
    """How layers of some types enter the curvature."""

    types: ClassVar[tuple[type[nn.Module], ...]]
    kind: ClassVar[Kind] = "matrix"
    transposed: ClassVar[bool] = False  # the weight is stored as (i, o)

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


class LinearRule(LayerRule):
    types = (nn.Linear,)

    def shape(self, module: nn.Linear) -> tuple[int, int, int]:
        return 1, module.out_features, module.in_features

    def inputs(self, module: nn.Linear, call: Call, n: int) -> Tensor:
        return to_examples(call.input, n, axes=1).unsqueeze(0)

    def gradients(self, module: nn.Linear, call: Call, g: Tensor, n: int) -> Tensor:
        return to_examples(g, n, axes=1, lead=1).unsqueeze(1)


class ConvRule(LayerRule):
    """Convolutions as linear maps of patches, one group a matrix (Grosse & Martens 2016, arXiv:1602.01407, section 3)."""

    types = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def shape(self, module: nn.Conv2d) -> tuple[int, int, int]:
        G = module.groups
        return G, module.out_channels // G, module.in_channels // G * prod(module.kernel_size)

    def inputs(self, module: nn.Conv2d, call: Call, n: int) -> Tensor:
        d = len(module.kernel_size)
        x = call.input if call.input.ndim == d + 2 else call.input.unsqueeze(0)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        for axis, (size, stride, gap) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
            x = x.unfold(2 + axis, (size - 1) * gap + 1, stride)[..., ::gap]
        patches = x.movedim(1, 1 + d).flatten(1, d)  # (N, r, C, *kernel)
        grouped = patches.unflatten(2, (module.groups, -1)).flatten(3)  # (N, r, G, i)
        return to_examples(grouped, n, axes=2).permute(2, 0, 1, 3)

    def gradients(self, module: nn.Conv2d, call: Call, g: Tensor, n: int) -> Tensor:
        d = len(module.kernel_size)
        g = g if g.ndim == d + 3 else g.unsqueeze(1)
        grouped = g.flatten(3).unflatten(2, (module.groups, -1)).permute(0, 1, 4, 2, 3)  # (k, N, r, G, o)
        return to_examples(grouped, n, axes=2, lead=1).permute(0, 3, 1, 2, 4)


class EmbeddingRule(LayerRule):
    """Lookup tables as linear maps of one-hot inputs that are never formed."""

    types = (nn.Embedding,)
    kind = "embedding"
    transposed = True

    def accepts(self, module: nn.Module) -> bool:
        return not getattr(module, "scale_grad_by_freq", False) and getattr(module, "max_norm", None) is None

    def shape(self, module: nn.Embedding) -> tuple[int, int, int]:
        return 1, module.num_embeddings, module.embedding_dim

    def inputs(self, module: nn.Embedding, call: Call, n: int) -> OneHot:
        return OneHot(to_examples(call.input, n, axes=0), module.num_embeddings)

    def gradients(self, module: nn.Embedding, call: Call, g: Tensor, n: int) -> Tensor:
        if module.padding_idx is not None:  # the padding row has no gradient
            g = g * (call.input != module.padding_idx).unsqueeze(-1)
        return to_examples(g, n, axes=1, lead=1).unsqueeze(1)


class NormRule(LayerRule):
    """Affine maps behind a normalisation: channel ``c`` is a group with the one input ``x_hat_c``.

    ``x_hat`` is recomputed from the layer's input, never from its output: a zero scale or an in-place change of the output
    would spoil it. In training mode batch statistics are held fixed, as is usual for per-example quantities.
    """

    kind = "scale"
    channel_first: ClassVar[bool] = True

    @abstractmethod
    def normalise(self, module: Any, call: Call) -> Tensor:
        """The layer's output without scale and bias."""

    def channels(self, module: Any) -> int:
        """``C``: entries of the scale."""
        own = module.weight if module.weight is not None else module.bias
        return int(own.numel())

    def shape(self, module: Any) -> tuple[int, int, int]:
        return self.channels(module), 1, 1

    def _lay_out(self, x: Tensor, n: int, C: int, lead: int) -> Tensor:
        """(*lead, N, ...) -> (*lead, C, n, r, 1)"""
        if self.channel_first:
            x = x.flatten(lead + 2).movedim(lead + 1, -1) if x.ndim > lead + 2 else x.unsqueeze(lead + 1)
        else:
            x = x.reshape(*x.shape[:lead], -1, C) if x.ndim - lead < 2 else _flatten_channels(x, C)
        return to_examples(x, n, axes=1, lead=lead).movedim(-1, lead).unsqueeze(-1)

    def inputs(self, module: Any, call: Call, n: int) -> Tensor:
        return self._lay_out(self.normalise(module, call), n, self.channels(module), lead=0)

    def gradients(self, module: Any, call: Call, g: Tensor, n: int) -> Tensor:
        return self._lay_out(g, n, self.channels(module), lead=1)


def _flatten_channels(x: Tensor, C: int) -> Tensor:
    """Merge the trailing axes that together hold ``C`` channels."""
    last, size = x.ndim, 1
    while size < C:
        last -= 1
        size *= x.shape[last]
    return x.flatten(last)


class BatchNormRule(NormRule):
    types = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

    def normalise(self, module: nn.BatchNorm2d, call: Call) -> Tensor:
        if call.training or module.running_mean is None:
            return F.batch_norm(call.input, None, None, training=True, eps=module.eps)
        return F.batch_norm(call.input, module.running_mean, module.running_var, training=False, eps=module.eps)


class GroupNormRule(NormRule):
    types = (nn.GroupNorm,)

    def normalise(self, module: nn.GroupNorm, call: Call) -> Tensor:
        return F.group_norm(call.input, module.num_groups, eps=module.eps)


class LayerNormRule(NormRule):
    types = (nn.LayerNorm,)
    channel_first = False

    def normalise(self, module: nn.LayerNorm, call: Call) -> Tensor:
        return F.layer_norm(call.input, list(module.normalized_shape), eps=module.eps)


class RMSNormRule(NormRule):
    types = (nn.RMSNorm,)
    channel_first = False

    def normalise(self, module: nn.RMSNorm, call: Call) -> Tensor:
        return F.rms_norm(call.input, list(module.normalized_shape), eps=module.eps)


RULES: tuple[LayerRule, ...] = (
    LinearRule(),
    ConvRule(),
    EmbeddingRule(),
    BatchNormRule(),
    GroupNormRule(),
    LayerNormRule(),
    RMSNormRule(),
)


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule of a module, or None: a subclass with a ``forward`` of its own is not the layer that it inherits from."""
    for rule in RULES:
        for kind in rule.types:
            if isinstance(module, kind) and type(module).forward is kind.forward and rule.accepts(module):
                return rule
    return None
