"""Steps with gradients by rows keep the protocol: accumulation, earlier ``.grad``, what is not finite, exceptions, resuming."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS, from_config
from gradmaker.preconditioner import PreconditionedGradientMaker
from tests.factored.counting import all_formed, counted
from tests.factored.test_declared import CLASSES, EVERY_OTHER, D, N, Net, close
from tests.registry import legal_options
from tests.test_state import equal_states

X = torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
T = torch.arange(N) % CLASSES
Act = Callable[[PreconditionedGradientMaker, nn.Module], Any]


def maker_of(method: str = "kfac", **options: Any) -> tuple[PreconditionedGradientMaker, nn.Module]:
    torch.manual_seed(0)
    model = Net().double()
    maker: Any = from_config(model, {"method": method, **EVERY_OTHER, **options})
    return maker, model


def declare(maker: PreconditionedGradientMaker, model: nn.Module, k: int = 0, x: Tensor = X) -> None:
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x + 0.1 * k), T[: len(x)])


def step(maker: PreconditionedGradientMaker, model: nn.Module, k: int = 0) -> None:
    model.zero_grad()
    declare(maker, model, k)
    maker.forward_and_backward()


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def micro_batches(maker: PreconditionedGradientMaker, model: nn.Module) -> None:
    model.zero_grad()
    for part in (X[:2], X[2:]):
        declare(maker, model, x=part)
        maker.accumulate(len(part) / N)
    maker.precondition()


def last_by_both(maker: PreconditionedGradientMaker, model: nn.Module) -> None:
    model.zero_grad()
    declare(maker, model, x=X[:2])
    maker.accumulate(2 / N)
    declare(maker, model, x=X[2:])
    maker.forward_and_backward(3 / N)


def added(maker: PreconditionedGradientMaker, model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    kept = [p.grad for p in model.parameters()]
    declare(maker, model)
    maker.forward_and_backward(0.5)
    assert all(p.grad is g for p, g in zip(model.parameters(), kept, strict=True))


def partly_added(maker: PreconditionedGradientMaker, model: nn.Module) -> None:
    model.zero_grad()
    weight: Any = next(model.parameters())
    weight.grad = torch.ones_like(weight)
    declare(maker, model)
    maker.forward_and_backward()


@pytest.mark.parametrize("method", ["kfac", "shampoo"])
@pytest.mark.parametrize(("act", "held"), [(micro_batches, 0), (last_by_both, 0), (added, 2), (partly_added, 2)])
def test_a_step_of_another_kind(act: Act, held: int, method: str) -> None:
    found, counts = [], []
    for form in (False, True):
        maker, model = maker_of(method)
        for k in range(3):
            step(maker, model, k)
        with counted() as taken:
            with all_formed() if form else counted():
                act(maker, model)
        found.append(grads(model))
        counts.append(taken.solved)
    close([found[0]], [found[1]])
    assert counts == [held, 0]


def test_what_is_not_finite_is_skipped_and_stays_in_grad() -> None:
    for planted in (float("nan"), float("inf")):
        found = []
        for form in (False, True):
            maker, model = maker_of(curvature_interval=1)
            for k in range(2):
                step(maker, model, k)
            bad = X.clone()
            bad[1, 2] = planted
            before = copy.deepcopy(maker.state_dict())
            model.zero_grad()
            declare(maker, model, x=bad)
            with all_formed() if form else counted():
                maker.forward_and_backward()
            assert maker.skipped == 1
            after = maker.state_dict()
            assert equal_states(before["sites"], after["sites"])
            found.append(grads(model))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a.isfinite(), b.isfinite())
        assert len(found[0]) == len(list(Net().parameters()))


@pytest.mark.parametrize("place", ["solve", "forward", "backward", "write"])
@pytest.mark.parametrize("before", [False, True])
def test_an_exception_leaves_all_as_it_was(place: str, before: bool) -> None:
    class PlantedError(Exception):
        pass

    def fail(*_: Any) -> Any:
        raise PlantedError

    maker, model = maker_of()
    for k in range(2):
        step(maker, model, k)
    model.zero_grad()
    for p in model.parameters() if before else ():
        p.grad = torch.ones_like(p)
    kept = [p.grad for p in model.parameters()]
    state, now = copy.deepcopy(maker.state_dict()), maker.step_state.now
    with pytest.MonkeyPatch.context() as patch:
        if place == "solve":
            patch.setattr("gradmaker.by_rows.solve", fail)
        elif place == "write":
            patch.setattr("gradmaker.maker._write", fail)
        model_call: Any = fail if place == "forward" else model
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model_call, X), T)
        handle = model.second.register_full_backward_hook(fail) if place == "backward" else None  # type: ignore[union-attr, operator]
        with pytest.raises(PlantedError):
            maker.forward_and_backward()
        if handle is not None:
            handle.remove()
    assert all(p.grad is g for p, g in zip(model.parameters(), kept, strict=True))
    assert all(g is None or bool((g == 1).all()) for g in kept)
    assert maker.step_state.now is now and not now.rows
    assert equal_states(state, maker.state_dict())
    assert not any(m._forward_hooks for m in model.modules())
    other, twin = maker_of()
    for k in range(2):
        step(other, twin, k)
    step(maker, model, 5)
    step(other, twin, 5)
    close([grads(model)], [grads(twin)], 0.0)


def test_a_step_with_rows_is_resumed_bitwise() -> None:
    maker, model = maker_of()
    for k in range(3):
        step(maker, model, k)
    other, twin = maker_of()
    other.load_state_dict(copy.deepcopy(maker.state_dict()))
    for k in range(3, 6):
        step(maker, model, k)
        step(other, twin, k)
        close([grads(model)], [grads(twin)], 0.0)


def test_no_gradient_of_a_layer_held_by_rows_is_computed() -> None:
    maker, model = maker_of()
    for k in range(3):
        step(maker, model, k)
    computed: list[str] = []
    declare(maker, model)

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and tuple(out.shape) in ((14, 12), (12, 14)) and "mm" in func.__name__:
                computed.append(func.__name__)
            return out

    with Seen(), counted() as taken:
        maker.forward_and_backward()
    assert taken.solved == 2
    assert len(computed) == 1  # the one that forms ``P G``


ROW_METHODS = [m for m in METHODS if m not in ("gradient", "custom")]


@pytest.mark.filterwarnings("ignore::gradmaker.errors.SelfCheckWarning")
@pytest.mark.parametrize("method", ROW_METHODS)
def test_every_method_is_what_it_is_without_rows(method: str) -> None:
    """Each step from the same state, since the null space of what the first one measures has no basis of its own."""
    options = legal_options(method, warmup_steps=0, curvature_interval=2, preconditioner_interval=2)
    torch.manual_seed(0)
    model = Net().double()
    if reason := METHODS[method].refuse(model):
        pytest.skip(reason)
    twin = copy.deepcopy(model)
    by_rows, formed = (from_config(m, {"method": method, **options}) for m in (model, twin))
    found, folded = [], 0
    for k in range(5):
        by_rows.load_state_dict(copy.deepcopy(formed.state_dict()))
        with counted() as taken:
            step(by_rows, model, k)
        with all_formed():
            step(formed, twin, k)
        found.append((grads(model), grads(twin)))
        folded += taken.folded
    own, others = zip(*found, strict=True)
    close(list(own), list(others), 1e-12 if not folded else 1e-7)  # roots of a statistic without rank magnify rounding
