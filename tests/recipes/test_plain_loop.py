"""A plain loop: schedules, clipping, decay, micro-batches; saved and resumed by torch.save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

import gradmaker as gm
from tests.recipes.protocol import RECIPES, Declared, batches, close, moved, network, same, through_file, weights
from tests.test_state import equal_states

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, [g["lr"] for g in o.param_groups], total_steps=10, cycle_momentum=False),
    "warm-up": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}


def train(model: nn.Module, optimizer: Any, scheduler: Any, steps: int, start: int = 0) -> None:
    for x, t in batches(steps, start=start):
        F.cross_entropy(model(x), t).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("method", RECIPES)
def test_a_loop_with_a_schedule_is_the_declared_protocol(method: str, schedule: str) -> None:
    model = network()
    optimizer = gm.optimizer(model, method, **RECIPES[method])
    declared, start = Declared(optimizer), weights(model)
    twin = SCHEDULES[schedule](declared.base)
    train(model, optimizer, SCHEDULES[schedule](optimizer), 6)
    for x, t in batches(6):
        declared.step(F.cross_entropy, x, t)
        twin.step()
    close(model, declared.model)
    assert moved(model, start) and optimizer.metrics()["skipped"] == 0


@pytest.mark.parametrize("method", RECIPES)
def test_micro_batches_are_divided_by_the_loop_alone(method: str) -> None:
    """The last group is a short one: its loss is divided by the number of its own batches."""
    model = network()
    optimizer = gm.optimizer(model, method, **RECIPES[method])
    declared = Declared(optimizer)
    for x, t in batches(5):
        parts = list(zip(x.split(4), t.split(4), strict=True))[: 2 if x[0, 0] > 0.5 else 3]
        for xs, ts in parts:
            (F.cross_entropy(model(xs), ts) / len(parts)).backward()
            declared.accumulate(F.cross_entropy, xs, ts, 1 / len(parts))
        optimizer.step()
        optimizer.zero_grad()
        declared.step()
    close(model, declared.model)


@pytest.mark.parametrize("when", [3, 4])  # before a step that measures, and before one that does not
@pytest.mark.parametrize("method", RECIPES)
def test_a_loop_that_was_saved_goes_on_bitwise(method: str, when: int, tmp_path: Path) -> None:
    made = []
    for _ in range(2):
        model = network()
        optimizer = gm.optimizer(model, method, **RECIPES[method])
        made.append((model, optimizer, lr_scheduler.CosineAnnealingLR(optimizer, 8)))
    (model, optimizer, scheduler), resumed = made
    train(model, optimizer, scheduler, when)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    for part, state in zip(resumed, through_file(saved, tmp_path).values(), strict=True):
        part.load_state_dict(state)
    for one in made:
        train(*one, 3, start=when)
    assert same(weights(resumed[0]), weights(model))
    assert resumed[1].maker.step == optimizer.maker.step == when + 3


def test_a_state_of_another_method_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    kfac, ekfac = (gm.optimizer(network(), m, **RECIPES["kfac"]) for m in ("kfac", "ekfac"))
    before = through_file(ekfac.state_dict(), tmp_path)
    with pytest.raises(ValueError, match="load_state_dict"):
        ekfac.load_state_dict(kfac.state_dict())
    assert equal_states(ekfac.state_dict(), before)
