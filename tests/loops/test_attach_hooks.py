"""Attached: hooks stay on only while they must, and what borrows the model, copies it or transforms it meets none of them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import gradmaker as gm
from gradmaker.curvature import FisherEmp, FisherExact
from tests.loops.test_attach import CONFIGS, batches, close, maker_of
from tests.models import Case, build, checkpointed, convolution, mlp
from tests.test_state import equal_states


class Scaled(nn.Module):
    """A parameter of the model itself: its gradients by example come from further calls of the whole model."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scale * self.body(x)
        return y


class Repeated(Scaled):
    """`torch.func` enters no checkpoint: the model is called with gradients, one example at a time."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scale * checkpoint(self.body, x, use_reentrant=False)
        return y


class Recursive(nn.Module):
    """The model calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        if depth:
            h: Tensor = self(self.layer(x).tanh(), depth - 1)
            return h
        y: Tensor = self.head(x)
        return y


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.embedding(x))
        return y


def scaled() -> Case:
    return build(Scaled, 6, 4)


def repeated() -> Case:
    return build(Repeated, 6, 4)


def recursive() -> Case:
    return build(Recursive, 6, 4)


def tied() -> Case:
    model = build(Tied, 6, 4).model
    x = torch.arange(12).reshape(4, 3) % 5
    return Case(model, x, x.roll(1, 1), lambda y, t: F.cross_entropy(y.flatten(0, 1), t.flatten()))


# --- borrowed calls -------------------------------------------------------------------------------------------------------
def declared(case: Case, config: Any) -> list[Tensor]:
    maker, optimizer = maker_of(case.model, config), torch.optim.SGD(case.model.parameters(), 0.02)
    for _ in range(3):
        optimizer.zero_grad()
        maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
        maker.forward_and_backward()
        optimizer.step()
    return [p.detach().clone() for p in case.model.parameters()]


def attached(case: Case, config: Any, act: Callable[[Any, Case], None] | None = None, likelihood: Any = "categorical") -> Any:
    optimizer = torch.optim.SGD(case.model.parameters(), 0.02)
    maker = maker_of(case.model, config).attach(optimizer, likelihood)
    for _ in range(3):
        optimizer.zero_grad()
        if act:
            act(maker, case)
        case.run().backward()
        optimizer.step()
    assert maker.step == 3
    return [p.detach().clone() for p in case.model.parameters()]


FISHERS = [FisherExact(), FisherEmp()]
GENERIC: list[Callable[[Any], Any]] = [
    lambda fisher: gm.UnitNaturalGradientConfig(fisher=fisher),
    lambda fisher: gm.FullNaturalGradientConfig(fisher=fisher),
    lambda fisher: gm.LayerNaturalGradientConfig(fisher=fisher),
    lambda fisher: gm.DiagonalNaturalGradientConfig(fisher=fisher),
]


@pytest.mark.parametrize("make", [scaled, repeated, recursive, tied])
@pytest.mark.parametrize("fisher", FISHERS, ids=["exact", "emp"])
@pytest.mark.parametrize("config", GENERIC, ids=["unit", "full", "layer", "diagonal"])
def test_calls_that_measure_are_no_passes(config: Any, fisher: Any, make: Callable[[], Case]) -> None:
    close(attached(make(), config(fisher)), declared(make(), config(fisher)))


def look(maker: Any, case: Case) -> None:
    maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
    assert maker.verify().passed


def other_maker(maker: Any, case: Case) -> None:
    """Declared calls of another maker on the same model, whose gradient is zeroed before the step's own."""
    other = gm.UnitNaturalGradientMaker(case.model)
    other.setup_loss_call(case.loss, other.setup_model_call(case.model, 2 * case.x), case.t)
    other.forward_and_backward()
    case.model.zero_grad()


def a_copy(maker: Any, case: Case) -> None:
    copy.deepcopy(case.model)(case.x)


@pytest.mark.parametrize("act", [look, other_maker, a_copy])
@pytest.mark.parametrize("name", ["kfac_exact", "kfac_emp", "kfac_mc", "shampoo"])
def test_what_else_uses_the_model_leaves_no_trace(name: str, act: Any) -> None:
    found, expected = attached(scaled(), CONFIGS[name](), act), attached(scaled(), CONFIGS[name]())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("fisher", FISHERS, ids=["exact", "emp"])
def test_two_makers_on_the_two_halves_of_a_model(fisher: Any) -> None:
    """Each measures as if it were alone, in the same backward pass."""
    states = []
    for chosen in ((0, 1), (0,), (1,)):
        case = mlp()
        halves = [case.model.get_submodule(k) for k in ("0", "2")]
        optimizers = [torch.optim.SGD(m.parameters(), 0.0) for m in halves]
        config = gm.KfacGradientConfig(fisher=fisher)
        makers = {j: maker_of(case.model, config).attach(optimizers[j], "categorical") for j in chosen}
        for x, t in batches(case, 3):
            for o in optimizers:
                o.zero_grad()
            case.loss(case.model(x), t).backward()
            for o in optimizers:
                o.step()
        states.append({j: m.state_dict() for j, m in makers.items()})
    assert equal_states(states[0], {**states[1], **states[2]})


def test_declared_calls_of_an_attached_maker_are_refused() -> None:
    case = mlp()
    maker = gm.KfacGradientMaker(case.model).attach(torch.optim.SGD(case.model.parameters(), 0.1), "categorical")
    maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
    with pytest.raises(RuntimeError, match="this maker is attached to a loop"):
        maker.forward_and_backward()
    maker.remove()
    maker.forward_and_backward()


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x * self.factor
        return y


class Mixed(nn.Module):
    """What a layer-wise method and its fallback measure lies in a reentrant checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale, self.last = nn.Linear(4, 5), Scale(), nn.Linear(5, 3)

    def block(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.scale(self.first(x).tanh()))
        return y

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.block, x.clone().requires_grad_(), use_reentrant=True)
        return y


@pytest.mark.parametrize(("fisher", "fallback"), [(FisherExact(), "smw_ng"), (FisherEmp(), "diag_ng")])
def test_extra_passes_and_the_main_one_through_a_reentrant_checkpoint(fisher: Any, fallback: str) -> None:
    """One curvature is pulled back by passes of its own, the other comes with the loop's."""
    config = gm.KfacGradientConfig(fisher=fisher, fallback=fallback)
    found, expected = attached(build(Mixed, 6, 4), config), declared(build(Mixed, 6, 4), config)
    close(found, expected)


# --- hooks on modules -----------------------------------------------------------------------------------------------------
def module_hooks(model: nn.Module) -> int:
    stores = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, store)) for m in model.modules() for store in stores)


MODELS: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "convolution": convolution,
    "checkpoint": lambda: checkpointed(False),
    "reentrant": lambda: checkpointed(True),
    "generic": scaled,
    "recursive": recursive,
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["kfac_exact", "kfac_emp", "unit_ng", "shampoo"])
def test_modules_hold_nothing_after_the_forward_pass(name: str, model: str) -> None:
    """But for the one that waits for the model's calls. A reentrant checkpoint calls its modules again during backward."""
    case = MODELS[model]()
    optimizer = torch.optim.SGD(case.model.parameters(), 0.1)
    maker = maker_of(case.model, CONFIGS[name]()).attach(optimizer, "categorical")
    for _ in range(2):
        optimizer.zero_grad()
        loss = case.run()
        assert module_hooks(case.model) == 1 or model == "reentrant"
        loss.backward()
        assert module_hooks(case.model) == 1
        optimizer.step()
        assert module_hooks(case.model) == 1
    maker.remove()
    assert module_hooks(case.model) == 0


def test_modules_hold_nothing_after_an_exception_in_the_forward_pass() -> None:
    case = mlp()
    maker = gm.KfacGradientMaker(case.model).attach(torch.optim.SGD(case.model.parameters(), 0.1), "categorical")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        case.model(case.x[:, :2])
    assert module_hooks(case.model) == 1
    assert torch.overrides._get_current_function_mode_stack() == []
    assert maker.step == 0


# --- copies ---------------------------------------------------------------------------------------------------------------
COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "save": lambda m: torch.save(m, io.BytesIO()),
    "average": lambda m: AveragedModel(m),
}


MOMENTS = ["after forward", "after backward", "after step"]


@pytest.mark.parametrize("when", MOMENTS)
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("model", ["mlp", "reentrant", "generic"])
@pytest.mark.parametrize("name", ["kfac_exact", "kfac_emp"])
def test_the_model_may_be_copied_at_any_moment(name: str, model: str, how: str, when: str) -> None:
    results = []
    for copied in (True, False):
        case = MODELS[model]()
        optimizer = torch.optim.SGD(case.model.parameters(), 0.1)
        maker = maker_of(case.model, CONFIGS[name]()).attach(optimizer, "categorical")
        for _ in range(2):
            optimizer.zero_grad()
            copying = [(COPIES[how] if copied and when == moment else id) for moment in MOMENTS]
            loss = case.run()
            copying[0](case.model)
            loss.backward()
            copying[1](case.model)
            optimizer.step()
            copying[2](case.model)
        results.append((maker.state_dict(), [p.detach() for p in case.model.parameters()]))
    assert equal_states(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("how", [copy.deepcopy, COPIES["pickle"]], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["adam", "shampoo", "kfac_exact", "kfac_mc", "unit_ng", "full_ng"])
def test_a_copied_maker_is_detached_and_goes_on_when_attached(name: str, how: Any) -> None:
    case = mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), 0.02)
    maker = maker_of(case.model, CONFIGS[name]()).attach(optimizer, "categorical")

    def train(model: nn.Module, optimizer: Any) -> None:
        for x, t in batches(case, 3):
            optimizer.zero_grad()
            case.loss(model(x), t).backward()
            optimizer.step()

    train(case.model, optimizer)
    clone: Any = how(maker)
    assert module_hooks(clone.model) == 0 or not any(getattr(h, "owner", None) for h in clone.model._forward_pre_hooks.values())
    other = torch.optim.SGD(clone.model.parameters(), 0.02)
    train(case.model, optimizer)
    assert clone.step == 3 and maker.step == 6
    clone.attach(other, "categorical")
    train(clone.model, other)
    assert equal_states(clone.state_dict(), maker.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(clone.model.parameters(), case.model.parameters(), strict=True))


# --- compiled models ------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["kfac_exact", "kfac_emp"])
def test_a_model_that_is_compiled_afterwards(name: str) -> None:
    results = []
    for compiled in (True, False):
        torch._dynamo.reset()
        case = mlp()
        optimizer = torch.optim.SGD(case.model.parameters(), 0.02)
        maker = maker_of(case.model, CONFIGS[name]()).attach(optimizer, "categorical")
        call: Any = torch.compile(case.model, backend="eager") if compiled else case.model
        for x, t in batches(case, 3):
            optimizer.zero_grad()
            case.loss(call(x), t).backward()
            optimizer.step()
        assert maker.step == 3 and not maker.silent()
        results.append([p.detach() for p in case.model.parameters()])
    close(*results)
