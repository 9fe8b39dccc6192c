"""What goes into layers and comes out of them, by hooks of the oracles' own. Nothing here comes from gradmaker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.zoo.case import Case

LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.BatchNorm2d)


@dataclass(eq=False)
class Watched:
    """A layer, the inputs of its calls, and zeros that were added to its outputs."""

    name: str
    module: Any
    inputs: list[Tensor] = field(default_factory=list)
    shifts: list[Tensor] = field(default_factory=list)

    def own(self, case: Case) -> dict[str, str]:
        """Its trainable parameters: weight, bias -> full name."""
        full = {p: name for name, p in case.parameters().items()}
        return {k: full[p] for k, p in self.module.named_parameters(recurse=False) if k in ("weight", "bias") and p in full}

    def input_rows(self, bias: bool) -> Tensor:
        """(G, r, i), with a column of ones for a bias that is one more input."""
        rows = torch.cat([_inputs(self.module, a) for a in self.inputs], 1)
        return torch.cat([rows, torch.ones_like(rows[..., :1])], -1) if bias else rows

    def output_rows(self, gradients: list[Tensor]) -> Tensor:
        """(G, r, o), in the order of `input_rows`."""
        return torch.cat([_outputs(self.module, g) for g in gradients], 1)


def _inputs(module: Any, a: Tensor) -> Tensor:
    """(G, r, i): positions of one call."""
    if isinstance(module, nn.Embedding):
        return F.one_hot(a.reshape(-1), module.num_embeddings).to(module.weight.dtype).unsqueeze(0)
    if isinstance(module, nn.Linear):
        return a.reshape(1, -1, a.shape[-1])
    if isinstance(module, nn.ConvTranspose2d):
        return a.movedim(1, -1).reshape(1, -1, a.shape[1])
    patches = F.unfold(a, module.kernel_size, module.dilation, module.padding, module.stride)  # (n, channels * kernel, r)
    return patches.movedim(1, -1).reshape(-1, module.groups, patches.shape[1] // module.groups).transpose(0, 1)


def _outputs(module: Any, g: Tensor) -> Tensor:
    """(G, r, o): gradients at the same positions; what a pixel of a transposed convolution reaches is its patch."""
    if isinstance(module, nn.ConvTranspose2d):
        g = F.unfold(g, module.kernel_size, module.dilation, module.padding, module.stride)
        return g.movedim(1, -1).reshape(1, -1, g.shape[1])
    if isinstance(module, (nn.Linear, nn.Embedding)):
        return g.reshape(1, -1, g.shape[-1])
    return g.flatten(2).movedim(1, -1).reshape(-1, module.groups, g.shape[1] // module.groups).transpose(0, 1)


def is_layer(module: nn.Module, kinds: tuple[type, ...]) -> bool:
    """Whether a module is of such a type and has its forward."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


@contextmanager
def watching(model: nn.Module) -> Iterator[list[Watched]]:
    """Layers with what goes in and leaves out of their calls."""
    found = [Watched(name, m) for name, m in model.named_modules() if is_layer(m, LAYERS)]

    def hook_of(layer: Watched) -> Callable[..., Tensor]:
        def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            layer.inputs.append(args[0].detach().clone())
            layer.shifts.append(torch.zeros_like(output, requires_grad=True))
            return output + layer.shifts[-1]

        return record

    handles = [layer.module.register_forward_hook(hook_of(layer)) for layer in found]
    yield found
    for handle in handles:
        handle.remove()


@contextmanager
def held_statistics(model: nn.Module, held: bool) -> Iterator[None]:
    """Batch norms in training mode normalise by the mean and variance of the batch as constants."""

    def normalise(norm: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        rows = args[0].detach().movedim(1, -1).flatten(0, -2)
        mean, variance = rows.mean(0), rows.var(0, correction=0)
        return F.batch_norm(args[0], mean, variance, norm.weight, norm.bias, eps=norm.eps)

    norms = [m for m in model.modules() if held and isinstance(m, _BatchNorm) and m.training]
    handles = [norm.register_forward_hook(normalise) for norm in norms]
    yield
    for handle in handles:
        handle.remove()
