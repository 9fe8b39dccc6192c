"""What loops of other libraries are held against: ``P g`` of every step, beside the declared calls on the same batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import gradmaker as gm

METHODS: dict[str, dict[str, Any]] = {
    "kfac": {"lr": 0.02, "damping": 0.1, "curvature_interval": 2, "preconditioner_interval": 2},
    "ekfac": {"lr": 0.02, "damping": 0.1},
    "soap": {"lr": 0.01, "preconditioner_interval": 2},
    "shampoo": {"lr": 0.01},
    "muon": {"lr": 0.01},
    "adam": {"lr": 0.01},
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
        self.optimizer, self.start = optimizer, copy.deepcopy(optimizer.maker.model)
        self.gradients: list[Gradients] = []
        self.rates: list[list[float]] = []
        self.names = {p: name for name, p in optimizer.maker.model.named_parameters()}
        optimizer.base_optimizer.register_step_pre_hook(self._keep)

    def _keep(self, *_: Any) -> None:
        groups = self.optimizer.param_groups
        held = [p for group in groups for p in group["params"]]
        self.gradients.append({self.names[p]: p.grad.clone() for p in held if p.grad is not None})
        self.rates.append([group["lr"] for group in groups])

    def declared(self, steps: Sequence[Sequence[Micro]], declare: Callable[[Any, nn.Module, Any], None]) -> list[Gradients]:
        """``P g`` of each step by the declared protocol, on a copy of the model as it was at the beginning.

        declare: declares the calls of a maker for a model and a batch
        """
        model, source = copy.deepcopy(self.start), self.optimizer.maker
        maker: Any = type(source)(model, source.config)
        own = dict(model.named_parameters())
        groups = [{**g, "params": [own[self.names[p]] for p in g["params"]]} for g in self.optimizer.param_groups]
        base, found = torch.optim.SGD(groups, lr=1.0), []
        for step, rates in zip(steps, self.rates, strict=True):
            base.zero_grad()
            for group, rate in zip(base.param_groups, rates, strict=True):
                group["lr"] = rate
            for micro in step:
                declare(maker, model, micro.batch)
                maker.accumulate(micro.weight)
            maker.precondition()
            found.append({name: p.grad.clone() for name, p in own.items() if p.grad is not None})
            base.step()
        return found


def close(found: list[Gradients], expected: list[Gradients], rtol: float = 1e-10) -> None:
    """The same steps, by the norm of each tensor."""
    assert len(found) == len(expected) > 1
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys() and any(g.any() for g in b.values())
        for name, g in b.items():
            assert (a[name] - g).norm() <= rtol * g.norm(), name


def equal(found: nn.Module, expected: nn.Module) -> bool:
    """Whether two models have the same bits."""
    pairs = zip(found.state_dict().values(), expected.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
