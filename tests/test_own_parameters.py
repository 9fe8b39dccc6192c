"""At every step the parameters are those that the maker was made for, or an error says which is not."""

from __future__ import annotations

import copy
import io
import pickle
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.utils import parametrizations, prune

from gradmaker import METHODS

ALL = [m for m in METHODS if m not in ("custom", "gradient")]
LOOPS = ["declared", "attached", "own passes"]


class Net(nn.Module):
    """Two trained layers of equal shape, a norm, a frozen layer, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.still = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(torch.tanh(self.second(self.still(torch.tanh(self.first(x)))))))
        return y


def chain() -> nn.Module:
    """A model that every method takes."""
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


def batch(like: nn.Module) -> tuple[Tensor, Tensor]:
    first = next(like.parameters())
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    return x.to(first.device, first.dtype), torch.arange(6, device=first.device) % 3


class Loop:
    """Steps of one kind of loop."""

    def __init__(self, kind: str, model: nn.Module, method: str, **options: Any) -> None:
        self.kind, self.model = kind, model
        maker: Any = METHODS[method]
        self.maker = maker(model, maker.Config(**options))
        self.optimizer = torch.optim.SGD(model.parameters(), 0.01)
        if kind == "attached":
            self.maker.attach(self.optimizer, "categorical")

    def step(self) -> None:
        x, t = batch(self.model)
        self.optimizer.zero_grad()
        if self.kind == "declared":
            self.maker.setup_loss_call(F.cross_entropy, self.maker.setup_model_call(self.model, x), t)
            self.maker.forward_and_backward()
        else:
            F.cross_entropy(self.model(x), t).backward()
            if self.kind == "own passes":
                self.maker.precondition()
        self.optimizer.step()


# --- what may not change --------------------------------------------------------------------------------------------------
def assign(m: Any) -> None:
    m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True)


def empty(m: Any) -> None:
    """As to_empty does from the meta device: another object under the same name."""
    m.second.bias = nn.Parameter(torch.zeros(4))


def new_head(m: Any) -> None:
    m.head = nn.Linear(4, 3)


def pruned(m: Any) -> None:
    prune.l1_unstructured(m.first, "weight", 0.25)


def parametrized(m: Any) -> None:
    parametrizations.orthogonal(m.second)


def double(m: Any) -> None:
    m.double()


def half_of_it(m: Any) -> None:
    m.norm.bfloat16().double()


def elsewhere(m: Any) -> None:
    m.to("meta")


def tied(m: Any) -> None:
    m.second.weight = m.first.weight


def thawed(m: Any) -> None:
    m.still.weight.requires_grad_(True)


def further(m: Any) -> None:
    m.adapter = nn.Linear(4, 4)


def further_parameter(m: Any) -> None:
    m.first.register_parameter("gate", nn.Parameter(torch.ones(4)))


def taken_out(m: Any) -> None:
    m.second = nn.Identity()


def no_bias(m: Any) -> None:
    m.first.bias = None


def half_frozen(m: Any) -> None:
    m.first.weight.requires_grad_(False)


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "assigned": (assign, "first.weight was replaced by another Parameter"),
    "another object": (empty, "second.bias was replaced"),
    "new head": (new_head, "head.weight is no part of the model any more"),
    "pruned": (pruned, "first.weight is held as first.weight_orig now"),
    "parametrized": (parametrized, "second.weight is held as second.parametrizations.weight.original now"),
    "dtype": (double, "first.weight has the dtype torch.float64 now and had torch.float32"),
    "dtype of one": (half_of_it, "norm.weight has the dtype torch.float64"),
    "device": (elsewhere, "first.weight was replaced"),
    "tied": (tied, "second.weight was replaced"),
    "thawed": (thawed, "still.weight was frozen when the maker was made and trains now"),
    "further module": (further, "adapter.weight was added to the model"),
    "further parameter": (further_parameter, "first.gate was added to the model"),
    "taken out": (taken_out, "second.weight is no part of the model"),
    "bias taken out": (no_bias, "first.bias is no part of the model"),
    "half frozen": (half_frozen, "first.weight does not require gradients any more, and first.bias"),
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("change", CHANGES)
def test_the_next_step_names_the_parameter_that_is_another(change: str, loop: str) -> None:
    if loop == "own passes" and change in ("device", "dtype of one"):
        pytest.skip("the pass itself fails")
    model = Net()
    ride = Loop(loop, model, "kfac" if loop != "own passes" else "shampoo")
    ride.step()
    state, (how, sentence) = copy.deepcopy(ride.maker.state_dict()), CHANGES[change]
    if change == "half frozen" and loop == "own passes":
        pytest.skip("each tensor is a block of its own")
    how(model)
    with pytest.raises(ValueError, match=sentence.replace(".", r"\.")) as error:
        ride.step()
    assert "make a new one" in str(error.value)
    after = ride.maker.state_dict()
    assert str(after) == str(state)


def test_verify_looks_at_the_parameters_first() -> None:
    model = Net()
    ride = Loop("declared", model, "kfac")
    ride.step()
    assert ride.maker.verify().passed
    new_head(model)
    with pytest.raises(ValueError, match=r"head\.weight is no part of the model any more"):
        ride.maker.verify()


@pytest.mark.parametrize("method", ALL)
def test_no_method_steps_on_parameters_that_were_replaced(method: str) -> None:
    model = chain()
    ride = Loop("declared", model, method)
    ride.step()
    assign(model)
    kept = [torch.ones_like(p) for p in model.parameters()]
    for p, g in zip(model.parameters(), kept, strict=True):
        p.grad = g
    x, t = batch(model)
    ride.maker.setup_loss_call(F.cross_entropy, ride.maker.setup_model_call(model, x), t)
    with pytest.raises(ValueError, match=r"0\.weight was replaced"):
        ride.maker.forward_and_backward()
    assert all(p.grad is g and bool((g == 1).all()) for p, g in zip(model.parameters(), kept, strict=True))


def test_a_maker_made_anew_goes_on() -> None:
    model = Net()
    ride = Loop("declared", model, "kfac")
    ride.step()
    assign(model)
    again = Loop("declared", model, "kfac")
    again.maker.load_state_dict(ride.maker.state_dict())
    again.step()
    assert again.maker.step == 2


# --- what may ------------------------------------------------------------------------------------------------------------
class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


def wrapped(m: Any) -> None:
    m.second = Wrapped(m.second)


def without_parameters(m: Any) -> None:
    m.more = nn.Tanh()


def further_but_frozen(m: Any) -> None:
    m.teacher = nn.Linear(4, 4).requires_grad_(False)


def in_place(m: Any) -> None:
    m.load_state_dict({k: torch.randn_like(v) for k, v in m.state_dict().items()})


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("change", [wrapped, without_parameters, further_but_frozen, in_place])
def test_what_leaves_the_parameters_as_they_are_is_followed(change: Callable[[Any], None], loop: str) -> None:
    model = Net()
    ride = Loop(loop, model, "adam")
    ride.step()
    change(model)
    for _ in range(2):
        ride.step()
    assert ride.maker.step == 3 and not ride.maker.silent()


@pytest.mark.parametrize("change", [thawed, lambda m: setattr(m, "still", nn.Linear(4, 4))])
def test_what_was_left_out_by_name_may_become_anything(change: Callable[[Any], None]) -> None:
    model = Net()
    ride = Loop("declared", model, "kfac", ignore=("still",))
    ride.step()
    change(model)
    ride.step()
    x, t = batch(model)
    expected = torch.autograd.grad(F.cross_entropy(model(x), t), model.still.weight)[0]
    model.zero_grad()
    ride.maker.setup_loss_call(F.cross_entropy, ride.maker.setup_model_call(model, x), t)
    ride.maker.forward_and_backward()
    assert model.still.weight.grad is not None and torch.allclose(model.still.weight.grad, expected)


@pytest.mark.parametrize("method", ALL)
def test_a_site_that_is_frozen_as_a_whole_rests(method: str) -> None:
    model: Any = chain()
    ride = Loop("declared", model, method)
    ride.step()
    model[2].requires_grad_(False)
    if any(b.full for b in ride.maker.plan.blocks):
        with pytest.raises(ValueError, match=r"2\.weight does not require gradients any more, and 0\.weight, in the same"):
            ride.step()
        return
    before = {k: copy.deepcopy(v) for k, v in ride.maker.state_dict()["sites"].items() if k.startswith("2")}
    stale = model[2].weight.grad = torch.full_like(model[2].weight, 3.0)
    x, t = batch(model)
    ride.maker.setup_loss_call(F.cross_entropy, ride.maker.setup_model_call(model, x), t)
    ride.maker.forward_and_backward()
    assert model[2].weight.grad is stale and bool((stale == 3).all())
    after = ride.maker.state_dict()["sites"]
    for name, kept in before.items():
        for part in kept.keys() - {"cache"}:  # a refresh may turn a basis
            assert str(after[name][part]) == str(kept[part]), (name, part)
    model[2].weight.grad = None
    model[2].requires_grad_(True)
    ride.step()
    assert model[2].weight.grad is not None


@pytest.mark.parametrize("method", ["kfac", "adam", "unit_ng", "shampoo", "full_ng"])
@pytest.mark.parametrize("loop", ["declared", "attached"])
def test_a_discriminator_is_frozen_while_the_generator_learns(loop: str, method: str) -> None:
    """Each network has a maker of its own; the discriminator takes part in the generator's pass."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    discriminator = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    alone = copy.deepcopy(discriminator)  # what sees only its own steps
    makers = {id(m): METHODS[method](m) for m in (generator, discriminator, alone)}
    optimizers = {id(m): torch.optim.SGD(m.parameters(), 0.1) for m in (generator, discriminator, alone)}
    if loop == "attached":
        for m in (discriminator, alone):
            makers[id(m)].attach(optimizers[id(m)], "categorical")  # type: ignore[attr-defined]

    def learn(model: nn.Module, x: Tensor, t: Tensor) -> None:
        maker, optimizer = makers[id(model)], optimizers[id(model)]
        optimizer.zero_grad()
        if loop == "attached":
            F.cross_entropy(model(x), t).backward()
        else:
            maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), t)
            maker.forward_and_backward()
        optimizer.step()

    for index in range(3):
        x, t = torch.randn(6, 4, generator=torch.Generator().manual_seed(index)), torch.arange(6) % 2
        fake = generator(x).detach()
        learn(discriminator, fake, t)
        learn(alone, fake, t)
        discriminator.requires_grad_(False)
        maker = makers[id(generator)]
        optimizers[id(generator)].zero_grad()
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(lambda x: discriminator(generator(x)), x), 1 - t)
        maker.forward_and_backward()
        optimizers[id(generator)].step()
        discriminator.requires_grad_(True)
    for ours, theirs in zip(discriminator.parameters(), alone.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_copy_has_parameters_of_its_own() -> None:
    model = Net()
    maker = METHODS["shampoo"](model)
    model.still.weight.requires_grad_(False)
    for twin, other in (copy.deepcopy((model, maker)), pickle.load(io.BytesIO(pickle.dumps((model, maker))))):
        assert other.plan.own.check()
        new_head(twin)
        with pytest.raises(ValueError, match=r"head\.weight"):
            other.plan.own.check()
    assert maker.plan.own.check()  # type: ignore[attr-defined]


def test_the_check_takes_a_millisecond_for_a_thousand_parameters() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.Tanh()) for _ in range(500)))
    own, times = METHODS["adam"](model).plan.own, []  # type: ignore[attr-defined]
    for _ in range(30):
        start = time.perf_counter()
        own.check()
        times.append(time.perf_counter() - start)
    assert min(times) < 3e-3, f"{min(times) * 1e3:.2f} ms"  # 0.7 ms on an idle core


def _loss_at(model: nn.Module, x: Tensor, t: Tensor, values: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(functional_call(model, values, (x,)), t)


@pytest.mark.parametrize("method", ["adam", "kfac", "shampoo"])
def test_calls_with_other_tensors_are_no_pass_of_an_attached_loop(method: str) -> None:
    """As torch.func makes them, and products with the Hessian forwards."""
    results = []
    for between in (False, True):
        torch.manual_seed(0)
        model: Any = chain()
        ride = Loop("attached", model, method)
        x, t = batch(model)
        for _ in range(3):
            ride.optimizer.zero_grad()
            loss = F.cross_entropy(model(x), t)
            if between:
                values = {k: 2 * p.detach() for k, p in model.named_parameters()}
                for names in (list(values), ["0.weight"]):
                    grad(partial(_loss_at, model, x, t))({k: values[k] for k in names})
            loss.backward()
            ride.optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- moved to another device before the first step ------------------------------------------------------------------------
def arrive(model: nn.Module, source: nn.Module) -> None:
    """Move a model in place, as `nn.Module.to` moves one to an accelerator: its parameters stay the same objects."""
    for p, value in zip(model.parameters(), source.parameters(), strict=True):
        torch.utils.swap_tensors(p, nn.Parameter(value.detach().clone(), requires_grad=p.requires_grad))


@pytest.mark.parametrize("method", ["kfac", "soap"])
def test_a_maker_without_a_step_follows_the_model_in_a_loop(method: str) -> None:
    source = Net()
    with torch.device("meta"):
        model = Net()
    ride, other = Loop("attached", model, method, beta1=0.9), Loop("attached", copy.deepcopy(source), method, beta1=0.9)
    assert all(v.device.type == "meta" for b in ride.maker.plan.blocks for v in b.state.values())
    arrive(model, source)
    ride.maker.load_state_dict(other.maker.state_dict())  # as Accelerate does it when it wraps an optimizer
    for loop in (ride, other):
        for _ in range(3):
            loop.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.model.parameters(), strict=True))
    assert not torch.equal(model.get_parameter("first.weight"), source.get_parameter("first.weight"))


def test_a_maker_with_a_step_does_not_follow() -> None:
    model = Net()
    ride = Loop("attached", model, "kfac")
    ride.step()
    with torch.device("meta"):
        arrive(model, Net())
    with pytest.raises(ValueError, match=r"first\.weight has the device meta now and had cpu.*make a new one"):
        ride.optimizer.step()
