"""Replay of the declared calls of a step: at other weights, on the same batch, with the same random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradmaker.capture.borrowing import borrowing
from gradmaker.capture.exchange import copies, exchanged
from gradmaker.reentrant import refuse_reentrant

__all__ = ["Replay", "in_modes"]


@contextmanager
def in_modes(modes: Mapping[nn.Module, bool]) -> Iterator[None]:
    """Context in which modules have the given training modes: a step may be replayed after ``eval()``."""
    now = {m: m.training for m in modes}
    try:
        for m, training in modes.items():
            m.training = training
        yield
    finally:
        for m, training in now.items():
            m.training = training


class Replay:
    """A forward pass that can be repeated: weights, buffers and the random state stay unchanged."""

    def __init__(self, model: nn.Module, function: Callable[[], tuple[Any, Tensor]], examples: int | None = None) -> None:
        """function: returns the model's output and the loss; it is repeated with the present random state and training modes.

        examples: number of examples in the function's batch, if known
        """
        self.model, self.function, self.examples = model, function, examples
        indices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
        self._devices = sorted(i for i in indices if i is not None)
        self._modes = {m: m.training for m in model.modules()}
        self._cpu_state = torch.get_rng_state()
        self._cuda_states = [torch.cuda.get_rng_state(d) for d in self._devices]

    def run(self, tensors: Mapping[nn.Parameter, Tensor] | None = None) -> tuple[Any, Tensor]:
        """The model's output and the loss, in the graph, with ``tensors`` in place of parameters."""
        other: dict[Any, Tensor] = {**copies(self.model), **(tensors or {})}
        with torch.random.fork_rng(devices=self._devices), in_modes(self._modes), borrowing(), exchanged(self.model, other):
            torch.set_rng_state(self._cpu_state)
            for device, state in zip(self._devices, self._cuda_states, strict=True):
                torch.cuda.set_rng_state(state, device)
            return self.function()

    @torch.no_grad()
    def loss_at(self, displacement: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """The loss at ``theta + displacement``.  # ()"""
        return self.run({p: p + d for p, d in displacement.items()})[1]

    def loss_and_gradient_at(self, displacement: Mapping[nn.Parameter, Tensor]) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
        """The loss at ``theta + displacement`` and its gradient there, for all trainable parameters.  # (), ..."""
        moved = {p: p.detach() for p in self.model.parameters() if p.requires_grad}
        moved = {p: (v + displacement[p] if p in displacement else v).requires_grad_() for p, v in moved.items()}
        with torch.enable_grad():
            loss = self.run(moved)[1]
            refuse_reentrant(loss)
            found = torch.autograd.grad(loss, list(moved.values()), allow_unused=True)
        return loss.detach(), {p: torch.zeros_like(p) if g is None else g for p, g in zip(moved, found, strict=True)}

    def gradient_at(self, displacement: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """The gradient of the loss at ``theta + displacement``."""
        return self.loss_and_gradient_at(displacement)[1]
