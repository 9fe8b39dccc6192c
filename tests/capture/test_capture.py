"""The tape leaves no trace: hooks, flags, buffers, random state, gradients and memory; and it sees every call."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker.curvature import BatchGradient, Curvature, FisherEmp, FisherExact, FisherMC
from gradmaker.representations import Dense, Diagonal, Kron, Representation
from tests import models, oracles
from tests.measure import blocks, custom, ggn, measure, setup
from tests.models import CLASSES, ZOO, Case, build

CURVATURES: dict[str, Curvature] = {
    "exact": FisherExact(),
    "mc": FisherMC(samples=2),
    "emp": FisherEmp(),
    "token": FisherEmp(examples="token"),
    "batch": BatchGradient(),
}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs")
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch has no batching rule for weight norm


def representation_for(curvature: Curvature) -> Representation:
    return Diagonal() if isinstance(curvature, BatchGradient) else Dense(granularity="layer")


def hooks(model: nn.Module) -> int:
    """Hooks of all modules and parameters."""
    parameters = sum(len(p._backward_hooks or ()) for p in model.parameters())
    return parameters + sum(len(getattr(m, kind)) for m in model.modules() for kind in HOOKS)


def noisy(dropout: float = 0.5) -> Case:
    """Dropout and batch norm: random numbers and buffers."""

    def make() -> nn.Module:
        parts = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, CLASSES)
        return nn.Sequential(*parts)

    return build(make, 6, 4)


# ------------------------------------------------------------------ the gradient is the plain one, and nothing else moves
SIDE = [name for name in ZOO if not name.startswith("conv")] + ["conv2d_plain", "conv_transpose2d"]


@pytest.mark.parametrize("name", SIDE)
def test_one_step_is_an_ordinary_step_to_the_model(name: str) -> None:
    """Before ``start_step`` the gradient is the plain one; hooks, flags and buffers are as after an ordinary step."""
    case, twin = ZOO[name](), ZOO[name]()
    own = hooks(case.model)
    flags = {k: p.requires_grad for k, p in case.model.named_parameters()}
    for curvature in CURVATURES.values():
        case.model.load_state_dict(copy.deepcopy(twin.model.state_dict()))
        case.model.zero_grad()
        measure(case, curvature, representation_for(curvature), start_step=1)
        ordinary = copy.deepcopy(twin)
        ordinary.run().backward()
        for (k, p), q in zip(case.model.named_parameters(), ordinary.model.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), k
            assert p.grad is None or q.grad is None or torch.equal(p.grad, q.grad), k
        for (k, b), c in zip(case.model.named_buffers(), ordinary.model.buffers(), strict=True):
            assert torch.equal(b, c), k
        assert hooks(case.model) == own
        assert {k: p.requires_grad for k, p in case.model.named_parameters()} == flags


@pytest.mark.parametrize("name", CURVATURES)
def test_random_state_and_dropout(name: str) -> None:
    """The same mask as in an ordinary step, and the same global random state after it."""
    curvature = CURVATURES[name]
    case, twin = noisy(), noisy()
    torch.manual_seed(3)
    twin.run().backward()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    measure(case, curvature, representation_for(curvature), start_step=1)
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(oracles.gradient_vector(case.model), oracles.gradient_vector(twin.model))
    assert all(torch.equal(b, c) for b, c in zip(case.model.buffers(), twin.model.buffers(), strict=True))


@pytest.mark.filterwarnings("ignore::gradmaker.errors.SelfCheckWarning")
@pytest.mark.parametrize("name", CURVATURES)
def test_generic_layers_leave_the_random_state(name: str) -> None:
    """Dropout inside of a call that the fallback repeats."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.norm, self.head = nn.Parameter(torch.rand(4)), nn.BatchNorm1d(4), nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.head(F.dropout(self.norm(x) * self.scale.unsqueeze(1), 0.5, self.training).sum(2))
            return z

    curvature = CURVATURES[name]
    case, twin = build(Odd, 6, 4, 3), build(Odd, 6, 4, 3)
    torch.manual_seed(3)
    twin.run().backward()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    measure(case, curvature, representation_for(curvature), start_step=1)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(torch.equal(b, c) for b, c in zip(case.model.buffers(), twin.model.buffers(), strict=True))


# ------------------------------------------------------------------ exceptions
class Bomb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        raise RuntimeError("bomb")


def explode(*args: Any) -> Tensor:
    raise RuntimeError("bomb")


FAILURES: dict[str, Callable[[Case], Case]] = {
    "forward": lambda c: c._replace(model=nn.Sequential(c.model, Explode())),
    "loss": lambda c: c._replace(loss=explode),
    "backward": lambda c: c._replace(loss=lambda z, t: F.cross_entropy(Bomb.apply(z), t)),
}


class Explode(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return explode(x)


@pytest.mark.parametrize("curvature", ["exact", "mc", "emp", "token"])
@pytest.mark.parametrize("where", FAILURES)
def test_an_exception_leaves_everything_as_it_was(where: str, curvature: str) -> None:
    case = FAILURES[where](models.mlp())
    for p in case.model.parameters():
        p.grad = torch.full_like(p, 7.0)
    grads = [p.grad for p in case.model.parameters()]
    maker = custom(case.model, CURVATURES[curvature], Dense())
    setup(maker, case)
    with pytest.raises(RuntimeError, match="bomb"):
        maker.forward_and_backward()
    assert hooks(case.model) == 0
    assert all(p.grad is g and bool((p.grad == 7).all()) for p, g in zip(case.model.parameters(), grads, strict=True))
    assert all(p.requires_grad for p in case.model.parameters())
    assert maker.step == 0
    for C, _ in blocks(maker).values():
        assert not C.any()


# ------------------------------------------------------------------ the same network, written differently
def same(a: Case, b: Case, curvature: Curvature, representation: Representation, tolerance: float) -> None:
    found = blocks(measure(a, curvature, representation))
    for name, (C, _) in blocks(measure(b, curvature, representation)).items():
        assert torch.linalg.norm(found[name][0] - C) <= tolerance * torch.linalg.norm(C), name


TWINS: dict[str, tuple[Callable[[], Case], Callable[[], Case], float]] = {
    "in_place": (partial(models.mlp_relu, True), models.mlp_relu, 0.0),
    "reentrant": (partial(models.checkpointed, True), partial(models.checkpointed, None), 1e-12),
    "saved": (partial(models.checkpointed, False), partial(models.checkpointed, None), 1e-12),
}


@pytest.mark.parametrize("curvature", ["exact", "mc", "emp", "token"])
@pytest.mark.parametrize("name", TWINS)
def test_twins(name: str, curvature: str) -> None:
    """In-place activations and checkpoints change nothing; each call is counted once."""
    a, b, tolerance = TWINS[name]
    for representation in (Dense(granularity="full"), Kron(), Diagonal(granularity="layer")):
        same(a(), b(), CURVATURES[curvature], representation, tolerance)


class Residual(nn.Module):
    """A residual after a norm, in place or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, CLASSES)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.first(x)))
        h = h.add_(x) if self.in_place else h + x
        z: Tensor = self.head(h.sin_() if self.in_place else h.sin())
        return z


@pytest.mark.parametrize("curvature", ["exact", "emp"])
def test_in_place_residual(curvature: str) -> None:
    same(build(lambda: Residual(True), 5, 4), build(lambda: Residual(False), 5, 4), CURVATURES[curvature], Dense(), 0.0)


class Positions(nn.Module):
    """A lookup for all examples at once, changed in place, inside or outside of a checkpoint."""

    def __init__(self, use_reentrant: bool | None, whole: bool) -> None:
        super().__init__()
        self.position, self.head = nn.Embedding(3, 4), nn.Linear(4, CLASSES)
        self.use_reentrant, self.whole = use_reentrant, whole

    def look_up(self, x: Tensor) -> Tensor:
        index = torch.arange(3).unsqueeze(0)
        return torch.tanh(x + self.position(index.expand(len(x), -1) if self.whole else index).mul_(2.0))

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            h = self.look_up(x)
        else:
            h = torch.utils.checkpoint.checkpoint(self.look_up, x, use_reentrant=self.use_reentrant)
        z: Tensor = self.head(h.mean(1))
        return z


@pytest.mark.filterwarnings("ignore::gradmaker.errors.SelfCheckWarning")
@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("checkpoint", [None, False])
@pytest.mark.parametrize("curvature", ["exact", "emp", "token"])
def test_a_lookup_for_all_examples_is_one_for_each(curvature: str, checkpoint: bool | None, n: int) -> None:
    """Its gradients are those of examples, one at a time, whatever the number of positions; the pass is as without a tape."""
    cases = [build(lambda w=w: Positions(checkpoint, w), n, 3, 4) for w in (False, True)]  # type: ignore[misc]
    for representation in (Dense(), Dense(granularity="full"), Kron(), Diagonal(granularity="layer")):
        same(*cases, CURVATURES[curvature], representation, 1e-12)
    ordinary = build(lambda: Positions(None, False), n, 3, 4)
    ordinary.run().backward()
    cases[0].model.zero_grad()
    measure(cases[0], CURVATURES[curvature], Dense(), start_step=1)
    assert oracles.relative_error(oracles.gradient_vector(cases[0].model), oracles.gradient_vector(ordinary.model)) < 1e-12


@pytest.mark.filterwarnings("ignore::gradmaker.errors.SelfCheckWarning")
def test_draws_through_a_lookup_for_all_examples() -> None:
    """Blocks of layers take the sum of independent draws over examples, which has the same mean; one block takes each."""
    cases = [build(lambda w=w: Positions(None, w), 5, 3, 4) for w in (False, True)]  # type: ignore[misc]
    same(*cases, FisherMC(samples=3), Dense(granularity="full"), 1e-12)
    expected = blocks(measure(cases[1], FisherExact(), Dense()))
    for name, (C, _) in blocks(measure(cases[0], FisherMC(samples=20000), Dense())).items():
        assert oracles.relative_error(C[0], expected[name][0][0]) < 0.06, name


def test_module_called_twice_is_two_tied_copies() -> None:
    """Cross terms of the calls belong to the matrix."""
    C, where = blocks(measure(models.called_twice(), FisherExact(), Dense()))["shared"]
    oracle = ggn(models.called_twice())
    assert oracles.relative_error(C[0], oracle[where[0]][:, where[0]]) < 1e-10


def test_frozen_and_unused_layers() -> None:
    frozen, unused = models.frozen(), models.unused()
    a, b = measure(frozen), measure(unused, FisherExact(), Dense())
    assert not any("2." in k for s in a.plan.blocks for site in s.sites for k in site.parameters)
    assert all(p.grad is None for p in frozen.model.get_submodule("2").parameters())
    assert b.silent() == ["idle"]
    assert all(p.grad is None for p in unused.model.get_submodule("idle").parameters())


def test_branches_that_fire_now_and_then() -> None:
    """A layer that is silent in one step keeps its statistic and its gradient stays None."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.use_left = nn.Linear(4, CLASSES), nn.Linear(4, CLASSES), True

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = (self.left if self.use_left else self.right)(x)
            return z

    case = build(Branch, 5, 4)
    maker = measure(case, FisherExact(), Dense())
    before = {name: C.clone() for name, (C, _) in blocks(maker).items()}
    case.model.use_left = False  # type: ignore[assignment]
    case.model.zero_grad()
    setup(maker, case)
    maker.forward_and_backward()
    assert torch.equal(blocks(maker)["left"][0], before["left"])
    assert not before["right"].any() and blocks(maker)["right"][0].any()
    assert case.model.get_submodule("left").weight.grad is None


def test_a_model_that_the_maker_was_not_made_for_is_refused() -> None:
    case, other = models.mlp(), models.mlp()
    maker = custom(case.model, FisherExact(), Dense())
    setup(maker, case._replace(model=other.model))
    with pytest.raises(RuntimeError, match="the very model that the maker was made for"):
        maker.forward_and_backward()


# ------------------------------------------------------------------ memory
def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


@pytest.mark.parametrize(
    "make", [models.mlp, models.bare_scale, partial(models.checkpointed, True)], ids=["mlp", "generic", "reentrant"]
)
@pytest.mark.parametrize("name", CURVATURES)
def test_steps_leave_no_tensors_behind(name: str, make: Callable[[], Case]) -> None:
    case, curvature = make(), CURVATURES[name]
    maker = custom(case.model, curvature, representation_for(curvature), decay=0.9)
    counts = []
    for step in range(50):
        setup(maker, case)
        case.model.zero_grad()
        maker.forward_and_backward()
        if step in (2, 49):
            counts.append(tensors())
    assert counts[1] <= counts[0]  # other tests may leave something that is collected in between


def test_a_step_holds_no_graph() -> None:
    """What the forward pass made is gone once its result is."""
    case = models.mlp()
    made: list[weakref.ref[Tensor]] = []
    case.model.register_forward_hook(lambda m, a, y: made.append(weakref.ref(y)))
    for curvature in CURVATURES.values():
        maker = custom(case.model, curvature, representation_for(curvature))
        setup(maker, case)
        maker.forward_and_backward()
        gc.collect()
    assert made and all(r() is None for r in made)
