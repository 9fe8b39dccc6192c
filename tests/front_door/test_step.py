"""A step of the front door: that of the declared calls, then clipping, decay, and the base optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._python_dispatch import TorchDispatchMode

import gradmaker as gm
from tests.front_door.training import (
    METHODS,
    STEPS,
    backward,
    batches,
    close,
    declared,
    front,
    maker_of,
    same,
    sgd,
    train,
    weights,
)
from tests.models import mlp


# --- the same as the declared calls ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("limits", [{}, {"max_norm": 0.3, "decay": 0.1}])
@pytest.mark.parametrize("method", METHODS)
def test_the_trajectory_is_that_of_the_declared_calls(method: str, limits: dict[str, float]) -> None:
    options, momentum = METHODS[method]
    start = weights(mlp())
    case, optimizer = front(
        method,
        base=lambda case: sgd(case, momentum=momentum, weight_decay=limits.get("decay", 0.0)),
        options=options,
        max_norm=limits.get("max_norm"),
    )
    found = train(case, optimizer)
    close(found, declared(method, options, momentum, **limits))
    assert optimizer.maker.step == STEPS and optimizer.maker.skipped == 0
    assert not torch.allclose(found[0], start[0], atol=1e-4)


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_a_likelihood_that_is_read_gives_the_same(method: str) -> None:
    options, momentum = METHODS[method]
    case, optimizer = front(method, base=lambda case: sgd(case, momentum=momentum), options=options, likelihood=None)
    torch.testing.assert_close(train(case, optimizer), declared(method, options, momentum), rtol=1e-6, atol=1e-8)
    assert optimizer.metrics()["unread"] == 0


@pytest.mark.parametrize("given", [{"accumulation": 2}, {"likelihood": None}])
def test_micro_batches_of_a_loop_are_one_step(given: dict[str, Any]) -> None:
    case, optimizer = front(**given)
    other = mlp()
    maker, base = maker_of(other, "kfac"), sgd(other)
    for x, t in batches(case):
        optimizer.zero_grad()
        base.zero_grad()
        for xs, ts in zip(x.chunk(2), t.chunk(2), strict=True):
            (case.loss(case.model(xs), ts) / 2).backward()
            maker.setup_loss_call(other.loss, maker.setup_model_call(other.model, xs), ts)
            maker.accumulate(0.5)
        optimizer.step()
        maker.precondition()
        base.step()
    torch.testing.assert_close(weights(case), weights(other), rtol=1e-6, atol=1e-8)
    assert optimizer.maker.step == STEPS


def test_a_closure_is_run_once_and_its_loss_returned() -> None:
    case, optimizer = front()
    losses: list[Tensor] = []

    def closure(x: Tensor, t: Tensor) -> Tensor:
        losses.append(backward(case, optimizer, x, t))
        return losses[-1]

    for x, t in batches(case):
        with torch.no_grad():
            assert optimizer.step(lambda x=x, t=t: closure(x, t)) is losses[-1]
    assert len(losses) == STEPS
    close(weights(case), declared("kfac"))


def test_the_base_optimizer_may_be_any_that_steps() -> None:
    with pytest.warns(gm.BaseOptimizerWarning):
        case, optimizer = front(base=lambda case: torch.optim.AdamW(case.model.parameters(), 0.01, weight_decay=0.3))
    other = mlp()
    base = torch.optim.AdamW(other.model.parameters(), 0.01, weight_decay=0.3)
    maker: Any = gm.from_config(other.model, {"method": "kfac"})
    for x, t in batches(case):
        backward(case, optimizer, x, t)
        optimizer.step()
        base.zero_grad()
        maker.setup_loss_call(other.loss, maker.setup_model_call(other.model, x), t)
        maker.forward_and_backward()
        base.step()
    close(weights(case), weights(other))


# --- clipping and decay ---------------------------------------------------------------------------------------------------
def test_clipping_acts_on_the_preconditioned_gradient() -> None:
    case, optimizer = front("soap", max_norm=0.2, options={"beta1": 0.0, "skip_first": False})
    x, t = next(batches(case))
    backward(case, optimizer, x, t)
    optimizer.step()
    norm = torch.cat([p.grad.flatten() for p in case.model.parameters() if p.grad is not None]).norm()
    assert abs(float(norm) - 0.2) < 1e-6
    assert 0 < optimizer.metrics()["clip_factor"] < 1


def test_short_steps_are_not_clipped() -> None:
    case, optimizer = front(max_norm=1e6)
    close(train(case, optimizer), declared("kfac"))
    assert optimizer.metrics()["clip_factor"] == 1.0


def test_each_group_decays_by_its_own_rates_and_keeps_them() -> None:
    """A parameter without a gradient does not decay."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.used(x)
            return out

    model = Two().double()
    groups = [
        {"params": model.used.parameters(), "lr": 0.1, "weight_decay": 0.5},
        {"params": model.unused.parameters(), "lr": 0.3, "weight_decay": 0.7},
    ]
    optimizer = gm.PreconditionedOptimizer(
        gm.KfacGradientMaker(model), torch.optim.SGD(groups, lr=0.1), likelihood="categorical"
    )
    before = [p.detach().clone() for p in model.parameters()]
    F.cross_entropy(model(torch.randn(8, 4, dtype=torch.float64)), torch.arange(8) % 3).backward()
    optimizer.step()
    for p, old in zip(model.used.parameters(), before[:2], strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.detach(), old * (1 - 0.1 * 0.5) - 0.1 * p.grad)
    assert same([p.detach() for p in model.unused.parameters()], before[2:])
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 0.7]


def test_decay_comes_back_when_the_base_optimizer_fails() -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise ArithmeticError("planted")

    case, optimizer = front(base=lambda case: Failing(case.model.parameters(), 0.1, weight_decay=0.25))
    backward(case, optimizer, *next(batches(case)))
    with pytest.raises(ArithmeticError, match="planted"):
        optimizer.step()
    assert optimizer.param_groups[0]["weight_decay"] == 0.25


@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05, dtype=torch.float64)])
def test_a_learning_rate_may_be_a_tensor(lr: Any) -> None:
    case, optimizer = front(base=lambda case: sgd(case, lr, weight_decay=0.1))
    close(train(case, optimizer), declared("kfac", decay=0.1))


class WithoutReads(TorchDispatchMode):
    """Raises where a value is read on the host, for which a device has to be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default), func
        return func(*args, **(kwargs or {}))


def test_a_step_that_measures_nothing_does_not_wait_for_the_device() -> None:
    case, optimizer = front(
        base=lambda case: sgd(case, momentum=0.9, weight_decay=0.1),
        max_norm=0.3,
        options={"curvature_interval": 10, "preconditioner_interval": 10, "warmup_steps": 0},
    )
    train(case, optimizer, 4)
    backward(case, optimizer, case.x, case.t)
    before = weights(case)
    with WithoutReads():
        optimizer.step()
    assert not same(weights(case), before) and 0 < optimizer.metrics()["clip_factor"] < 1
    with pytest.raises(AssertionError), WithoutReads():
        optimizer.metrics()


# --- steps that do nothing ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_step_that_is_not_finite_changes_nothing(value: float) -> None:
    case, optimizer = front(base=lambda case: sgd(case, momentum=0.9, weight_decay=0.1))
    train(case, optimizer, 2)
    before, buffers = weights(case), [s["momentum_buffer"].clone() for s in optimizer.state.values()]
    x, t = next(batches(case))
    backward(case, optimizer, x * value, t)
    with pytest.warns(gm.SkippedStepWarning, match="step 2"):
        optimizer.step()
    backward(case, optimizer, x * value, t)
    optimizer.step()  # warned of once
    assert same(weights(case), before)
    assert same([s["momentum_buffer"] for s in optimizer.state.values()], buffers)
    assert optimizer.metrics()["skipped"] == 2
    train(case, optimizer, 1)
    assert not same(weights(case), before) and torch.isfinite(weights(case)[0]).all()


def test_a_step_with_no_pass_and_zero_gradients_changes_nothing() -> None:
    case, optimizer = front(base=lambda case: sgd(case, momentum=0.9, weight_decay=0.1), options={"curvature_interval": 3})
    train(case, optimizer, 2)  # the coming step measures nothing
    before, state = weights(case), optimizer.state_dict()
    for p in case.model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert same(weights(case), before) and optimizer.maker.step == 2
    after = optimizer.state_dict()
    assert same(
        [s["momentum_buffer"] for s in after["state"].values()], [s["momentum_buffer"] for s in state["state"].values()]
    )


def test_a_loss_scaler_skips_and_resumes() -> None:
    """The step of a scaler that found an overflow leaves no trace; the others are those of the unscaled loop."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    case, optimizer = front(scaler=scaler)
    for j, (x, t) in enumerate(batches(case)):
        for poison in (True, False) if j == 2 else (False,):
            optimizer.zero_grad()
            scaler.scale(case.loss(case.model(x), t)).backward()
            if poison:
                next(case.model.parameters()).grad.fill_(torch.inf)  # type: ignore[union-attr]
            before = weights(case)
            scaler.step(optimizer)
            scaler.update()
            assert same(before, weights(case)) == poison
    torch.testing.assert_close(weights(case), declared("kfac"), rtol=1e-7, atol=1e-9)
    assert optimizer.maker.step == STEPS


# --- schedulers -----------------------------------------------------------------------------------------------------------
def _sequence(optimizer: Any) -> LRScheduler:
    first = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    return lr_scheduler.SequentialLR(optimizer, [first, lr_scheduler.ExponentialLR(optimizer, 0.9)], [3])


SCHEDULES: dict[str, Callable[[Any], LRScheduler]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda j: j / 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS + 1),
    "SequentialLR": _sequence,
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")  # of SequentialLR itself, in torch 2.6
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_act_on_both(name: str) -> None:
    """Warnings are errors here: torch takes the steps to come before those of the scheduler."""
    case, optimizer = front(base=lambda case: sgd(case, 0.05, momentum=0.9))
    schedule = SCHEDULES[name](optimizer)
    other = mlp()
    base = sgd(other, 0.05, momentum=0.9)
    maker: Any = gm.from_config(other.model, {"method": "kfac"})
    twin = SCHEDULES[name](base)
    rates = []
    for x, t in batches(case):
        backward(case, optimizer, x, t)
        optimizer.step()
        base.zero_grad()
        maker.setup_loss_call(other.loss, maker.setup_model_call(other.model, x), t)
        maker.forward_and_backward()
        base.step()
        schedule.step()
        twin.step()
        rates.append((optimizer.base_optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
    assert len(set(rates)) > 1 and rates[-1] == (base.param_groups[0]["lr"], base.param_groups[0]["momentum"])
    close(weights(case), weights(other))
