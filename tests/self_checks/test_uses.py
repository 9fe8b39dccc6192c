"""The calls of a layer are all uses of its parameters, or its parameters are measured by derivatives of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import Case
from tests.self_checks.planted import (
    BLOCKS,
    Planted,
    build,
    falls_back,
    is_an_error,
    is_right_in_silence,
    is_wrong_without,
    labels,
)

N = 5
Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Layers of several kinds; how they are used is given."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.use = forward
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def net(forward: Forward, prepare: Callable[[Net], None] | None = None) -> Case:
    def make() -> nn.Module:
        model = Net(forward)
        with torch.no_grad():
            model.norm.weight.add_(0.3 * torch.randn(3))
        if prepare is not None:
            prepare(model)
        return model

    return build(make, N, 3, loss=F.cross_entropy, t=labels(N))


# --- uses that no call shows ----------------------------------------------------------------------------------------------
def beside(strength: float, m: Net, x: Tensor) -> Tensor:
    """A functional use beside the module's own."""
    h = torch.tanh(m.body(x))
    return m.head(h) + strength * F.linear(h, m.body.weight)


def transposed(m: Net, x: Tensor) -> Tensor:
    """A tied decoder."""
    return m.head(x) + F.linear(m.norm(torch.tanh(m.body(x))), m.body.weight.t())


def penalised(m: Net, x: Tensor) -> Tensor:
    """The spectrum of a weight goes into what is returned."""
    return m.head(m.norm(m.body(x))) + 0.1 * m.body.weight.square().sum(1)


def by_forward(m: Net, x: Tensor) -> Tensor:
    """`forward` itself runs no hooks."""
    return m.head(torch.tanh(m.body.forward(m.norm(x))))


def once_by_forward(m: Net, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.body.forward(torch.tanh(m.body(m.norm(x))))))


def scaled_norm(m: Net, x: Tensor) -> Tensor:
    return m.head(m.norm(torch.tanh(m.body(x)))) * m.norm.weight


def bias_beside(m: Net, x: Tensor) -> Tensor:
    return m.head(m.norm(torch.tanh(m.body(x))) * m.body.bias)


def input_gradient(m: Net, x: Tensor) -> Tensor:
    """A derivative by the input is part of the output: the weights enter through double backward."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        y = m.head(torch.tanh(m.norm(m.body(x))))
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return y + slope


def plain(m: Net, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.norm(m.body(x))))


def hooked(m: Net) -> None:
    """A user's hook that changes the output."""
    m.body.register_forward_hook(lambda module, args, y: 2 * y)


def hooked_by_weight(m: Net) -> None:
    m.head.register_forward_hook(lambda module, args, y: y + 0.5 * F.linear(args[0].cos(), module.weight))


class Filter(nn.Module):
    """A convolution whose kernel is used once more, as by a symmetric filter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) + F.conv2d(x, self.conv.weight.flip(-1))
        return self.head(torch.tanh(y).flatten(1))


class Words(nn.Module):
    """A language model whose head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        index = (x[:, 0] * 7).long().abs() % 4
        return F.linear(torch.tanh(self.mix(self.table(index))), self.table.weight)


class Looks(nn.Module):
    """Attention whose value projection is used by hand as well."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.head = nn.MultiheadAttention(2, 1, batch_first=True), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attend(x, x, x)[0] + F.linear(x, self.attend.in_proj_weight[4:])
        return self.head(torch.tanh(y).mean(1))


class OwnCell(nn.LSTMCell):
    """With a ``forward`` of its own it has no rule."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        return super().forward(x, state)


class Cell(nn.Module):
    """A cell whose two outputs are both used, of which one is made of the other inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = OwnCell(3, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, c = self.cell(x)
        h, c = self.cell(x, (h, c))
        return self.head(torch.cat([h, c], 1))


def other(make: Callable[[], nn.Module], *size: int, classes: int = 3) -> Case:
    return build(make, *size, loss=F.cross_entropy, t=labels(size[0], classes))


PLANTED = {
    "functional 1": Planted(lambda: net(partial(beside, 1.0)), "body.weight"),
    "functional 1e-4": Planted(lambda: net(partial(beside, 1e-4)), "body.weight"),
    "tied by hand": Planted(lambda: net(transposed), "body.weight"),
    "penalty in the output": Planted(lambda: net(penalised), "body.weight"),
    "forward called": Planted(lambda: net(by_forward), "body.weight: the loss depends on it, and no call"),
    "forward called once": Planted(lambda: net(once_by_forward), "body.weight"),
    "scale of a norm": Planted(lambda: net(scaled_norm), "norm.weight"),
    "bias alone": Planted(lambda: net(bias_beside), "body.bias"),
    "double backward": Planted(lambda: net(input_gradient), "(body|head).weight"),
    "hook on the output": Planted(lambda: net(plain, hooked), "body.weight"),
    "hook with the weight": Planted(lambda: net(plain, hooked_by_weight), "head.weight"),
    "kernel used twice": Planted(lambda: other(Filter, 4, 1, 4, 4), "conv.weight"),
    "head is the embedding": Planted(lambda: other(Words, 6, 2, classes=4), "table.weight"),
    "two outputs of a cell": Planted(lambda: other(Cell, 5, 3), "cell.weight_ih: its module, called again"),
    "attention by hand": Planted(lambda: other(Looks, 4, 3, 2), "in_proj_weight"),
}


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("name", PLANTED)
def test_uses_that_no_call_shows_are_measured_directly(name: str, blocks: str) -> None:
    falls_back(PLANTED[name], blocks)


@pytest.mark.parametrize("name", PLANTED)
def test_uses_that_no_call_shows_are_an_error_on_demand(name: str) -> None:
    is_an_error(PLANTED[name])


@pytest.mark.parametrize("name", PLANTED)
def test_without_the_check_they_are_wrong(name: str) -> None:
    is_wrong_without(PLANTED[name])


# --- right models ---------------------------------------------------------------------------------------------------------
def looked_at_without(m: Net, x: Tensor) -> Tensor:
    """One call without a gradient, one with."""
    with torch.no_grad():
        y = m.body(x).mean(0)
    return m.head(torch.tanh(m.norm(m.body(x) - y)))


def detached(m: Net, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.norm(m.body(x)))) + F.linear(x, m.body.weight.detach())


def twice(m: Net, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.norm(m.body(torch.tanh(m.body(x))))))


def unused(m: Net, x: Tensor) -> Tensor:
    m.body(x)
    return m.head(m.norm(x))


def hooked_at_the_input(m: Net) -> None:
    m.body.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def hooked_at_the_gradient(m: Net) -> None:
    m.body.register_forward_hook(halved)


def halved(module: nn.Module, args: Any, y: Tensor) -> None:
    """A hook that changes a gradient, as autograd's own numbers show."""
    if y.requires_grad:
        y.register_hook(lambda g: 0.5 * g)


class Iterated(nn.Module):
    """Convolutions that are called twice, compared by their own kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.deep = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding="same", groups=2, bias=False)
        self.up, self.head = nn.ConvTranspose2d(2, 2, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.tanh(self.up(self.deep(torch.tanh(self.deep(torch.tanh(self.conv(x)))))))
        return self.head(x.flatten(2).mean(-1))


RIGHT: dict[str, Callable[[], Case]] = {
    "plain": lambda: net(plain),
    "called without gradient": lambda: net(looked_at_without),
    "detached": lambda: net(detached),
    "twice": lambda: net(twice),
    "unused": lambda: net(unused),
    "hook on the input": lambda: net(plain, hooked_at_the_input),
    "convolutions, twice": lambda: other(Iterated, 4, 2, 3, 4),
    "hook on the gradient": lambda: net(plain, hooked_at_the_gradient),
}


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("name", RIGHT)
def test_right_models_raise_no_alarm(name: str, blocks: str) -> None:
    is_right_in_silence(RIGHT[name](), blocks)
