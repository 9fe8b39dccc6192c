"""Attached to a model with several outputs: the whole loss is in what is measured, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradmaker as gm
from gradmaker.curvature import FisherEmp, FisherExact
from gradmaker.representations import Dense
from gradmaker.solvers import Cholesky
from tests.models import Case, mlp


class Heads(nn.Module):
    """Logits, a value, the hidden layer before both, and probabilities."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.body, self.head, self.value = nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False), nn.Linear(5, 1, bias=False)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.body(x)
        h = checkpoint(torch.tanh, h, use_reentrant=True) if self.checkpointed else h.tanh()  # type: ignore[assignment]
        z = self.head(h)
        return z, self.value(h).squeeze(-1), h, z.softmax(-1)


def heads(checkpointed: bool = False) -> tuple[Heads, Tensor, Tensor]:
    case: Case = mlp()
    torch.manual_seed(1)
    return Heads(checkpointed).double(), case.x, case.t


def ride(model: nn.Module, curvature: Any) -> tuple[Any, Any]:
    config = gm.CustomGradientConfig(
        curvature=curvature, representation=Dense(granularity="full"), solver=Cholesky(), decay=0.0
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    maker = gm.CustomGradientMaker(model, config)
    maker.attach(optimizer, "categorical")
    return maker, optimizer


LOSSES: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "logits": (lambda z, v, h, p, t: F.cross_entropy(z, t), True),
    "probabilities": (lambda z, v, h, p, t: F.nll_loss(p.log(), t), True),
    "nothing of the value": (lambda z, v, h, p, t: F.cross_entropy(z, t) + 0 * v.sum(), True),
    "value": (lambda z, v, h, p, t: F.cross_entropy(z, t) + v.square().mean(), False),
    "hidden": (lambda z, v, h, p, t: F.cross_entropy(z, t) + 0.1 * h.square().mean(), False),
    "value and probabilities": (lambda z, v, h, p, t: F.nll_loss(p.log(), t) + v.square().mean(), False),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_by_another_output_is_refused(name: str) -> None:
    loss, right = LOSSES[name]
    model, x, t = heads()
    maker, optimizer = ride(model, FisherExact())
    if right:
        for _ in range(3):
            optimizer.zero_grad()
            loss(*model(x), t).backward()
            optimizer.step()
        assert maker.step == 3
        return
    with pytest.raises(RuntimeError, match=r"other outputs of the model, of shape \(6,.*FisherExact.*FisherEmp"):
        loss(*model(x), t).backward()
        optimizer.step()
    assert maker.step == 0
    optimizer.zero_grad()
    F.cross_entropy(model(x)[0], t).backward()  # the pass left nothing behind
    optimizer.step()
    assert maker.step == 1


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_examples_are_those_of_the_whole_loss(name: str) -> None:
    loss, _ = LOSSES[name]
    model, x, t = heads()
    maker, optimizer = ride(model, FisherEmp())
    rows = []
    for n in range(len(x)):
        outputs = model(x[n : n + 1])
        found = torch.autograd.grad(loss(*outputs, t[n : n + 1]), list(model.parameters()), allow_unused=True)
        rows.append(
            torch.cat(
                [torch.zeros(p.numel()) if g is None else g.flatten() for g, p in zip(found, model.parameters(), strict=True)]
            )
        )
    J = torch.stack([r.double() for r in rows])
    loss(*model(x), t).backward()
    optimizer.step()
    (block,) = maker.plan.blocks
    held = block.triple.representation.to_dense(block.state)[0]
    torch.testing.assert_close(held, J.T @ J / len(x), rtol=1e-10, atol=1e-12)


def test_a_reentrant_checkpoint_before_the_outputs_is_no_false_alarm() -> None:
    """Torch allows nothing but a whole backward pass then, so that hidden states behind it are taken to be on the way."""
    model, x, t = heads(checkpointed=True)
    maker, optimizer = ride(model, FisherExact())
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x)[0], t).backward()
        optimizer.step()
    assert maker.step == 2
