"""Parameters in bfloat16, and autocast: statistics are in float32, and what is read from rounded gradients is right."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradmaker as gm
from tests.recipes.protocol import RECIPES, Declared, batches, network, same, through_file, weights

OPTIONS: dict[str, dict[str, Any]] = {m: {**options, "max_norm": None} for m, options in RECIPES.items()}


def data(steps: int, start: int = 0, dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[Tensor, Tensor]]:
    return ((x.to(dtype), t) for x, t in batches(steps, start=start))


def tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, dict):
        return [t for value in tree.values() for t in tensors(value)]
    return [tree] if isinstance(tree, Tensor) else []


@pytest.mark.parametrize("method", OPTIONS)
def test_statistics_of_a_bfloat16_model_are_in_float32(method: str) -> None:
    model = network().bfloat16()
    optimizer = gm.optimizer(model, method, **OPTIONS[method])
    for x, t in data(3):
        F.cross_entropy(model(x), t).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.dtype is torch.bfloat16 for p in model.parameters())
    held = tensors(optimizer.maker.state_dict()["sites"])
    assert held and all(t.dtype is torch.float32 for t in held if t.is_floating_point())
    assert optimizer.metrics()["skipped"] == 0


@pytest.mark.parametrize("method", OPTIONS)
def test_a_bfloat16_loop_is_the_declared_protocol(method: str) -> None:
    """To the rounding of weights and gradients."""
    model = network().bfloat16()
    optimizer = gm.optimizer(model, method, **OPTIONS[method])
    declared, start = Declared(optimizer), weights(model)
    for x, t in data(4):
        F.cross_entropy(model(x), t).backward()
        optimizer.step()
        optimizer.zero_grad()
        declared.step(F.cross_entropy, x, t)
    for p, q, p0 in zip(weights(model), weights(declared.model), start, strict=True):
        assert float((p - q).float().norm()) <= 0.02 * float((p - p0).float().norm()) + 0.01 * float(p0.float().norm())


@pytest.mark.parametrize("method", OPTIONS)
def test_a_first_step_is_that_in_float64_of_the_same_numbers(method: str) -> None:
    """The factors and their roots hold no rounding of bfloat16 but that of the model's own values."""
    exact, coarse = network(), network()
    with torch.no_grad():
        for p in exact.parameters():
            p.copy_(p.bfloat16())
    coarse.load_state_dict(exact.state_dict())
    coarse.bfloat16()
    x, t = next(data(1))
    found = []
    for model in (coarse, exact):
        exactly: dict[str, Any] = {"fisher": "FisherExact"} if method == "kfac" else {}  # samples of rounded logits may differ
        optimizer = gm.optimizer(model, method, **OPTIONS[method], **exactly)
        F.cross_entropy(model(x.to(next(model.parameters()).dtype)), t).backward()
        optimizer.step()
        found.append(torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]))
    assert F.cosine_similarity(found[0], found[1], dim=0) > (
        0.999 if method == "kfac" else 0.98
    )  # the first step of SOAP has signs for most entries


@pytest.mark.parametrize("method", OPTIONS)
def test_autocast_keeps_the_parameters_exact(method: str) -> None:
    model = network().float()
    optimizer = gm.optimizer(model, method, **OPTIONS[method])
    declared, start = Declared(optimizer), weights(model)
    for x, t in data(4, dtype=torch.float32):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), t)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            declared.accumulate(F.cross_entropy, x, t)
        declared.step()
    for p, q, p0 in zip(weights(model), weights(declared.model), start, strict=True):
        assert p.dtype is torch.float32
        assert float((p - q).norm()) <= 0.05 * float((p - p0).norm()) + 1e-4


@pytest.mark.parametrize("method", OPTIONS)
def test_a_bfloat16_loop_goes_on_bitwise(method: str, tmp_path: Path) -> None:
    model = network().bfloat16()
    twin: nn.Module = copy.deepcopy(model)
    made = [(m, gm.optimizer(m, method, **OPTIONS[method])) for m in (model, twin)]
    for step in range(6):
        for m, optimizer in made[: 1 if step < 3 else 2]:
            x, t = next(data(1, start=step))
            F.cross_entropy(m(x), t).backward()
            optimizer.step()
            optimizer.zero_grad()
        if step == 2:
            twin.load_state_dict(model.state_dict())
            made[1][1].load_state_dict(through_file(made[0][1].state_dict(), tmp_path))
    assert same(weights(model), weights(twin))
