"""Layer rules of libraries that are not imported here: layers are found by the name of the class that defines ``forward``.

A qualified name stands for one class. A part of a name, as ``RMSNorm``, stands for a family; a module belongs to it if calls
on random inputs show that its output is affine in weight and bias, channel by channel.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradmaker.capture.exchange import exchanged, with_storage
from gradmaker.capture.rules.calls import Call, LayerRule, Layout, to_examples
from gradmaker.capture.rules.normalisations import NormRule

__all__ = [
    "NAMED_RULES",
    "Conv1DRule",
    "ImageLayerScaleRule",
    "LayerScaleRule",
    "NamedImageNormRule",
    "NamedNormRule",
]

SINGLE = torch.finfo(torch.float32).eps


def _definer(module: nn.Module) -> type:
    """The class that defines a module's ``forward``; `nn.Module` where the instance has a ``forward`` of its own."""
    if "forward" in vars(module):
        return nn.Module
    return next(kind for kind in type(module).__mro__ if "forward" in vars(kind))


class Conv1DRule(LayerRule):
    """The linear layer of GPT-2 in Hugging Face's transformers, whose weight is that of `nn.Linear` transposed."""

    types = ()
    inputs_first = True
    multiplies = True
    names: ClassVar[tuple[str, ...]] = ("transformers.pytorch_utils.Conv1D", "transformers.modeling_utils.Conv1D")

    def knows(self, module: nn.Module) -> bool:
        own = _definer(module)
        return f"{own.__module__}.{own.__qualname__}" in self.names

    def shape(self, module: Any) -> tuple[int, int, int]:
        i, o = module.weight.shape
        return 1, o, i

    def inputs(self, module: Any, call: Call, layout: Layout) -> Tensor:
        return to_examples(call.input, layout, axes=1).unsqueeze(0)

    def gradients(self, module: Any, call: Call, g: Tensor, layout: Layout) -> Tensor:
        return to_examples(g, layout, axes=1, lead=1).unsqueeze(1)


class NamedNormRule(NormRule):
    """Norm layers of any library: ``x_hat = y(weight=1, bias=0) - y(weight=0, bias=0)`` of the layer's own ``forward``.

    The arithmetic is the layer's own, with its roundings to float32, and the same for ``weight x_hat`` (Llama, T5) as for
    ``(1 + weight) x_hat`` (Gemma). A layer without this form has no rule.
    """

    types = ()
    channel_first = False
    names: ClassVar[tuple[str, ...]] = ("LayerNorm", "RMSNorm", "RmsNorm", "GroupNorm", "SimpleNorm")
    rounding = SINGLE

    def knows(self, module: nn.Module) -> bool:
        return any(name in _definer(module).__name__ for name in self.names)

    def accepts(self, module: nn.Module) -> bool:
        own = dict(module.named_parameters())
        if not {self.weight_name} <= set(own) <= {self.weight_name, "bias"} or any(
            p.ndim != 1 or p.is_complex() for p in own.values()
        ):
            return False
        given = with_storage(module)
        try:
            with given.get_parameter(self.weight_name).device:  # whatever the default device is
                return self._proven(given)
        except Exception:  # of the module's own code: its forward takes something else
            return False

    def _proven(self, module: Any) -> bool:
        """Whether random parameters give ``y(0, 0) + weight x_hat + bias`` on a random input, and leave it unchanged."""
        p, random = module.get_parameter(self.weight_name), torch.Generator().manual_seed(0)
        C = len(p)
        a, b = (2, 3) if C > 3 else (4, 5)  # no other axis has the length of the channel axis
        shape = (a, C, a, b) if self.channel_first else (a, b, C)
        x, weight, bias = (torch.randn(s, generator=random, device="cpu").to(p) for s in (shape, (C,), (C,)))
        given = x.clone()
        zero, one, found = (self._output(module, (given,), {}, *w) for w in ((0.0, 0.0), (1.0, 0.0), (weight, bias)))
        if found.shape != x.shape or not torch.equal(given, x):  # an overwritten input cannot be used again
            return False
        lined = (C, 1, 1) if self.channel_first else (C,)
        expected = zero + weight.reshape(lined) * (one - zero)
        if getattr(module, "bias", None) is not None:
            expected = expected + bias.reshape(lined)
        eps = max(SINGLE, torch.finfo(p.dtype).eps)
        return 0 < float(expected.abs().max()) and float((found - expected).abs().max()) <= 16 * eps * float(
            expected.abs().max()
        )

    def normalise(self, module: Any, call: Call) -> Tensor:
        device = call.input.device.type
        cast: AbstractContextManager[Any] = nullcontext()
        if call.autocast is not None:
            cast = torch.autocast(device, call.autocast, cache_enabled=False)
        with cast:
            zero, one = (self._output(module, call.args, call.kwargs, w, 0.0) for w in (0.0, 1.0))
        return one - zero

    @torch.no_grad()
    def _output(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], weight: Tensor | float, bias: Tensor | float
    ) -> Tensor:
        """The output of a module with other parameters, by its ``forward``, so that no hook runs."""
        pairs = (module.get_parameter(self.weight_name), weight), (getattr(module, "bias", None), bias)
        with exchanged(module, {p: torch.zeros_like(p) + value for p, value in pairs if p is not None}):
            out: Tensor = module.forward(*args, **kwargs)
        return out


class NamedImageNormRule(NamedNormRule):
    """`NamedNormRule` with the channels on the second axis."""

    channel_first = True


class LayerScaleRule(NamedNormRule):
    """LayerScale of timm's vision transformers, ``gamma x``, as the scale of a norm layer."""

    names = ("LayerScale",)
    weight_name = "gamma"

    def channels(self, module: Any) -> int:
        return len(module.gamma)


class ImageLayerScaleRule(LayerScaleRule):
    """`LayerScaleRule` with the channels on the second axis."""

    channel_first = True


NAMED_RULES: tuple[type[LayerRule], ...] = (
    Conv1DRule,
    NamedImageNormRule,
    NamedNormRule,
    ImageLayerScaleRule,
    LayerScaleRule,
)
"""In the order of registration: at one channel, where both layouts can be proven, the last axis is the one of channels."""
