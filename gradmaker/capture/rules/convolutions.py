"""Layer rules of convolutions and transposed convolutions: linear maps of patches, one matrix for each group."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker.capture.patches import Patches, Window
from gradmaker.capture.rules.calls import Call, LayerRule, Layout, batch_first

__all__ = ["ConvRule", "ConvTransposeRule"]


def _batched(module: Any, x: Tensor, lead: int = 0) -> Tensor:
    """The tensor with a batch axis, which torch's convolutions make optional.  # (*lead, N, C, *space)"""
    return x if x.ndim == lead + 2 + len(module.kernel_size) else x.unsqueeze(lead)


def _patches(module: Any, x: Tensor, lead: int = 0) -> Tensor:
    """The patch under the kernel at each position.  # (*lead, N, C, *positions, *kernel)"""
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


def _as_inputs(grouped: Tensor, layout: Layout) -> Tensor:
    """(N, r, G, i) -> (G, n, r, i)"""
    return batch_first(grouped, layout, axes=2).permute(2, 0, 1, 3)


def _as_gradients(grouped: Tensor, layout: Layout) -> Tensor:
    """(k, N, r, G, o) -> (k, G, n, r, o)"""
    return batch_first(grouped, layout, axes=2, lead=1).permute(0, 3, 1, 2, 4)


def _weight_gradient(module: Any, x: Tensor, g: Tensor, padding: list[int], extra: list[int] | None) -> Tensor:
    """``dL/dW`` by torch's kernel.  extra: the output padding of a transposed convolution; None: not transposed"""
    d = len(module.kernel_size)
    found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        g, x.to(g.dtype), module.weight.detach().to(g.dtype), None, list(module.stride), padding, list(module.dilation),
        extra is not None, extra or [0] * d, module.groups, [False, True, False],
    )  # fmt: skip
    return found[1]


def _window(module: Any) -> Window | None:
    """The kernel and the padding of a convolution of images whose patches need not be formed; None for others."""
    plain = len(module.kernel_size) == 2 and module.groups == 1 and module.padding_mode == "zeros"
    if not plain or any(x != 1 for x in (*module.stride, *module.dilation)):
        return None
    left, right, above, below = module._reversed_padding_repeated_twice
    return Window(tuple(module.kernel_size), (above, below), (left, right))


class ConvRule(LayerRule):
    """Convolutions as linear maps of patches, one matrix a group (Grosse & Martens 2016, arXiv:1602.01407, section 3)."""

    types = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def shape(self, module: nn.Conv2d) -> tuple[int, int, int]:
        G = module.groups
        return G, module.out_channels // G, module.in_channels // G * prod(module.kernel_size)

    def inputs(self, module: nn.Conv2d, call: Call, layout: Layout) -> Tensor:
        def form() -> Tensor:
            return _as_inputs(_grouped(module, _patches(module, self._padded(module, call))), layout)

        images = _batched(module, call.input)
        window = _window(module)
        if window is None or len(images) % layout.count or layout.order == "second" or not window.pays(images):
            return form()
        return Patches(images, window, form, layout.count)

    def _padded(self, module: nn.Conv2d, call: Call) -> Tensor:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return F.pad(_batched(module, call.input), module._reversed_padding_repeated_twice, mode=mode)

    def weight_gradient(self, module: nn.Conv2d, call: Call, g: Tensor) -> Tensor:
        return _weight_gradient(module, self._padded(module, call), _batched(module, g), [0] * len(module.kernel_size), None)

    def gradients(self, module: nn.Conv2d, call: Call, g: Tensor, layout: Layout) -> Tensor:
        return _as_gradients(_pointwise(module, _batched(module, g, lead=1), lead=1), layout)


class ChannelRule(LayerRule):
    """The bias of a transposed convolution: one number for each channel, added at every position of the output."""

    types = ()

    def shape(self, module: nn.ConvTranspose2d) -> tuple[int, int, int]:
        return 1, module.out_channels, 0

    def inputs(self, module: nn.ConvTranspose2d, call: Call, layout: Layout) -> Tensor:
        positions = prod(call.shapes[0]) // (module.out_channels * layout.count)
        return call.input.new_zeros(1, layout.count, positions, 0)

    def gradients(self, module: nn.ConvTranspose2d, call: Call, g: Tensor, layout: Layout) -> Tensor:
        rows = _batched(module, g, lead=1).flatten(3).mT  # (k, N, r, o)
        return batch_first(rows, layout, axes=1, lead=1).unsqueeze(1)


class ConvTransposeRule(LayerRule):
    """Transposed convolutions: `ConvRule` with its sides swapped, as the layer is a convolution's transpose.

    The input ``a`` of a position is its vector of channels, and ``g`` the patch of output gradients that it reaches, channels
    times kernel. Blocks have the layout of the weight, (i, o): units are input channels.
    """

    types = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    transposed = True
    bias_rule = ChannelRule()

    def shape(self, module: nn.ConvTranspose2d) -> tuple[int, int, int]:
        G = module.groups
        return G, module.in_channels // G, module.out_channels // G * prod(module.kernel_size)

    def weight_gradient(self, module: nn.ConvTranspose2d, call: Call, g: Tensor) -> Tensor:
        x, g = _batched(module, call.input), _batched(module, g)
        padding = [int(p) for p in module.padding]  # transposed convolutions have no modes of padding by name
        extra = []
        for j, (stride, kernel) in enumerate(zip(module.stride, module.kernel_size, strict=True)):
            reached = (x.shape[j + 2] - 1) * stride - 2 * padding[j] + module.dilation[j] * (kernel - 1) + 1
            extra.append(g.shape[j + 2] - reached)
        return _weight_gradient(module, x, g, padding, extra)

    def inputs(self, module: nn.ConvTranspose2d, call: Call, layout: Layout) -> Tensor:
        return _as_inputs(_pointwise(module, _batched(module, call.input)), layout)

    def gradients(self, module: nn.ConvTranspose2d, call: Call, g: Tensor, layout: Layout) -> Tensor:
        padded = F.pad(_batched(module, g, lead=1), module._reversed_padding_repeated_twice)
        patches = _patches(module, padded, lead=1)
        space = _batched(module, call.input).shape[2:]
        for axis, size in enumerate(space, start=3):  # output padding may add patches without an input position
            patches = patches.narrow(axis, 0, size)
        return _as_gradients(_grouped(module, patches, lead=1), layout)
