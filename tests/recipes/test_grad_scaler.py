"""`torch.amp.GradScaler`: the scale leaves no trace, nor does a step that it leaves out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gradmaker as gm
from tests.recipes.protocol import RECIPES, Declared, batches, close, network, same, through_file, weights
from tests.test_state import equal_states


def made(method: str, **options: Any) -> tuple[Any, Any, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=3)
    model = network()
    return model, gm.optimizer(model, method, **{**RECIPES[method], **options}, scaler=scaler), scaler


def step(model: Any, optimizer: Any, scaler: Any, x: Any, t: Any, unscales: bool, factor: float = 1.0) -> None:
    """One step of the loop.  factor: of the loss"""
    scaler.scale(F.cross_entropy(model(x), t) * factor).backward()
    if unscales:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("method", RECIPES)
def test_the_scale_leaves_no_trace(method: str, unscales: bool) -> None:
    model, optimizer, scaler = made(method)
    declared = Declared(optimizer)
    for x, t in batches(6):
        step(model, optimizer, scaler, x, t, unscales)
        declared.step(F.cross_entropy, x, t)
    assert scaler.get_scale() > 2.0**14  # it has grown in between
    close(model, declared.model, rtol=1e-6)  # the scaler divides in float32


def held(optimizer: Any) -> Any:
    """A copy of the statistics, the averages, and the state of the base optimizer."""
    base = {str(j): {**entry} for j, entry in enumerate(optimizer.state.values())}
    return copy.deepcopy({"sites": optimizer.maker.state_dict()["sites"], "step": optimizer.maker.step, "base": base})


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("when", [2, 3])  # a step that measures, and one that does not
@pytest.mark.parametrize("method", RECIPES)
def test_a_step_that_overflows_changes_nothing(method: str, when: int, unscales: bool) -> None:
    model, optimizer, scaler = made(method)
    for x, t in batches(when):
        step(model, optimizer, scaler, x, t, unscales)
    before, state, (x, t) = weights(model), held(optimizer), next(batches(1))
    step(model, optimizer, scaler, x, t, unscales, factor=torch.inf)
    assert scaler.get_scale() == 2.0**13 * (2 if when == 3 else 1)
    assert same(weights(model), before)
    assert equal_states(held(optimizer), state)
    untroubled = made(method)
    for xs, ts in batches(when):
        step(*untroubled, xs, ts, unscales)
    untroubled[2].update(scaler.get_scale())
    for one in ((model, optimizer, scaler), untroubled):
        for xs, ts in batches(2, start=when):
            step(*one, xs, ts, unscales)
    assert same(weights(model), weights(untroubled[0]))


@pytest.mark.parametrize("method", RECIPES)
def test_a_loop_with_a_scaler_goes_on_bitwise(method: str, tmp_path: Path) -> None:
    both = [made(method), made(method)]
    for x, t in batches(3):
        step(*both[0], x, t, True)
    for name, part, fresh in zip("model optimizer scaler".split(), *both, strict=True):
        fresh.load_state_dict(through_file({name: part.state_dict()}, tmp_path)[name])
    for one in both:
        for x, t in batches(3, start=3):
            step(*one, x, t, True)
    assert same(weights(both[0][0]), weights(both[1][0]))


def test_a_scaler_that_was_not_given_is_named() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    model = network()
    optimizer = gm.optimizer(model, "kfac", **RECIPES["kfac"])
    x, t = next(batches(1))
    with pytest.raises(RuntimeError, match="scaler="):
        step(model, optimizer, scaler, x, t, False)
