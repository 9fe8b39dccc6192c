"""Wrong models and losses with what the checks must say of them, and one way to hold them against the oracle."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from gradmaker import CustomGradientMaker
from gradmaker.curvature import Curvature, FisherExact
from gradmaker.errors import SelfCheckError, SelfCheckWarning
from gradmaker.representations import Dense
from tests import measure
from tests.models import Case

BLOCKS = ["full", "layer"]


class Count:
    """How often something was done."""

    def __init__(self) -> None:
        self.checks = self.vjps = self.passes = 0

    def since(self, before: tuple[int, int, int]) -> tuple[int, int, int]:
        now = self.checks, self.vjps, self.passes
        return now[0] - before[0], now[1] - before[1], now[2] - before[2]

    @property
    def now(self) -> tuple[int, int, int]:
        return self.checks, self.vjps, self.passes


class Planted(NamedTuple):
    """A wrong model, and what is said of it."""

    make: Callable[[], Case]
    says: str  # a pattern of the message, with the layer's name
    blocks: tuple[str, ...] = ("full", "layer")  # whose matrix is wrong without the check


def build(make: Callable[[], nn.Module], *size: int, loss: Callable[[Any, Tensor], Tensor], t: Tensor, seed: int = 0) -> Case:
    """A case in float64 on normal inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Case(make().double(), torch.randn(*size, dtype=torch.float64), t, loss)


def labels(n: int, classes: int = 3) -> Tensor:
    return torch.arange(n) % classes


def maker_of(case: Case, blocks: str, curvature: Curvature | None = None, **options: Any) -> CustomGradientMaker:
    return measure.custom(case.model, curvature or FisherExact(), Dense(granularity=blocks), **options)


def step(maker: CustomGradientMaker, case: Case) -> None:
    measure.setup(maker, case)
    maker.forward_and_backward()


def is_right(maker: CustomGradientMaker, case: Case) -> bool:
    """Whether every block is that of the Gauss-Newton matrix of the whole batch."""
    oracle = measure.ggn(Case(copy.deepcopy(case.model), case.x, case.t, case.loss))
    try:
        measure.compare(maker, oracle, tolerance=1e-9)
    except AssertionError:
        return False
    return True


@contextmanager
def left_alone(model: nn.Module, maker: CustomGradientMaker) -> Iterator[None]:
    """What an exception may not change: gradients (the very tensors), parameters, buffers, hooks, the maker's state."""
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = _everything(model, maker)
    objects = [p.grad for p in model.parameters()]
    yield
    assert _same(_everything(model, maker), before)
    assert all(p.grad is g for p, g in zip(model.parameters(), objects, strict=True))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _everything(model: nn.Module, maker: CustomGradientMaker) -> dict[str, Any]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = {f"{name}.{kind}": len(getattr(m, kind)) for name, m in model.named_modules() for kind in kinds}
    tensors = {k: v.detach().clone() for k, v in (*model.named_parameters(), *model.named_buffers())}
    gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(maker.state_dict())
    checked = len(maker.checks.arrangement.checked)
    return {"hooks": hooks, "tensors": tensors, "gradients": gradients, "modes": modes, "state": state, "checked": checked}


def falls_back(planted: Planted, blocks: str) -> None:
    """By default it is said once, and the matrix is right from the first step on."""
    case = planted.make()
    maker = maker_of(case, blocks)
    with pytest.warns(SelfCheckWarning, match=planted.says):
        step(maker, case)
    assert is_right(maker, case)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(maker, case)
    assert is_right(maker, case)


def is_an_error(planted: Planted, mode: str = "error") -> None:
    """With the name and the cause, and as if the step had not been tried."""
    case = planted.make()
    maker = maker_of(case, "layer", self_check=mode)
    with left_alone(case.model, maker), pytest.raises(SelfCheckError, match=planted.says):
        step(maker, case)


def is_wrong_without(planted: Planted) -> None:
    """Wrong, or an error that is none of the checks'."""
    for blocks in planted.blocks:
        case = planted.make()
        maker = maker_of(case, blocks, self_check="off")
        step(maker, case)
        assert not is_right(maker, case), blocks


def is_right_in_silence(case: Case, blocks: str, **options: Any) -> None:
    """No check says anything of a right model, whatever it is told to do."""
    for mode in ("error", "fallback"):
        maker = maker_of(case, blocks, self_check=mode, **options)
        step(maker, case)
        assert is_right(maker, case), mode


def declared(maker: Any, model: nn.Module, case: Case) -> None:
    measure.setup(maker, case._replace(model=model))


def checks_of(count: Count, maker: Any, model: nn.Module, case: Case) -> int:
    """Runs of the checks in one step."""
    before = count.checks
    declared(maker, model, case)
    maker.forward_and_backward()
    return count.checks - before
