"""A moving average of the weights: a copy of the model, whose calls are no passes of the loop."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gradmaker as gm
from tests.recipes.protocol import RECIPES, batches, network, same, through_file, weights


def averaged(model: Any) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


def step(model: Any, optimizer: Any, x: Any, t: Any) -> None:
    F.cross_entropy(model(x), t).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("method", RECIPES)
def test_an_average_follows_the_steps_and_disturbs_none(method: str, made: str) -> None:
    """It may be made before or after the optimizer, evaluated, and even differentiated, as a target network is."""
    model, plain = network(), network()
    ema = averaged(model) if made == "before" else None
    optimizer = gm.optimizer(model, method, **RECIPES[method])
    ema = averaged(model) if ema is None else ema
    alone = gm.optimizer(plain, method, **RECIPES[method])
    expected = [w.clone() for w in weights(plain)]
    for j, (x, t) in enumerate(batches(6)):
        F.cross_entropy(ema(x), t).backward()
        with torch.no_grad():
            ema(x)
        step(model, optimizer, x, t)
        ema.update_parameters(model)
        step(plain, alone, x, t)
        for e, w in zip(expected, weights(plain), strict=True):
            e.copy_(w if j == 0 else torch.lerp(e, w, 0.1))
    assert same(weights(model), weights(plain))
    torch.testing.assert_close(weights(ema.module), expected, rtol=1e-12, atol=1e-13)
    assert optimizer.maker.step == 6


def test_an_average_is_taken_of_the_weights_that_were_stepped_with_p_g() -> None:
    """A hook after the step, as trainers use, sees the new weights."""
    model = network()
    optimizer, ema = gm.optimizer(model, "kfac", **RECIPES["kfac"]), averaged(model)
    optimizer.register_step_post_hook(lambda *_: ema.update_parameters(model))
    x, t = next(batches(1))
    step(model, optimizer, x, t)
    assert same(weights(ema.module), weights(model))


@pytest.mark.parametrize("method", RECIPES)
def test_a_loop_with_an_average_goes_on_bitwise(method: str, tmp_path: Path) -> None:
    both: list[Any] = []
    for _ in range(2):
        model = network()
        both.append((model, gm.optimizer(model, method, **RECIPES[method]), averaged(model)))
    for j, (x, t) in enumerate(batches(6)):
        for model, optimizer, ema in both[: 1 if j < 3 else 2]:
            step(model, optimizer, x, t)
            ema.update_parameters(model)
        if j == 2:
            for part, fresh in zip(both[0], both[1], strict=True):
                fresh.load_state_dict(through_file(part.state_dict(), tmp_path))
    assert same(weights(both[0][2]), weights(both[1][2])) and same(weights(both[0][0]), weights(both[1][0]))


def test_the_weights_of_an_average_may_be_swapped_in_and_out() -> None:
    """In place, for an evaluation between two steps."""
    results = []
    for swaps in (True, False):
        model = network()
        optimizer, ema = gm.optimizer(model, "kfac", **RECIPES["kfac"]), averaged(model)
        for x, t in batches(5):
            step(model, optimizer, x, t)
            ema.update_parameters(model)
            if swaps:
                own = copy.deepcopy(model.state_dict())
                model.load_state_dict(ema.module.state_dict())
                model.eval()
                with torch.no_grad():
                    model(x)
                model.train()
                model.load_state_dict(own)
        results.append(weights(model))
    assert same(*results)
