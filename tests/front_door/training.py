"""A small problem through the front door, and the same by the declared calls with the steps of a loop written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import gradmaker as gm
from tests.models import Case, mlp

STEPS = 6
SPARSE = {"curvature_interval": 2, "preconditioner_interval": 3}
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "kfac": (SPARSE, 0.9),
    "ekfac": (SPARSE, 0.9),
    "shampoo": ({"preconditioner_interval": 2}, 0.9),
    "soap": ({"preconditioner_interval": 2, "damping": 1e-4}, 0.0),
    "muon": ({}, 0.0),
    "adam": ({}, 0.0),
}
"""Options, and the momentum of the base optimizer: none where the method averages gradients itself."""


def batches(case: Case, steps: int = STEPS) -> Iterator[tuple[Tensor, Tensor]]:
    for j in range(steps):
        yield case.x * (1 + 0.1 * j) + 0.05 * j, case.t.roll(j, 0)


def maker_of(case: Case, method: str, **options: Any) -> Any:
    return gm.from_config(case.model, {"method": method, **options})


def sgd(case: Case, lr: float = 0.05, **options: Any) -> Optimizer:
    return torch.optim.SGD(case.model.parameters(), lr, **options)


def front(
    method: str = "kfac", case: Case | None = None, base: Callable[..., Optimizer] = sgd, options: Any = None, **given: Any
) -> tuple[Case, gm.PreconditionedOptimizer]:
    """A model and its optimizer.  base: of a case; options: of the method; given: to the optimizer"""
    case = mlp() if case is None else case
    return case, gm.PreconditionedOptimizer(
        maker_of(case, method, **(options or {})), base(case), **{"likelihood": "categorical", **given}
    )


def backward(case: Case, optimizer: Optimizer, x: Tensor, t: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = case.loss(case.model(x), t)
    loss.backward()
    return loss.detach()


def train(case: Case, optimizer: Optimizer, steps: int = STEPS, start: int = 0) -> list[Tensor]:
    """The parameters after some steps of an ordinary loop."""
    for j, (x, t) in enumerate(batches(case, start + steps)):
        if j >= start:
            backward(case, optimizer, x, t)
            optimizer.step()
    return weights(case)


def weights(case: Case) -> list[Tensor]:
    return [p.detach().clone() for p in case.model.parameters()]


def declared(
    method: str, options: Any = None, momentum: float = 0.0, lr: float = 0.05, max_norm: float | None = None, decay: float = 0.0
) -> list[Tensor]:
    """The parameters after the same steps: declared calls, clipping by torch, decay written out, the same base optimizer."""
    case = mlp()
    maker, optimizer = maker_of(case, method, **(options or {})), sgd(case, lr, momentum=momentum)
    for x, t in batches(case):
        optimizer.zero_grad()
        maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, x), t)
        maker.forward_and_backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(case.model.parameters(), max_norm)
        with torch.no_grad():
            for p in case.model.parameters():
                p -= lr * decay * p
        optimizer.step()
    return weights(case)


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
