"""The front door is an optimizer: what schedulers, trainers and users do with one, works or is refused by name."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import gradmaker as gm
from tests.front_door.training import STEPS, backward, batches, close, declared, front, same, sgd, train, weights
from tests.models import bare_scale, mlp


def test_it_is_an_optimizer_with_the_very_objects_of_its_base() -> None:
    _, optimizer = front()
    base = optimizer.base_optimizer
    assert isinstance(optimizer, Optimizer)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state and optimizer.defaults is base.defaults
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is base.param_groups and optimizer.state is base.state
    optimizer.param_groups = [*base.param_groups]
    assert optimizer.param_groups is base.param_groups


def test_it_says_what_it_is() -> None:
    _, optimizer = front(max_norm=0.5)
    first, second, *_ = repr(optimizer).splitlines()
    assert first == "PreconditionedOptimizer: KfacGradientMaker, then SGD, max_norm=0.5 ("
    assert second == "Parameter Group 0"


# --- hooks ----------------------------------------------------------------------------------------------------------------
def test_hooks_are_called_with_the_front_door() -> None:
    case, optimizer = front()
    called: list[tuple[str, Any]] = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: called.append(("before", o)))
    optimizer.register_step_post_hook(lambda o, args, kwargs: called.append(("after", o)))
    optimizer.register_state_dict_pre_hook(lambda o: called.append(("save", o)))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "more": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: called.append(("load", state.pop("more"))))
    optimizer.register_load_state_dict_post_hook(lambda o: called.append(("loaded", o)))
    train(case, optimizer, 1)
    state = optimizer.state_dict()
    assert state["more"] == 1
    optimizer.load_state_dict(state)
    assert called == [
        ("before", optimizer),
        ("after", optimizer),
        ("save", optimizer),
        ("load", 1),
        ("loaded", optimizer),
    ]
    assert "more" in state


def test_a_hook_before_the_step_sees_the_raw_gradient_and_one_after_it_the_other() -> None:
    case, optimizer = front()
    seen = []
    for register in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook):
        register(lambda o, args, kwargs: seen.append(next(case.model.parameters()).grad.clone()))  # type: ignore[union-attr]
    backward(case, optimizer, case.x, case.t)
    raw = next(case.model.parameters()).grad.clone()  # type: ignore[union-attr]
    optimizer.step()
    assert torch.equal(seen[0], raw) and not torch.allclose(seen[1], raw)


# --- groups ---------------------------------------------------------------------------------------------------------------
def test_a_group_that_is_added_is_preconditioned_from_then_on() -> None:
    case, optimizer = front(base=lambda case: sgd_of(case.model[0]))
    last = case.model.get_submodule("2")
    before = [p.detach().clone() for p in last.parameters()]
    train(case, optimizer, 1)
    assert same([p.detach() for p in last.parameters()], before)
    optimizer.add_param_group({"params": list(last.parameters()), "lr": 0.01})
    assert len(optimizer.base_optimizer.param_groups) == 2
    backward(case, optimizer, case.x, case.t)
    raw = [p.grad.clone() for p in last.parameters()]  # type: ignore[union-attr]
    optimizer.step()
    assert not any(torch.allclose(p.grad, g) for p, g in zip(last.parameters(), raw, strict=True))  # type: ignore[arg-type]


def sgd_of(module: Any) -> Optimizer:
    return torch.optim.SGD(module.parameters(), 0.05)


def test_a_part_of_a_block_is_no_group() -> None:
    case, optimizer = front(base=lambda case: sgd_of(case.model[0]))
    with pytest.raises(ValueError, match="as one block"):
        optimizer.add_param_group({"params": [case.model.get_parameter("2.weight")]})
    assert len(optimizer.param_groups) == 1
    train(case, optimizer, 1)


def test_parameters_outside_of_the_model_keep_their_gradient() -> None:
    """A learnt temperature, say; it is stepped where the model's gradient is zero, too."""
    case, optimizer = front()
    scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer.add_param_group({"params": [scale], "lr": 0.5})
    optimizer.zero_grad()
    (case.loss(case.model(case.x), case.t) + 3 * scale).backward()
    optimizer.step()
    assert float(scale.detach()) == 1 - 0.5 * 3
    optimizer.zero_grad()
    (2 * scale).backward()
    before = weights(case)
    optimizer.step()
    assert float(scale.detach()) == 1 - 0.5 * 3 - 0.5 * 2 and same(weights(case), before)


def test_parameters_that_it_does_not_hold_are_left_alone() -> None:
    case, optimizer = front(base=lambda case: sgd_of(case.model[0]), max_norm=1e-3)
    backward(case, optimizer, case.x, case.t)
    others = list(case.model.get_submodule("2").parameters())
    raw = [p.grad.clone() for p in others]  # type: ignore[union-attr]
    optimizer.step()
    assert same([p.grad for p in others], raw)  # type: ignore[misc]


# --- copies ---------------------------------------------------------------------------------------------------------------
def test_a_copy_trains_its_own_model() -> None:
    case, optimizer = front(base=lambda case: sgd(case, momentum=0.9))
    train(case, optimizer, 3)
    for duplicate in (copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))):
        model, twin = duplicate((case.model, optimizer))
        assert twin.maker.model is model and twin.param_groups is twin.base_optimizer.param_groups
        assert {id(p) for g in twin.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
        before = weights(case)
        found = train(case._replace(model=model), twin, 2, start=3)
        assert same(weights(case), before) and not same(found, before)
    assert same(train(case, optimizer, 2, start=3), found)


def test_a_copy_of_a_fresh_one_under_a_scheduler_trains() -> None:
    case, optimizer = front()
    torch.optim.lr_scheduler.StepLR(optimizer, 100)
    model, twin = copy.deepcopy((case.model, optimizer))
    close(train(case._replace(model=model), twin), declared("kfac"))


def test_it_is_released_with_its_last_reference() -> None:
    case, optimizer = front()
    train(case, optimizer, 1)
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None
    assert not case.model._forward_pre_hooks


# --- who steps ------------------------------------------------------------------------------------------------------------
def test_the_base_optimizer_does_not_step_alone() -> None:
    case, optimizer = front()
    backward(case, optimizer, case.x, case.t)
    before = weights(case)
    with pytest.raises(RuntimeError, match=r"base of a PreconditionedOptimizer.*raw gradient"):
        optimizer.base_optimizer.step()
    assert same(weights(case), before)
    optimizer.step()
    with pytest.raises(RuntimeError, match="raw gradient"):
        optimizer.base_optimizer.step()


def test_after_remove_the_front_door_is_closed() -> None:
    case, optimizer = front()
    optimizer.maker.remove()
    backward(case, optimizer, case.x, case.t)
    with pytest.raises(RuntimeError, match="hooks of the maker were removed"):
        optimizer.step()
    optimizer.base_optimizer.step()  # free again


def test_one_maker_and_one_base_for_each() -> None:
    case, optimizer = front()
    with pytest.raises(ValueError, match="attached already"):
        gm.PreconditionedOptimizer(optimizer.maker, sgd(case), likelihood="categorical")
    other: Any = gm.ShampooGradientMaker(case.model)
    with pytest.raises(ValueError, match="attached to this optimizer already"):
        gm.PreconditionedOptimizer(other, optimizer.base_optimizer)
    with pytest.raises(ValueError, match="attached to this optimizer already"):
        other.attach(optimizer.base_optimizer)
    with pytest.raises(ValueError, match=r"preconditions .* as well"):
        other.attach(optimizer)
    with pytest.raises(TypeError, match="got PreconditionedOptimizer"):
        gm.PreconditionedOptimizer(other, optimizer)
    train(case, optimizer, 1)


def test_a_base_with_an_attached_maker_is_refused() -> None:
    case = mlp()
    base = sgd(case)
    maker = gm.KfacGradientMaker(case.model, gm.KfacGradientConfig(ignore=("2",))).attach(base, "categorical")
    with pytest.raises(ValueError, match="attached to this optimizer already"):
        gm.PreconditionedOptimizer(gm.ShampooGradientMaker(case.model), base)
    maker.remove()
    gm.PreconditionedOptimizer(gm.ShampooGradientMaker(case.model), base)


def test_another_maker_may_be_attached_for_other_parameters() -> None:
    case = mlp()
    kfac = gm.KfacGradientMaker(case.model, gm.KfacGradientConfig(ignore=("2",)))
    shampoo = gm.ShampooGradientMaker(case.model, gm.ShampooGradientConfig(ignore=("0",)))
    optimizer = gm.PreconditionedOptimizer(kfac, sgd(case), likelihood="categorical")
    shampoo.attach(optimizer)
    train(case, optimizer)
    assert kfac.step == shampoo.step == STEPS


def test_two_optimizers_on_one_model_each_treat_their_own() -> None:
    found = []
    for apart in (True, False):
        case = mlp()
        first, last = case.model.get_submodule("0"), case.model.get_submodule("2")
        groups = [(first,), (last,)] if apart else [(first, last)]
        made = []
        for modules in groups:
            base = torch.optim.SGD([p for m in modules for p in m.parameters()], 0.05)
            made.append(gm.PreconditionedOptimizer(gm.KfacGradientMaker(case.model), base, likelihood="categorical"))
        for x, t in batches(case):
            case.model.zero_grad()
            case.loss(case.model(x), t).backward()
            for optimizer in made:
                optimizer.step()
        found.append(weights(case))
    close(found[0], found[1])


# --- refusals -------------------------------------------------------------------------------------------------------------
def test_what_does_not_go_together_is_refused_at_once() -> None:
    case = mlp()
    maker: Any = gm.KfacGradientMaker(case.model)
    hooks = len(case.model._forward_pre_hooks)
    for wrong in (gm.GradientMaker(case.model), "kfac"):
        with pytest.raises(TypeError, match="maker: expected"):
            gm.PreconditionedOptimizer(wrong, sgd(case))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="base_optimizer: expected"):
        gm.PreconditionedOptimizer(maker, torch.optim.SGD)  # type: ignore[arg-type]
    for bad in (0, -1.0, float("nan"), "1", True):
        with pytest.raises(ValueError, match="max_norm"):
            gm.PreconditionedOptimizer(maker, sgd(case), max_norm=bad, likelihood="categorical")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="LBFGS"):
        gm.PreconditionedOptimizer(maker, torch.optim.LBFGS(case.model.parameters()), likelihood="categorical")
    with pytest.raises(ValueError, match="holds no parameter"):
        gm.PreconditionedOptimizer(maker, sgd(mlp()), likelihood="categorical")
    with pytest.raises(ValueError, match="differentiate or repeat"):
        gm.PreconditionedOptimizer(gm.HessianFreeGradientMaker(case.model), sgd(case))
    assert len(case.model._forward_pre_hooks) == hooks
    gm.PreconditionedOptimizer(maker, sgd(case), likelihood="categorical")


BASES: dict[str, Any] = {
    "root mean square": lambda p: torch.optim.AdamW(p, 0.1),
    "own root": lambda p: torch.optim.RMSprop(p, 0.1),
    "signs": lambda p: torch.optim.Rprop(p, 0.1),
    "signs of P g": lambda p: type("Lion", (torch.optim.SGD,), {})(p, 0.1),
}


@pytest.mark.parametrize("reason", BASES)
def test_a_base_that_undoes_the_method_is_warned_of(reason: str) -> None:
    with pytest.warns(gm.BaseOptimizerWarning, match=f"{reason}.*use torch.optim.SGD"):
        front(base=lambda case: BASES[reason](case.model.parameters()))


def test_a_second_average_is_refused_at_once_and_when_it_comes() -> None:
    with pytest.raises(ValueError, match=r"beta1=0.95 .*0\.weight.* momentum=0.9 of SGD"):
        front("soap", base=lambda case: sgd(case, momentum=0.9))
    case, optimizer = front("soap")
    train(case, optimizer, 1)
    optimizer.param_groups[0]["momentum"] = 0.8  # as a scheduler cycles it
    backward(case, optimizer, case.x, case.t)
    before = weights(case)
    with pytest.raises(ValueError, match=r"momentum=0\.8"):
        optimizer.step()
    assert same(weights(case), before) and optimizer.maker.step == 1
    case, optimizer = front("soap", base=lambda case: sgd_of(case.model[0]))
    with pytest.raises(ValueError, match=r"momentum=0\.9"):
        optimizer.add_param_group({"params": case.model.get_submodule("2").parameters(), "momentum": 0.9})
    assert len(optimizer.param_groups) == 1


def test_momentum_beside_a_method_without_an_average() -> None:
    case = mlp()
    maker = gm.KfacGradientMaker(case.model, gm.KfacGradientConfig(fallback="adam", ignore=("2",)))
    gm.PreconditionedOptimizer(maker, sgd(case, momentum=0.9), likelihood="categorical")


# --- numbers --------------------------------------------------------------------------------------------------------------
def test_metrics_are_numbers_of_the_last_step() -> None:
    case, optimizer = front(options={"curvature_interval": 3, "preconditioner_interval": 3, "warmup_steps": 0, "damping": 0.01})
    assert str(optimizer.metrics()["steps_since_measurement"]) == "nan"
    ages = []
    for x, t in batches(case, 5):
        backward(case, optimizer, x, t)
        optimizer.step()
        found = optimizer.metrics()
        ages.append((found["steps_since_measurement"], found["steps_since_refresh"]))
        assert found["seconds"] > 0 and all(type(v) is float for v in found.values())
    assert ages == [(0, 0), (1, 1), (2, 2), (0, 0), (1, 1)]
    assert found["damping"] == 0.01 and found["skipped"] == found["failed_refreshes"] == 0 and found["clip_factor"] == 1


def test_a_fallback_has_numbers_of_its_own() -> None:
    case, optimizer = front(case=bare_scale(), options={"fallback": "adam"})
    train(case, optimizer, 1)
    assert {"damping", "damping/fallback", "steps_since_refresh/fallback"} <= set(optimizer.metrics())


# --- compiled models ------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_was_compiled_before_raises_where_a_measurement_is_due() -> None:
    torch._dynamo.reset()
    case = mlp()
    compiled: Any = torch.compile(case.model, backend="eager")
    case.loss(compiled(case.x), case.t).backward()
    _, optimizer = front(case=case)
    before = weights(case)
    backward(case._replace(model=compiled), optimizer, case.x, case.t)
    with pytest.raises(RuntimeError, match="measurement of the curvature is due"):
        optimizer.step()
    assert same(weights(case), before)
