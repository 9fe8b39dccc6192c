"""Batch norm in training mode with mean and variance as constants, so that the gradients of examples do not mix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["FrozenNorms", "batch_moments", "mixes"]


def mixes(module: nn.Module) -> bool:
    """Whether a module normalises by the mean and variance of its batch."""
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel, as batch norm computes them, at least in float32.  # (n, c, ...) -> (c,), (c,)"""
    rows = x.detach().movedim(1, -1).flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32))
    return rows.mean(0), rows.var(0, correction=0)


class FrozenNorms:
    """Gradients through batch norms with statistics held fixed: ``dx = dy * weight / sqrt(variance + eps)``.

    Hooks on the autograd nodes of batch norms replace the input gradient inside of `held`; elsewhere they do nothing.
    """

    def __init__(self) -> None:
        self._held = False
        self.seen = False  # whether any batch norm was called

    def watch(self, root: nn.Module, stack: ExitStack) -> None:
        """Hook all batch norms that use batch statistics, until the stack is closed."""
        for module in root.modules():
            if mixes(module):
                stack.callback(module.register_forward_hook(self._called).remove)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context in which batch statistics are constants."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    def _called(self, module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        node = output.grad_fn if torch.is_grad_enabled() else None
        if node is None or "BatchNorm" not in node.name():
            return
        self.seen = True
        x, weight, eps = args[0].detach(), module.weight, module.eps
        scale: list[Tensor] = []

        def exchange(inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...] | None:
            if not self._held or not inputs or inputs[0] is None:
                return None
            if not scale:
                rate = (batch_moments(x)[1] + eps).rsqrt()
                rate = rate if weight is None else rate * weight.detach()
                scale.append(rate.view(-1, *[1] * (x.ndim - 2)))
            return (outputs[0] * scale[0].to(outputs[0].dtype), *inputs[1:])

        node.register_hook(exchange)
