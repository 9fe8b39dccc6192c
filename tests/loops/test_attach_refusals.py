"""Attached: what is due and does not arrive, what the optimizer does not hold, who else rides on it, what changed ``.grad``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradmaker as gm
from gradmaker.loops.attachment import ChangedGradientWarning
from tests.loops.test_attach import CONFIGS, batches, maker_of
from tests.models import Case, mlp
from tests.test_state import equal_states

Act = Callable[[Case, Any], None]


def attach(method: str = "kfac_exact", case: Case | None = None, **options: Any) -> tuple[Case, Any, Any]:
    case = mlp() if case is None else case
    optimizer = torch.optim.SGD(case.model.parameters(), 0.1)
    return case, optimizer, maker_of(case.model, CONFIGS[method]()).attach(optimizer, "categorical", **options)


# --- what is due and does not arrive --------------------------------------------------------------------------------------
class Inside(nn.Module):
    """A loss of its own making inside; what is returned beside it is no part of it."""

    def __init__(self, shown: str) -> None:
        super().__init__()
        self.layer, self.shown = nn.Linear(4, 3), shown

    def forward(self, x: Tensor, t: Tensor) -> Any:
        z = self.layer(x)
        loss = -z.log_softmax(-1).gather(1, t.unsqueeze(1)).mean()
        shown = {"cast": z.float(), "clone": z.clone(), "detached": z.detach(), "nothing": None}[self.shown]
        return SimpleNamespace(loss=loss, logits=shown) if shown is not None else {"loss": loss, "logits": x}


@pytest.mark.parametrize("shown", ["cast", "clone", "detached", "nothing"])
@pytest.mark.parametrize("method", ["kfac_exact", "kfac_emp", "unit_ng"])
def test_a_loss_that_does_not_go_through_what_is_watched(method: str, shown: str) -> None:
    model = Inside(shown).double()
    case, optimizer, maker = attach(method, mlp()._replace(model=model))
    before = maker.state_dict()["sites"]
    output = model(case.x, case.t)
    (output["loss"] if isinstance(output, dict) else output.loss).backward()
    gradient = model.layer.weight.grad.clone()  # type: ignore[operator, union-attr]
    with pytest.raises(RuntimeError, match=r"due, and the loss brought no gradient to .*setup_model_call"):
        optimizer.step()
    assert torch.equal(gradient, model.layer.weight.grad)  # type: ignore[arg-type]
    assert maker.step == 0 and equal_states(maker.state_dict()["sites"], before)


def replace_gradients(case: Case, optimizer: Any) -> None:
    case.run().backward()
    for p in case.model.parameters():
        p.grad = p.grad * 0.5  # type: ignore[operator]


def parts_called(case: Case, optimizer: Any) -> None:
    h = case.x
    for child in case.model.children():
        h = child(h)
    case.loss(h, case.t).backward()


def evaluated_last(case: Case, optimizer: Any) -> None:
    """No gradients are zeroed after what is no pass of the model."""
    sum(p.square().sum() for p in case.model.parameters()).backward()  # type: ignore[union-attr]


ABSENT: list[tuple[Act, str]] = [
    (replace_gradients, r"do not replace \.grad by other tensors"),
    (parts_called, r"parts of the model are called instead of the model itself"),
    (evaluated_last, r"no forward pass of the model was seen"),
]


@pytest.mark.parametrize("method", ["kfac_exact", "kfac_emp"])
@pytest.mark.parametrize(("act", "text"), ABSENT)
def test_no_pass_was_measured(act: Act, text: str, method: str) -> None:
    case, optimizer, maker = attach(method)
    act(case, optimizer)
    with pytest.raises(RuntimeError, match=text):
        optimizer.step()
    optimizer.zero_grad()
    case.run().backward()
    optimizer.step()
    assert maker.step == 1 and not maker.silent()


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_was_compiled_before() -> None:
    torch._dynamo.reset()
    case = mlp()
    compiled: Any = torch.compile(case.model, backend="eager")
    case.loss(compiled(case.x), case.t).backward()
    case.model.zero_grad()
    _, optimizer, _ = attach(case=case)
    with pytest.raises(RuntimeError, match=r"compiled and called before attach\(\)"):
        case.loss(compiled(case.x), case.t).backward()
        optimizer.step()


def nothing(case: Case, optimizer: Any) -> None: ...


def zeros(case: Case, optimizer: Any) -> None:
    for p in case.model.parameters():
        p.grad = torch.zeros_like(p)


def zeroed(case: Case, optimizer: Any) -> None:
    case.run().backward()
    optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize("method", ["kfac_exact", "kfac_mc", "adam", "shampoo"])
@pytest.mark.parametrize("act", [nothing, zeros])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_step_without_a_pass_changes_nothing(steps: int, act: Act, method: str) -> None:
    """As that by which a fresh optimizer is made to fill its state before a checkpoint is read."""
    results = []
    for disturbed in (False, True):
        case, optimizer, maker = attach(method)
        for k in range(4):
            if disturbed and k == steps:
                before = [p.detach().clone() for p in case.model.parameters()]
                act(case, optimizer)
                optimizer.step()
                assert all(torch.equal(p, b) for p, b in zip(case.model.parameters(), before, strict=True))
            optimizer.zero_grad()
            case.run().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(maker.state_dict())
    assert equal_states(*results)


def test_a_measured_pass_that_was_zeroed_is_no_step() -> None:
    case, optimizer, maker = attach()
    before = maker.state_dict()["sites"]
    zeroed(case, optimizer)
    optimizer.step()
    assert maker.step == 0 and equal_states(maker.state_dict()["sites"], before)


def test_a_state_that_is_loaded_in_the_middle_of_a_step_drops_its_passes() -> None:
    case, optimizer, maker = attach()
    saved = copy.deepcopy(maker.state_dict())
    case.run().backward()
    maker.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="a measurement of the curvature is due"):
        optimizer.step()
    assert equal_states(maker.state_dict()["sites"], saved["sites"])


# --- what the optimizer does not hold -------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["adam", "shampoo", "kfac_exact", "kfac_emp", "unit_ng", "full_ng"])
@pytest.mark.parametrize("held", [0, 2])
def test_parameters_that_the_optimizer_leaves_out_are_left_alone(held: int, method: str) -> None:
    """Nobody zeroes their gradients: they add up. What is held goes as where the rest is frozen."""
    results = []
    for frozen in (False, True):
        case = mlp()
        part = case.model.get_submodule(str(held))
        rest = [p for p in case.model.parameters() if all(p is not q for q in part.parameters())]
        if frozen:
            for p in rest:
                p.requires_grad_(False)
        optimizer = torch.optim.SGD(part.parameters(), 0.05)
        config = CONFIGS[method]()
        if method.startswith("kfac"):  # else refreshes fall where the number of blocks puts them
            config = replace(config, stagger=False)
        maker = maker_of(case.model, config).attach(optimizer, "categorical")
        total = [torch.zeros_like(p) for p in rest]
        for x, t in batches(case):
            optimizer.zero_grad()
            loss = case.loss(case.model(x), t)
            if not frozen:
                for g, more in zip(total, torch.autograd.grad(loss, rest, retain_graph=True), strict=True):
                    g += more
            loss.backward()
            optimizer.step()
        assert maker.skipped == 0 and maker.step == 7
        if not frozen:
            assert all(torch.allclose(p.grad, g, rtol=1e-12) for p, g in zip(rest, total, strict=True))  # type: ignore[arg-type]
        results.append([p.detach() for p in case.model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_gradients_left_out_that_overflow_skip_no_step() -> None:
    case = mlp()
    optimizer = torch.optim.SGD(case.model.get_submodule("2").parameters(), 0.05)
    maker = maker_of(case.model, CONFIGS["kfac_emp"]()).attach(optimizer, "categorical")
    weight: Any = case.model.get_submodule("0").weight
    weight.grad = torch.full_like(weight, float("inf"))
    case.run().backward()
    optimizer.step()
    assert (maker.step, maker.skipped) == (1, 0)


def test_groups_that_are_added_later_are_followed() -> None:
    case = mlp()
    optimizer = torch.optim.SGD(case.model.get_submodule("2").parameters(), 0.0)
    maker = maker_of(case.model, CONFIGS["kfac_exact"]()).attach(optimizer, "categorical")
    for k in range(2):
        optimizer.zero_grad()
        case.run().backward()
        gradient = case.model.get_submodule("0").weight.grad.clone()  # type: ignore[operator, union-attr]
        optimizer.step()
        assert torch.equal(gradient, case.model.get_submodule("0").weight.grad) == (k == 0)  # type: ignore[arg-type]
        assert maker.silent() == (["0"] if k == 0 else [])
        if k == 0:
            optimizer.add_param_group({"params": list(case.model.get_submodule("0").parameters())})


def test_a_block_in_part_and_no_parameter_at_all_are_refused() -> None:
    case, other = mlp(), mlp()
    weight: Any = case.model.get_submodule("0").weight
    maker = maker_of(case.model, CONFIGS["kfac_exact"]())
    with pytest.raises(ValueError, match=r"0\.weight and 0\.bias are preconditioned as one block, .* holds 0\.weight alone"):
        maker.attach(torch.optim.SGD([weight], 0.1), "categorical")
    with pytest.raises(ValueError, match="this optimizer holds no parameter of the maker's model"):
        maker.attach(torch.optim.SGD(other.model.parameters(), 0.1), "categorical")
    maker_of(case.model, CONFIGS["shampoo"]()).attach(torch.optim.SGD([weight], 0.1)).remove()
    optimizer = torch.optim.SGD(case.model.get_submodule("2").parameters(), 0.1)
    maker.attach(optimizer, "categorical")
    optimizer.add_param_group({"params": [weight]})
    with pytest.raises(ValueError, match="preconditioned as one block"):
        case.model(case.x)


# --- who else rides on it -------------------------------------------------------------------------------------------------
def test_one_maker_for_each_optimizer() -> None:
    case, optimizer, maker = attach()
    for second in (optimizer, torch.optim.SGD(case.model.parameters(), 0.1)):
        with pytest.raises(ValueError, match="one maker for each optimizer"):
            maker.attach(second, "categorical")
    with pytest.raises(ValueError, match=r"KfacGradientMaker is attached to this optimizer and preconditions 0\.weight"):
        maker_of(case.model, CONFIGS["shampoo"]()).attach(optimizer)
    apart = gm.ShampooGradientConfig(ignore=("0",))
    maker.remove()
    maker_of(case.model, apart).attach(optimizer)
    rest = maker_of(case.model, gm.KfacGradientConfig(ignore=("2",))).attach(optimizer, "categorical")
    case.run().backward()
    optimizer.step()
    assert rest.step == 1
    maker.attach(torch.optim.SGD(case.model.parameters(), 0.1), "categorical")


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another, which never runs `Optimizer.__init__`."""

    def __init__(self, name: str, inner: Any) -> None:
        vars(self)[name] = inner
        self.inner, self.param_groups = [inner], inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner[0].step(closure)


@pytest.mark.parametrize("name", ["optimizer", "base", "base_optimizer", "twice"])
@pytest.mark.parametrize("method", ["kfac_exact", "shampoo"])
def test_optimizers_that_wrap_another(method: str, name: str) -> None:
    results = []
    for wrapped in (True, False):
        case = mlp()
        optimizer: Any = torch.optim.SGD(case.model.parameters(), 0.05)
        if wrapped:
            optimizer = Wrapper("base", Wrapper("optimizer", optimizer)) if name == "twice" else Wrapper(name, optimizer)
        maker = maker_of(case.model, CONFIGS[method]()).attach(optimizer, "categorical")
        case.run().backward()
        optimizer.step()
        assert maker.step == 1
        results.append([p.detach() for p in case.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_calls_no_hooks_is_refused() -> None:
    case = mlp()
    unknown = Wrapper("held", torch.optim.SGD(case.model.parameters(), 0.05))
    with pytest.raises(TypeError, match=r"Wrapper calls no hooks at its step\(\)"):
        gm.AdamGradientMaker(case.model).attach(unknown)
    with pytest.raises(TypeError, match="int calls no hooks"):
        gm.AdamGradientMaker(case.model).attach(3)  # type: ignore[arg-type]


# --- changes between backward and step ------------------------------------------------------------------------------------
def by_norm(case: Case) -> None:
    nn.utils.clip_grad_norm_(case.model.parameters(), 0.1)


def by_value(case: Case) -> None:
    nn.utils.clip_grad_value_(case.model.parameters(), 0.01)


def noise(case: Case) -> None:
    for p in case.model.parameters():
        p.grad += 0.1  # type: ignore[operator]


def look_only(case: Case) -> None:
    nn.utils.get_total_norm(p.grad for p in case.model.parameters())


def by_infinity(case: Case) -> None:
    """As trainers read the norm where they do not clip: every gradient is multiplied by one."""
    nn.utils.clip_grad_norm_(case.model.parameters(), float("inf"))


@pytest.mark.parametrize("method", ["kfac_exact", "kfac_emp", "shampoo", "adam"])
@pytest.mark.parametrize(("change", "times"), [(by_norm, 1), (by_value, 1), (noise, 1), (look_only, 0), (by_infinity, 0)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_changed_gradient_is_told_of_once(accumulation: int, change: Any, times: int, method: str) -> None:
    case, optimizer, maker = attach(method, accumulation=accumulation)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(5):
            optimizer.zero_grad()
            for _ in range(accumulation):
                (case.run() / accumulation).backward()
            change(case)
            optimizer.step()
    assert [w.category for w in found] == [ChangedGradientWarning] * times
    assert maker.step == 5


@pytest.mark.parametrize("method", ["kfac_exact", "kfac_emp"])
def test_a_step_whose_gradients_are_spoiled_leaves_the_statistics(method: str) -> None:
    case, optimizer, maker = attach(method)
    before = maker.state_dict()["sites"]
    case.run().backward()
    case.model.get_submodule("0").weight.grad.fill_(float("nan"))  # type: ignore[operator, union-attr]
    with pytest.warns(ChangedGradientWarning):
        optimizer.step()
    assert (maker.step, maker.skipped) == (1, 1) and equal_states(maker.state_dict()["sites"], before)
