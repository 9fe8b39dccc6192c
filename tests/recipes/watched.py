"""What loops of other libraries are held against: ``P g`` of every step, beside the declared calls on the same batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import gradmaker as gm
from tests.recipes.protocol import Declared, same, weights

METHODS: dict[str, dict[str, Any]] = {
    "kfac": {"lr": 0.02, "weight_decay": 0.1, "damping": 0.1, "curvature_interval": 2, "preconditioner_interval": 2},
    "ekfac": {"lr": 0.02, "weight_decay": 0.1, "damping": 0.1},
    "soap": {"lr": 0.01, "weight_decay": 0.1, "preconditioner_interval": 2},
    "shampoo": {"lr": 0.01, "weight_decay": 0.1},
    "muon": {"lr": 0.01, "weight_decay": 0.1},
    "adam": {"lr": 0.01, "weight_decay": 0.1},
}
"""The line of each method, without the model."""

Gradients = dict[str, Tensor]


class Micro(NamedTuple):
    """One backward pass of a step."""

    batch: Any
    weight: float  # of its loss in that of the step


class Watch:
    """What the base optimizer steps along at each of its steps, and the learning rates of its groups."""

    def __init__(self, optimizer: gm.PreconditionedOptimizer) -> None:
        self.optimizer, self.twin = optimizer, Declared(optimizer)
        self.gradients: list[Gradients] = []
        self.rates: list[list[float]] = []
        optimizer.base_optimizer.register_step_pre_hook(self._keep)

    def _keep(self, *_: Any) -> None:
        self.gradients.append(gradients(self.optimizer.maker.model, self.optimizer))
        self.rates.append([group["lr"] for group in self.optimizer.param_groups])

    def declared(self, steps: Sequence[Sequence[Micro]], declare: Callable[[Any, nn.Module, Any], None]) -> list[Gradients]:
        """The same by the declared protocol, on a copy of the model as it was at the beginning.

        declare: declares the calls of a maker for a model and a batch
        """
        twin, found = self.twin, list[Gradients]()
        twin.base.register_step_pre_hook(lambda *_: found.append(gradients(twin.model, twin.base)))
        for step, rates in zip(steps, self.rates, strict=True):
            for group, rate in zip(twin.base.param_groups, rates, strict=True):
                group["lr"] = rate
            for micro in step:
                declare(twin.maker, twin.model, micro.batch)
                twin.maker.accumulate(micro.weight)
            twin.step()
        return found


def gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> Gradients:
    """Copies of the gradients of an optimizer, by parameter name."""
    held = {p for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    return {name: p.grad.clone() for name, p in model.named_parameters() if p in held and p.grad is not None}


def close(found: list[Gradients], expected: list[Gradients], rtol: float = 1e-10) -> None:
    """The same steps, by the norm of each tensor."""
    assert len(found) == len(expected) > 1
    for j, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.keys() == b.keys() and (j == 0 or any(g.any() for g in b.values()))  # SOAP leaves the first step out
        for name, g in b.items():
            assert (a[name] - g).norm() <= rtol * g.norm(), name


def equal(found: nn.Module, expected: nn.Module) -> bool:
    """Whether two models have the same bits."""
    return same(weights(found), weights(expected))
