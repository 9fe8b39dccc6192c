"""What recipes are held against: the declared calls on a copy of the model, with clipping and decay written out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradmaker as gm

CLASSES = 3
SPARSE: dict[str, Any] = {"curvature_interval": 2, "preconditioner_interval": 2}
RECIPES: dict[str, dict[str, Any]] = {
    "kfac": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "max_norm": 0.5, "damping": 0.1, **SPARSE},
    "soap": {"lr": 0.01, "weight_decay": 0.1, "max_norm": 0.5, "preconditioner_interval": 2},
}
"""The line of each method, without the model."""


def network() -> nn.Sequential:
    """A small classifier in float64, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, CLASSES))
        return made.double()


def batches(steps: int, size: int = 12, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch number ``start`` and those after it; each depends on its number alone."""
    for j in range(start, start + steps):
        generator = torch.Generator().manual_seed(100 + j)
        x = torch.randn(size, 6, generator=generator, dtype=torch.float64)
        yield x, torch.randint(CLASSES, (size,), generator=generator)


class Declared:
    """The declared protocol with the method and the options of an optimizer, on a copy of its model.

    Each pass is a loss function, the arguments of the model, the target, and the share of the loss in that of the step.
    """

    def __init__(self, optimizer: gm.PreconditionedOptimizer) -> None:
        source = optimizer.maker
        self.model: Any = copy.deepcopy(source.model)
        self.maker: Any = type(source)(self.model, source.config)
        twins = dict(zip(source.model.parameters(), self.model.parameters(), strict=True))
        groups = [{**group, "params": [twins[p] for p in group["params"]]} for group in optimizer.param_groups]
        self.base = torch.optim.SGD(groups, lr=1.0)
        self.max_norm = optimizer.max_norm

    def accumulate(self, loss: Callable[..., Any], x: Any, t: Any, share: float = 1.0) -> None:
        """Measure and differentiate one micro-batch."""
        self.maker.setup_loss_call(loss, self.maker.setup_model_call(self.model, x), t)
        self.maker.accumulate(share)

    def step(self, loss: Callable[..., Any] | None = None, x: Any = None, t: Any = None) -> None:
        """End the step of the passes so far, or of this one."""
        if loss is not None:
            self.accumulate(loss, x, t)
        self.maker.precondition()
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        decays = [group["weight_decay"] for group in self.base.param_groups]
        with torch.no_grad():
            for group in self.base.param_groups:
                for p in group["params"]:
                    p *= 1 - group["lr"] * group["weight_decay"]
                group["weight_decay"] = 0.0
        self.base.step()
        for group, decay in zip(self.base.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        self.base.zero_grad()


def weights(model: nn.Module) -> list[Tensor]:
    return [v.detach().clone() for v in model.state_dict().values()]


def close(found: nn.Module, expected: nn.Module, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(weights(found), weights(expected), rtol=rtol, atol=1e-11)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def moved(model: nn.Module, start: list[Tensor]) -> bool:
    return not torch.allclose(weights(model)[0], start[0], atol=1e-4)


def through_file(state: Any, folder: Path) -> Any:
    """Saved and loaded as torch's tutorials do it."""
    torch.save(state, folder / "checkpoint.pt")
    return torch.load(folder / "checkpoint.pt", weights_only=True)
