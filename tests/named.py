"""Layers of other libraries, written out under the names that they have there. Nothing here imports gradmaker."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import CLASSES, Case, build


class Conv1D(nn.Module):
    """The linear layer of GPT-2."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / nx**0.5), nn.Parameter(0.1 * torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


Conv1D.__module__ = "transformers.pytorch_utils"


class OwnConv1D(Conv1D):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.mT.square(), self.bias)


OwnConv1D.__module__ = "transformers.pytorch_utils"


def root_mean_square(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class LlamaRMSNorm(nn.Module):
    """Of Llama, Qwen, Mistral; T5's is the same."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * root_mean_square(x)


class T5LayerNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return root_mean_square(x) * self.weight


class GemmaRMSNorm(LlamaRMSNorm):
    """Its weight is what is added to one."""

    def forward(self, x: Tensor) -> Tensor:
        return root_mean_square(x) * (1 + self.weight)


class GatedRMSNorm(LlamaRMSNorm):
    """What it multiplies by is a further input, which a call may leave out (Mamba)."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return self.weight * root_mean_square(x if gate is None else x * F.silu(gate))


class SquaredRMSNorm(LlamaRMSNorm):
    """Has the name and is none."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.square() * root_mean_square(x)


class RolledRMSNorm(LlamaRMSNorm):
    """Linear in its weight, but a channel is scaled by its neighbour's."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.roll(1) * root_mean_square(x)


class LayerNorm2d(nn.LayerNorm):
    """Of timm and torchvision: over the channels on the second axis."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.movedim(-1, 1)


class LayerNorm(nn.LayerNorm):
    """Of timm."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class LayerScale(nn.Module):
    """Of timm's vision transformers; in place where it is asked for."""

    def __init__(self, d: int, inplace: bool = False) -> None:
        super().__init__()
        self.gamma, self.inplace = nn.Parameter(torch.ones(d)), inplace

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


class LayerScale2d(LayerScale):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.view(1, -1, 1, 1)


class OwnNorm(LayerNorm):
    """A subclass with a forward of its own, and no name that would say something."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x).square()
        return y


class Layered(nn.Module):
    """Linear, the layer, tanh, mean over the positions, Linear; ``second``: the layer has the channels on the second axis."""

    def __init__(self, layer: nn.Module, width: int, second: bool = False, gated: bool = False) -> None:
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(4, 4), layer, nn.Linear(width, CLASSES)
        self.second, self.gated = second, gated

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        given = (h, h.roll(1, -1)) if self.gated else (h.movedim(-1, 1),) if self.second else (h,)
        h = torch.tanh(self.layer(*given))
        h = h.movedim(1, -1) if self.second else h
        z: Tensor = self.head(h.flatten(1, -2).mean(1))
        return z


def moved(layer: nn.Module) -> nn.Module:
    """With its parameters off their special values."""
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return layer


def layered(
    make: Callable[[], nn.Module], width: int = 4, images: bool = False, second: bool = False, gated: bool = False
) -> Case:
    size = (4, 2, 3, 4) if images else (4, 3, 4)
    return build(lambda: Layered(moved(make()), width, second, gated), *size)


def as_linear(layer: nn.Module) -> nn.Linear:
    """What a `Conv1D` computes."""
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    made = nn.Linear(*weight.shape, dtype=weight.dtype)
    with torch.no_grad():
        made.weight.copy_(weight.mT)
        made.bias.copy_(bias)
    return made


NAMED: dict[str, Callable[[], Case]] = {
    "Conv1D of GPT-2": partial(layered, lambda: Conv1D(5, 4), 5),
    "RMSNorm of Llama": partial(layered, lambda: LlamaRMSNorm(4)),
    "RMSNorm of T5": partial(layered, lambda: T5LayerNorm(4)),
    "RMSNorm of Gemma, 1 + weight": partial(layered, lambda: GemmaRMSNorm(4)),
    "RMSNorm with a gate": partial(layered, lambda: GatedRMSNorm(4), gated=True),
    "LayerNorm of timm": partial(layered, lambda: LayerNorm(4)),
    "LayerNorm2d of timm": partial(layered, lambda: LayerNorm2d(4), images=True, second=True),
    "LayerNorm2d of timm, bias=False": partial(layered, lambda: LayerNorm2d(4, bias=False), images=True, second=True),
    "LayerScale of timm": partial(layered, lambda: LayerScale(4)),
    "LayerScale2d of timm": partial(layered, lambda: LayerScale2d(4), images=True, second=True),
}
"""Layers that have a rule."""
OTHERS: dict[str, Callable[[], Case]] = {
    "subclass of Conv1D": partial(layered, lambda: OwnConv1D(5, 4), 5),
    "squared": partial(layered, lambda: SquaredRMSNorm(4)),
    "rolled": partial(layered, lambda: RolledRMSNorm(4)),
    "subclass of LayerNorm": partial(layered, lambda: OwnNorm(4)),
}
"""Layers that look as if they had one."""
