"""Models of independent positions, with rows in many orders, and gradients of their examples by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import CustomGradientMaker
from gradmaker.curvature import FisherEmp
from gradmaker.representations import Dense, Representation
from tests.measure import custom

N, D, C = 4, 3, 3
FULL = Dense(granularity="full")
Rows = Callable[[nn.Module, Tensor], Tensor]


class Pointwise(nn.Module):
    """A layer for each position, in some order of rows."""

    def __init__(self, rows: Rows, first: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.rows, self.first, self.second, self.drop = rows, first, nn.Linear(5, C), nn.Dropout(dropout)

    def body(self, x: Tensor) -> Tensor:
        z: Tensor = self.second(self.drop(self.first(x).tanh()))
        return z

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(self, x)  # (rows, C)


def flat(z: Tensor) -> Tensor:
    return z.flatten(0, -2)


def features(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


BODY: Any = Pointwise.body
ORDERS: dict[str, tuple[Rows, bool]] = {
    "example first": (lambda m, x: flat(BODY(m, x)), False),
    "example first, layers flat": (lambda m, x: BODY(m, features(x)), False),
    "time first": (lambda m, x: flat(BODY(m, x.transpose(0, 1))), True),
    "time first, layers flat": (lambda m, x: BODY(m, features(x.transpose(0, 1))), True),
    "time first in the loss alone": (lambda m, x: flat(BODY(m, x).transpose(0, 1)), True),
    "layers flat time first, loss example first": (
        lambda m, x: flat(BODY(m, features(x.transpose(0, 1))).unflatten(0, (x.shape[1], -1)).transpose(0, 1)),
        False,
    ),
    "views concatenated": (lambda m, x: BODY(m, torch.cat([x[:, j] for j in range(x.shape[1])])), True),
    "views one by one": (lambda m, x: torch.cat([BODY(m, x[:, j]) for j in range(x.shape[1])]), True),
}
"""How rows are laid out, and whether the loss has positions first."""


def build(name: str, T: int, tokens: bool = False, dropout: float = 0.0) -> tuple[nn.Module, Tensor, Tensor, bool]:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rows, turned = ORDERS[name]
        model = Pointwise(rows, nn.Embedding(11, 5) if tokens else nn.Linear(D, 5), dropout).double()
    x = torch.randint(11, (N, T), generator=generator) if tokens else torch.randn(N, T, D, generator=generator).double()
    return model, x, torch.randint(C, (N, T), generator=generator), turned


def loss_of(turned: bool, reduction: str = "mean") -> Callable[[Tensor, Tensor], Tensor]:
    return lambda z, t: F.cross_entropy(z, (t.T if turned else t).reshape(-1), reduction=reduction)


def declare(maker: Any, model: nn.Module, x: Tensor, t: Tensor, loss: Any) -> None:
    maker.setup_loss_call(loss, maker.setup_model_call(model, x), t)


def held(maker: CustomGradientMaker) -> list[Tensor]:
    return [b.triple.representation.to_dense(b.state) for b in maker.plan.blocks]


def by_examples(maker: Any, model: nn.Module, x: Tensor, t: Tensor, loss: Any, weight: float, M: float) -> Tensor:
    """``M sum_n g_n g_n^T`` with the gradients of the loss of each example by itself, times its weight in the batch."""
    found = []
    for n in range(len(x)):
        g = torch.autograd.grad(weight * loss(model(x[n : n + 1]), t[n : n + 1]), list(model.parameters()))
        values = dict(zip(model.parameters(), g, strict=True))
        found.append(torch.cat([s.lay_out(dict(values)).reshape(-1) for b in maker.plan.blocks for s in b.sites]))
    rows = torch.stack(found)
    return M * rows.T @ rows


def attached(model: nn.Module, representation: Representation, loss: Any, x: Tensor, t: Tensor) -> CustomGradientMaker:
    maker = custom(model, FisherEmp(), representation)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    maker.attach(optimizer, likelihood="categorical")
    loss(model(x), t).backward()
    optimizer.step()
    return maker
