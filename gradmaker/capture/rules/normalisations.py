"""Layer rules of norm layers: their affine map, channel by channel."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker.capture.rules.calls import Call, LayerRule, Layout, to_examples

__all__ = ["BatchNormRule", "GroupNormRule", "LayerNormRule", "RMSNormRule"]


class NormRule(LayerRule):
    """Affine map after a normalisation: channel ``c`` is a group with the one input ``x_hat_c``.

    ``x_hat`` is recomputed from the layer's input, not from its output: a zero scale or an in-place change of the output
    would make that wrong. In training mode batch statistics are held fixed, as is usual for per-example gradients.
    """

    kind = "scale"
    channel_first: ClassVar[bool] = True

    @abstractmethod
    def normalise(self, module: Any, call: Call) -> Tensor:
        """The normalised input ``x_hat``: the layer's output without scale and bias."""

    def channels(self, module: Any) -> int:
        """Number of channels ``C``, the entries of the scale."""
        own = module.weight if module.weight is not None else module.bias
        return int(own.numel())

    def shape(self, module: Any) -> tuple[int, int, int]:
        return self.channels(module), 1, 1

    def _lay_out(self, x: Tensor, layout: Layout, C: int, lead: int) -> Tensor:
        """(*lead, N, ...) -> (*lead, C, n, r, 1)"""
        if self.channel_first:
            x = x.flatten(lead + 2).movedim(lead + 1, -1) if x.ndim > lead + 2 else x.unsqueeze(lead + 1)
        else:
            x = x.reshape(*x.shape[:lead], -1, C) if x.ndim - lead < 2 else _flatten_channels(x, C)
        return to_examples(x, layout, axes=1, lead=lead).movedim(-1, lead).unsqueeze(-1)

    def inputs(self, module: Any, call: Call, layout: Layout) -> Tensor:
        return self._lay_out(self.normalise(module, call), layout, self.channels(module), lead=0)

    def gradients(self, module: Any, call: Call, g: Tensor, layout: Layout) -> Tensor:
        return self._lay_out(g, layout, self.channels(module), lead=1)


def _flatten_channels(x: Tensor, C: int) -> Tensor:
    """Merge the trailing axes that together hold ``C`` channels."""
    last, size = x.ndim, 1
    while size < C:
        last -= 1
        size *= x.shape[last]
    return x.flatten(last)


class BatchNormRule(NormRule):
    """Batch norm: statistics of the batch, or running averages."""

    types = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

    def normalise(self, module: nn.BatchNorm2d, call: Call) -> Tensor:
        if call.training or module.running_mean is None:
            return F.batch_norm(call.input, None, None, training=True, eps=module.eps)
        return F.batch_norm(call.input, module.running_mean, module.running_var, training=False, eps=module.eps)


class GroupNormRule(NormRule):
    """Group norm: statistics over groups of channels."""

    types = (nn.GroupNorm,)

    def normalise(self, module: nn.GroupNorm, call: Call) -> Tensor:
        return F.group_norm(call.input, module.num_groups, eps=module.eps)


class LayerNormRule(NormRule):
    """Layer norm: statistics over the last axes."""

    types = (nn.LayerNorm,)
    channel_first = False

    def normalise(self, module: nn.LayerNorm, call: Call) -> Tensor:
        return F.layer_norm(call.input, list(module.normalized_shape), eps=module.eps)


class RMSNormRule(NormRule):
    """RMS norm: mean square over the last axes."""

    types = (nn.RMSNorm,)
    channel_first = False

    def normalise(self, module: nn.RMSNorm, call: Call) -> Tensor:
        return F.rms_norm(call.input, list(module.normalized_shape), eps=module.eps)
