"""Clipping: `max_norm` limits `P g`; `clip_grad_norm_` of the loop acts on the raw gradient, and is told of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradmaker as gm
from gradmaker.loops.attachment import ChangedGradientWarning
from tests.recipes.protocol import RECIPES, batches, close, network

CLIPS: dict[str, Callable[[Any], Any]] = {
    "norm": lambda p: nn.utils.clip_grad_norm_(p, 0.1),
    "value": lambda p: nn.utils.clip_grad_value_(p, 0.01),
}


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("method", RECIPES)
def test_the_norm_of_what_is_stepped_is_bounded(method: str) -> None:
    """By that of all parameters together; the direction is kept, and `metrics()` has the factor."""
    models = [network(), network()]
    optimizers = [
        gm.optimizer(m, method, **{**RECIPES[method], "max_norm": norm}) for m, norm in zip(models, (0.3, None), strict=True)
    ]
    x, t = next(batches(1))
    for model, optimizer in zip(models, optimizers, strict=True):
        F.cross_entropy(model(x), t).backward()
        optimizer.step()
    clipped, free = (gradient(m) for m in models)
    factor = optimizers[0].metrics()["clip_factor"]
    assert 0 < factor < 1 and abs(float(clipped.norm()) - 0.3) < 1e-5
    torch.testing.assert_close(clipped, free * factor)
    assert optimizers[1].metrics()["clip_factor"] == 1


@pytest.mark.parametrize("how", CLIPS)
@pytest.mark.parametrize("method", RECIPES)
def test_clipping_by_the_loop_is_told_of_once(method: str, how: str) -> None:
    model = network()
    optimizer = gm.optimizer(model, method, **RECIPES[method])
    with pytest.warns(ChangedGradientWarning, match="max_norm") as told:
        for x, t in batches(4):
            F.cross_entropy(model(x), t).backward()
            CLIPS[how](model.parameters())
            optimizer.step()
            optimizer.zero_grad()
    assert len([w for w in told if w.category is ChangedGradientWarning]) == 1


def test_clipping_by_the_loop_does_nothing_for_a_method_that_does_not_depend_on_the_scale() -> None:
    """What the warning says: Adam's part of SOAP divides the factor out again."""
    models = [network(), network()]
    options = {**RECIPES["soap"], "max_norm": None}
    for model, clips in zip(models, (True, False), strict=True):
        optimizer = gm.optimizer(model, "soap", **options)
        x, t = next(batches(1))
        F.cross_entropy(model(x), t).backward()
        if clips:
            for p in model.parameters():
                p.grad *= 0.01
        if clips:
            with pytest.warns(ChangedGradientWarning):
                optimizer.step()
        else:
            optimizer.step()
    close(models[0], models[1], rtol=1e-3)


@pytest.mark.parametrize("method", RECIPES)
def test_a_norm_that_is_only_watched_is_no_change(method: str) -> None:
    """As loggers do, or a limit that is never reached."""
    model = network()
    optimizer = gm.optimizer(model, method, **RECIPES[method])
    for x, t in batches(4):
        F.cross_entropy(model(x), t).backward()
        nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
