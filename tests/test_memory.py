"""Memory stays flat: two hundred steps of every method leave no tensor, no saved value of a graph and no object behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from gradmaker import METHODS, from_config
from tests import models
from tests.models import Case
from tests.registry import suited

WARM, HALF, STEPS = 40, 120, 200
"""Windows, memories and caches by shape are full after the first; then all that grows is a leak."""
SHORT: dict[str, dict[str, Any]] = {
    "kbfgs_l": {"pairs": 20},
    "kradagrad": {"preconditioner_interval": 4},  # between refreshes caches hold tensors of their own: looked at in one phase
    "lissa": {"terms": 3},
    "ksd": {"dimension": 3},
    "hessian_free": {"iterations": 5},
    "mfac": {"window": 20},
    "ggt": {"window": 20},
    "tonga": {"window": 10},  # so that the rows are one piece, before and after a cut
    "tonga_unit": {"window": 10},
    "neumann_practical": {"period": 15},
}


class Box:
    """A value that a graph has saved. A graph lives no longer than its boxes, and these are counted."""

    alive = 0

    def __init__(self, value: Tensor) -> None:
        self.value = value.detach()  # an output would hold the node that holds this
        type(self).alive += 1

    def __del__(self) -> None:
        type(self).alive -= 1


@contextmanager
def boxed() -> Iterator[None]:
    with saved_tensors_hooks(Box, lambda box: box.value):
        yield


def step(maker: Any, case: Case, k: int) -> None:
    case.model.zero_grad(set_to_none=True)
    t = case.t.roll(k % 3, 0)
    maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), t)
    maker.forward_and_backward()
    with torch.no_grad():
        for p in case.model.parameters():
            p -= 1e-3 * p.grad / (1 + p.grad.norm())  # type: ignore[operator, union-attr]


def live_tensors() -> int:
    """Before the collector runs: a cycle that waits for it would keep a graph alive."""
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


@pytest.fixture
def uncollected() -> Iterator[None]:
    """What only the collector would find shows; what was there before is out of the way, which saves most of the time."""
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("method", METHODS)
def test_memory_is_flat(method: str) -> None:
    """Properties 64 and 65."""
    case = suited(method, models.linear)
    maker: Any = from_config(case.model, {"method": method, **SHORT.get(method, {})})
    found = []
    with boxed():
        for k in range(STEPS + 1):
            step(maker, case, k)
            if k in (WARM, HALF, STEPS):
                now = live_tensors(), Box.alive
                gc.collect()
                found.append((*now, len(gc.get_objects())))
    tensors, boxes, objects = zip(*found, strict=True)
    assert tensors[0] == tensors[1] == tensors[2]
    assert boxes[0] == boxes[1] == boxes[2]
    growth = min(objects[2] - objects[1], objects[1] - objects[0])  # a leak grows in both
    assert growth < (STEPS - HALF) / 4
    for block in maker.plan.blocks if hasattr(maker, "plan") else []:
        assert all(v.grad_fn is None for part in (block.state, block.cache) for v in part.values())


@pytest.mark.usefixtures("uncollected")
def test_it_would_see_a_leak() -> None:
    """A graph or a tensor that a step leaves behind."""
    kept: list[Any] = []

    class Leaky:
        def __init__(self, what: str) -> None:
            self.case, self.what = models.linear(), what
            self.maker: Any = from_config(self.case.model, {"method": "gradient"})

        def step(self, k: int) -> None:
            step(self.maker, self.case, k)
            if self.what == "graph":
                kept.append((self.case.model(self.case.x) ** 2).sum().grad_fn)
            if self.what == "tensor":
                kept.append(torch.zeros(1))

    for what in ("graph", "tensor"):
        leaky, found = Leaky(what), []
        with boxed():
            for k in range(20):
                leaky.step(k)
                if k in (9, 19):
                    found.append((live_tensors(), Box.alive))
        assert found[1][0 if what == "tensor" else 1] - found[0][0 if what == "tensor" else 1] >= 10
        kept.clear()
