"""Activation checkpoints, of both kinds: the loop is that of the model without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradmaker as gm
from tests.recipes.protocol import RECIPES, Declared, batches, close, network


class Checkpointed(nn.Module):
    """Its middle is computed again in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        layers = network()
        self.first, self.middle, self.last = layers[0], layers[1:5], layers[5]
        self.reentrant, self.calls = reentrant, 0

    def block(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.middle(x)
        return y

    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        h = self.block(h) if self.reentrant is None else checkpoint(self.block, h, use_reentrant=self.reentrant)
        return self.last(h)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", RECIPES)
def test_a_checkpoint_changes_nothing(method: str, reentrant: bool) -> None:
    model = Checkpointed(reentrant)
    optimizer = gm.optimizer(model, method, **RECIPES[method])
    plain = Checkpointed(None)
    declared = Declared(gm.optimizer(plain, method, **RECIPES[method]))
    for j, (x, t) in enumerate(batches(8)):
        before = model.calls
        F.cross_entropy(model(x), t).backward()
        optimizer.step()
        optimizer.zero_grad()
        declared.step(F.cross_entropy, x, t)
        if method == "soap" and j > 2:
            assert model.calls == before + 2  # nothing is computed more often than the loop does
    close(model, declared.model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_micro_batches_with_dropout_in_a_checkpoint(reentrant: bool) -> None:
    """The mask is drawn once for a pass, and the global generator is where the loop without gradmaker has it."""
    states = []
    for preconditions in (True, False):
        torch.manual_seed(5)
        model = Checkpointed(reentrant)
        model.middle[3] = nn.Dropout(0.3)
        optimizer: Any = torch.optim.SGD(model.parameters(), 0.0)
        if preconditions:
            optimizer = gm.optimizer(model, "kfac", **{**RECIPES["kfac"], "lr": 0.0})
        losses = []
        for x, t in batches(3):
            for xs, ts in zip(x.chunk(2), t.chunk(2), strict=True):
                losses.append(F.cross_entropy(model(xs), ts) / 2)
                losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append((torch.stack(losses).detach(), torch.get_rng_state()))
    assert torch.equal(states[0][0], states[1][0]) and torch.equal(states[0][1], states[1][1])
