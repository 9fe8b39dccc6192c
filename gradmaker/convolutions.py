"""Rules of convolutions and transposed convolutions: linear maps of patches, one group a matrix."""

from __future__ import annotations

from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker.calls import Call, LayerRule, batch_first

__all__ = ["ConvRule", "ConvTransposeRule"]


def _batched(module: Any, x: Tensor, lead: int = 0) -> Tensor:
    """With a batch axis, which a convolution lets its caller leave out.  # (*lead, N, C, *space)"""
    return x if x.ndim == lead + 2 + len(module.kernel_size) else x.unsqueeze(lead)


def _patches(module: Any, x: Tensor, lead: int = 0) -> Tensor:
    """What a kernel sees at each of its positions.  # (*lead, N, C, *positions, *kernel)"""
    steps = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for axis, (size, stride, gap) in enumerate(steps, start=lead + 2):
        x = x.unfold(axis, (size - 1) * gap + 1, stride)[..., ::gap]
    return x


def _grouped(module: Any, patches: Tensor, lead: int = 0) -> Tensor:
    """Channels and kernel of a group as one feature axis.  # (*lead, N, r, G, features)"""
    d = len(module.kernel_size)
    rows = patches.movedim(lead + 1, lead + 1 + d).flatten(lead + 1, lead + d)  # (*lead, N, r, C, *kernel)
    grouped: Tensor = rows.unflatten(lead + 2, (module.groups, -1)).flatten(lead + 3)
    return grouped


def _pointwise(module: Any, x: Tensor, lead: int = 0) -> Tensor:
    """The channels at each position.  # (*lead, N, r, G, C / G)"""
    grouped: Tensor = x.flatten(lead + 2).mT.unflatten(-1, (module.groups, -1))
    return grouped


def _as_inputs(grouped: Tensor, n: int) -> Tensor:
    """(N, r, G, i) -> (G, n, r, i)"""
    return batch_first(grouped, n, axes=2).permute(2, 0, 1, 3)


def _as_gradients(grouped: Tensor, n: int) -> Tensor:
    """(k, N, r, G, o) -> (k, G, n, r, o)"""
    return batch_first(grouped, n, axes=2, lead=1).permute(0, 3, 1, 2, 4)


class ConvRule(LayerRule):
    """Convolutions as linear maps of patches, one group a matrix (Grosse & Martens 2016, arXiv:1602.01407, section 3)."""

    types = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def shape(self, module: nn.Conv2d) -> tuple[int, int, int]:
        G = module.groups
        return G, module.out_channels // G, module.in_channels // G * prod(module.kernel_size)

    def inputs(self, module: nn.Conv2d, call: Call, n: int) -> Tensor:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(_batched(module, call.input), module._reversed_padding_repeated_twice, mode=mode)
        return _as_inputs(_grouped(module, _patches(module, x)), n)

    def gradients(self, module: nn.Conv2d, call: Call, g: Tensor, n: int) -> Tensor:
        return _as_gradients(_pointwise(module, _batched(module, g, lead=1), lead=1), n)


class ChannelRule(LayerRule):
    """The bias of a transposed convolution: one number a channel, added at every position of the output."""

    types = ()

    def shape(self, module: nn.ConvTranspose2d) -> tuple[int, int, int]:
        return 1, module.out_channels, 0

    def inputs(self, module: nn.ConvTranspose2d, call: Call, n: int) -> Tensor:
        return call.input.new_zeros(1, n, prod(call.shapes[0][2:]), 0)

    def gradients(self, module: nn.ConvTranspose2d, call: Call, g: Tensor, n: int) -> Tensor:
        rows = _batched(module, g, lead=1).flatten(3).mT  # (k, N, r, o)
        return batch_first(rows, n, axes=1, lead=1).unsqueeze(1)


class ConvTransposeRule(LayerRule):
    """Transposed convolutions: `ConvRule` with its sides swapped, as the layer is a convolution's transpose.

    An input position is a vector ``a`` of channels, and ``g`` is the patch of output gradients that it reaches, channels times
    kernel. Blocks are laid out as the weight is, (i, o): units are input channels.
    """

    types = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    transposed = True
    bias_rule = ChannelRule()

    def shape(self, module: nn.ConvTranspose2d) -> tuple[int, int, int]:
        G = module.groups
        return G, module.in_channels // G, module.out_channels // G * prod(module.kernel_size)

    def inputs(self, module: nn.ConvTranspose2d, call: Call, n: int) -> Tensor:
        return _as_inputs(_pointwise(module, _batched(module, call.input)), n)

    def gradients(self, module: nn.ConvTranspose2d, call: Call, g: Tensor, n: int) -> Tensor:
        padded = F.pad(_batched(module, g, lead=1), module._reversed_padding_repeated_twice)
        patches = _patches(module, padded, lead=1)
        space = _batched(module, call.input).shape[2:]
        for axis, size in enumerate(space, start=3):  # output padding may leave room for windows of no input position
            patches = patches.narrow(axis, 0, size)
        return _as_gradients(_grouped(module, patches, lead=1), n)
