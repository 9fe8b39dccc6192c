"""An exception in the middle of a step, and the step again: it counts once, to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradmaker import from_config, maker as maker_module
from gradmaker.blocks import Block
from gradmaker.capture.sites import Site
from gradmaker.step.draft import Draft
from tests import models
from tests.methods.test_methods import PRECONDITIONED
from tests.models import Case
from tests.registry import suited
from tests.test_state import equal_states

SPARSE = {"curvature_interval": 2, "preconditioner_interval": 2, "warmup_steps": 0}


class Planted(Exception):
    """Nothing else raises it."""


class Bomb:
    """Goes off at one of its calls, once."""

    def __init__(self, at: int, after: bool = False) -> None:
        """after: whether the call has done its work by then"""
        self.left, self.after = at, after

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left or self.after:
                result = function(*args, **kwargs)
            if not self.left:
                raise Planted
            return result

        return wrapped


class InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        raise Planted


def _method_of(owner: Any, name: str, at: int, after: bool = False) -> Callable[[Any, Case], Any]:
    @contextmanager
    def planted(maker: Any, case: Case) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, Bomb(at, after).wrap(getattr(owner, name)))
            yield

    return planted


def _part(axis: str, at: int, *names: str) -> Callable[[Any, Case], Any]:
    """names: methods of the part that do the same for different forms of a gradient"""

    @contextmanager
    def planted(maker: Any, case: Case) -> Iterator[None]:
        owner = type(getattr(maker.plan.blocks[-1].triple, axis))
        bomb = Bomb(at)
        with pytest.MonkeyPatch.context() as patch:
            for name in (each for each in names if hasattr(owner, each)):
                patch.setattr(owner, name, bomb.wrap(getattr(owner, name)))
            yield

    return planted


@contextmanager
def _measure(maker: Any, case: Case) -> Iterator[None]:
    """After the first chunk of evidence."""
    owner = type(maker.plan.blocks[0].triple.curvature)
    measure, bomb = owner.measure, Bomb(1)

    def measured(self: Any, step: Any) -> Any:
        for chunk in measure(self, step):
            yield chunk
            bomb.wrap(int)()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, "measure", measured)
        yield


@contextmanager
def _model(maker: Any, case: Case) -> Iterator[None]:
    last = [m for m in case.model.modules() if isinstance(m, nn.Linear)][-1]
    handle = last.register_forward_pre_hook(lambda *_: bomb())
    bomb = Bomb(1).wrap(lambda: None)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _loss(maker: Any, case: Case) -> Iterator[Any]:
    yield Bomb(1).wrap(case.loss)


@contextmanager
def _backward(maker: Any, case: Case) -> Iterator[Any]:
    fuse = [True]

    def loss(y: Tensor, t: Tensor) -> Tensor:
        return case.loss(InBackward.apply(y) if fuse and fuse.pop() else y, t)

    yield loss


FOLDS = ("update", "update_rows", "fold")
SOLVES = ("solve", "solve_rows", "solve_coordinates", "solve_own")
PLACES: dict[str, Callable[[Any, Case], Any]] = {
    "model": _model,
    "loss": _loss,
    "backward": _backward,
    "measurement": _measure,
    "first fold": _part("representation", 1, *FOLDS),
    "second fold": _part("representation", 2, *FOLDS),
    "after a fold": _method_of(Draft, "fold", 1, after=True),
    "second refresh": _method_of(Block, "prepare", 2),
    "after a refresh": _method_of(Block, "prepare", 1, after=True),
    "in a refresh": _part("solver", 1, "prepare"),
    "second solve": _method_of(Block, "solve", 2),
    "after a solve": _method_of(Block, "solve", 1, after=True),
    "in a solve": _part("solver", 1, *SOLVES),
    "second write": _method_of(Block, "assign", 2),
    "in a write": _method_of(Site, "assign", 2),
    "after a write": _method_of(Block, "assign", 1, after=True),
    "the last write": _method_of(torch, "_foreach_copy_", 1),
}


def again(action: Callable[[], Any], instead: Callable[[], Any] | None = None) -> None:
    """An action, and after an exception once more, or another."""
    try:
        action()
    except Planted:
        (instead or action)()


def step(maker: Any, case: Case, index: int, way: str, loss: Any) -> None:
    """One step in one of the ways to make it, in which every call that fails is repeated."""
    if index != 1:  # else this step adds to what the last one has left
        case.model.zero_grad(set_to_none=index == 0)
    generator = torch.Generator().manual_seed(index)
    x, t = torch.randn(case.x.shape, generator=generator, dtype=case.x.dtype), case.t.roll(index)
    half = len(x) // 2

    def declare(rows: slice) -> None:
        maker.setup_loss_call(loss, maker.setup_model_call(case.model, x[rows]), t[rows])

    def take(rows: slice) -> None:
        declare(rows)
        maker.accumulate(0.5)

    def whole() -> None:
        declare(slice(None))
        maker.forward_and_backward()

    def last() -> None:
        declare(slice(half, None))
        maker.forward_and_backward(0.5)

    def over() -> None:
        again(lambda: take(slice(half)))
        again(lambda: take(slice(half, None)))
        maker.precondition()

    if way == "whole":
        again(whole)
        return
    again(lambda: take(slice(half)))
    if way == "last":
        again(last)
        return
    again(lambda: take(slice(half, None)))
    again(maker.precondition, over if way == "over" else None)


def compare(make: Callable[[], tuple[Any, Case]], places: list[str], way: str) -> None:
    """A troubled run, with an exception at every step, and one without trouble."""
    (maker, case), (other, calm) = make(), make()
    for index, place in enumerate(places):
        with PLACES[place](maker, case) as loss:
            step(maker, case, index, way, loss or case.loss)
        step(other, calm, index, way, calm.loss)
        for (name, p), q in zip(case.model.named_parameters(), calm.model.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            assert torch.equal(p.grad, q.grad), (index, place, name)
        assert equal_states(maker.state_dict(), other.state_dict()), (index, place)
        with torch.no_grad():
            for c in (case, calm):
                for p in c.model.parameters():
                    p.sub_(p.grad, alpha=1e-3)  # type: ignore[arg-type]


def maker_of(method: str, **options: Any) -> tuple[Any, Case]:
    case = suited(method, models.mlp, models.linear)
    return from_config(case.model, {"method": method, **options}), case


@pytest.mark.parametrize("method", PRECONDITIONED)
def test_a_step_that_is_repeated_counts_once(method: str) -> None:
    """What fails at the first step differs from method to method."""
    first = PRECONDITIONED.index(method) % len(PLACES)
    compare(lambda: maker_of(method), [*PLACES][first:] + [*PLACES][:first], "whole")


NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "kfac": ("kfac", {"beta1": 0.9, **SPARSE}),
    "kfac drawn": ("kfac", {"fisher": "FisherMC", "grafting": "adam"}),
    "kfac beside adam": ("kfac", {"fallback": "adam", "ignore": ["0.bias"], **SPARSE}),
    "kfac clipped": ("kfac", {"clip": 1e-6, "clip_learning_rate": 0.1, "beta1": 0.9}),
    "kfac rescaled": ("kfac", {"rescale": "momentum", "adaptive_damping": {"AdaptiveDamping": {"interval": 2}}}),
    "ekfac": ("ekfac", {}),
    "shampoo": ("shampoo", {"grafting": "adam", "beta1": 0.9, "nesterov_average": True}),
    "soap": ("soap", {}),
    "adam": ("adam", {}),
    "smw_ng": ("smw_ng", {}),
    "unit_ng": ("unit_ng", {"grafting": "adagrad"}),
    "kbfgs": ("kbfgs", {}),
    "lbfgs": ("lbfgs", {}),
    "psgd": ("psgd", {}),
    "hessian_free": ("hessian_free", {"iterations": 5}),
}


@pytest.mark.parametrize("order", [1, -1], ids=["forward", "backward"])
@pytest.mark.parametrize("way", ["solve", "over", "last"])
@pytest.mark.parametrize("name", NAMED)
def test_a_step_of_micro_batches_that_is_repeated_counts_once(name: str, way: str, order: int) -> None:
    """The call that failed is repeated: the pass, the solve, the solve with the pass before it, or after it the whole step."""
    method, options = NAMED[name]
    compare(lambda: maker_of(method, **options), [*PLACES][::order], way)


class Dropped(nn.Module):
    """A model that draws from torch's global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, models.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(nn.functional.dropout(torch.tanh(self.body(x)), 0.5))
        return y


@pytest.mark.parametrize("way", ["whole", "solve", "over", "last"])
@pytest.mark.parametrize("method", ["gradient", "kfac", "adam"])
def test_a_pass_that_is_repeated_draws_what_it_drew(method: str, way: str) -> None:
    """Passes of a step that begins again after a solve of its own draw anew: nothing has failed that drew."""
    places = ["model", "loss", "backward"] if method == "gradient" or way == "over" else [*PLACES]

    def make() -> tuple[Any, Case]:
        torch.manual_seed(0)
        case = models.build(Dropped, 6, 4)
        return from_config(case.model, {"method": method}), case

    results = []
    for trouble in (True, False):
        maker, case = make()
        torch.manual_seed(1)
        for index, place in enumerate(places):
            with PLACES[place](maker, case) if trouble else nullcontext() as loss:
                step(maker, case, index, way, loss or case.loss)
            results.append(torch.cat([p.grad.flatten() for p in case.model.parameters()]))  # type: ignore[union-attr]
    half = len(places)
    assert all(torch.equal(a, b) for a, b in zip(results[:half], results[half:], strict=True))


# --- a step that begins again with other micro-batches ---------------------------------------------------------------------
def fail(maker: Any, case: Case, place: str, parts: int) -> None:
    """A step of some micro-batches whose solve fails."""
    for rows in torch.arange(len(case.x)).tensor_split(parts):
        maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x[rows]), case.t[rows])
        maker.accumulate(len(rows) / len(case.x))
    with PLACES[place](maker, case), pytest.raises(Planted):
        maker.precondition()


def run_parts(maker: Any, case: Case, parts: int) -> None:
    for rows in torch.arange(len(case.x)).tensor_split(parts):
        maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x[rows]), case.t[rows])
        maker.accumulate(len(rows) / len(case.x))
    maker.precondition()


@pytest.mark.parametrize("place", ["first fold", "in a refresh", "in a solve", "the last write"])
@pytest.mark.parametrize("before, after", [(1, 2), (3, 2), (2, 1)])
@pytest.mark.parametrize("name", ["kfac drawn", "kfac rescaled", "shampoo", "unit_ng", "lbfgs", "psgd", "hessian_free"])
def test_a_step_that_begins_again_may_have_other_micro_batches(name: str, before: int, after: int, place: str) -> None:
    """Those that came before the exception are forgotten: all is as if they had never been."""
    method, options = NAMED[name]
    found = []
    for trouble in (True, False):
        maker, case = maker_of(method, **options)
        run_parts(maker, case, 1)
        with torch.no_grad():
            for p in case.model.parameters():
                p.sub_(p.grad, alpha=1e-3)  # type: ignore[arg-type]
        case.model.zero_grad()
        if trouble:
            with PLACES[place](maker, case), pytest.raises(Planted):
                run_parts(maker, case._replace(x=case.x.flip(0)), before)
            case.model.zero_grad()
        run_parts(maker, case, after)
        found.append((maker.state_dict(), [p.grad for p in case.model.parameters()]))
    assert equal_states(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("zeroed", [True, False])
def test_a_gradient_that_was_zeroed_is_not_put_back(zeroed: bool) -> None:
    """A step adds to what was there before it, unless that was cleared before the step begins again."""
    found = []
    for trouble in (True, False):
        maker, case = maker_of("kfac")
        for p in case.model.parameters():
            p.grad = torch.full_like(p, 0.0 if zeroed and not trouble else 7.0)
        if trouble:
            fail(maker, case, "in a solve", parts=1)
            if zeroed:
                case.model.zero_grad(set_to_none=False)
        maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
        maker.forward_and_backward()
        found.append(torch.cat([p.grad.flatten() for p in case.model.parameters()]))  # type: ignore[union-attr]
    assert torch.equal(*found)


@pytest.mark.parametrize("method, key", [("kfac", "left_mass"), ("shampoo", "mass"), ("adam", "mass")])
def test_an_update_that_ends_in_the_middle_leaves_the_statistic(method: str, key: str) -> None:
    """It writes to a copy."""
    formed = {"nesterov_average": True} if method == "adam" else {}  # otherwise its step is one operator
    maker, case = maker_of(method, **formed)
    before = maker.state_dict()

    def update(self: Any, state: Any, evidence: Any, fold: Any, write: Any = None) -> None:
        state[key].add_(1)
        raise Planted

    maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
    with pytest.MonkeyPatch.context() as patch:
        owner = type(maker.plan.blocks[0].triple.representation)
        for name in (each for each in FOLDS if hasattr(owner, each)):
            patch.setattr(owner, name, update)
        with pytest.raises(Planted):
            maker.forward_and_backward()
    assert equal_states(maker.state_dict(), before)
    maker.forward_and_backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in case.model.parameters())


@pytest.mark.parametrize("place", ["second refresh", "second solve", "second write"])
def test_a_refresh_that_fails_is_counted_once(place: str) -> None:
    """The first block's statistic is lost, so that it keeps its last good root."""
    maker, case = maker_of("kfac", warmup_steps=100)
    maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
    maker.forward_and_backward()
    maker.plan.blocks[0].state["left"].fill_(torch.nan)
    with PLACES[place](maker, case), pytest.raises(Planted):
        maker.forward_and_backward()
    maker.forward_and_backward()
    assert [int(block.cache["failing"].max()) for block in maker.plan.blocks] == [1, 0]


def test_a_refresh_that_fails_too_often_is_not_overcome_by_trying_again() -> None:
    case = models.mlp()
    maker: Any = from_config(case.model, {"method": "kfac", "failures_allowed": 0})
    maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
    maker.forward_and_backward()
    for block in maker.plan.blocks:
        for value in block.state.values():
            value.fill_(torch.nan)
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"its refresh failed for the 1\. time in a row, 1 times in all"):
            maker.forward_and_backward()
    assert maker.step == 1


# --- the write into .grad ---------------------------------------------------------------------------------------------------
class Interrupt(TorchDispatchMode):
    """Raises after so many operations, 0 for none; tells which of them write."""

    def __init__(self, after: int = 0) -> None:
        super().__init__()
        self.after, self.writing = after, list[bool]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.writing.append(func._schema.is_mutable)
        if len(self.writing) == self.after:
            raise KeyboardInterrupt
        return out


def begun(method: str, accumulated: bool, before: str) -> tuple[Any, list[nn.Parameter], Callable[[], Any]]:
    """A maker with gradients of an earlier step, its parameters, and what ends the next one."""
    case = models.mlp()
    maker: Any = from_config(case.model, {"method": method, **({} if method == "gradient" else SPARSE)})
    parameters = list(case.model.parameters())
    for k, p in enumerate(parameters):
        p.grad = torch.full_like(p, 7.0) if before == "all" or (before == "some" and k % 2) else None
    maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
    if accumulated:
        maker.accumulate()
    return maker, parameters, maker.precondition if accumulated else maker.forward_and_backward


@pytest.mark.parametrize("method", ["gradient", "kfac"])
@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("before", ["nothing", "some", "all"])
def test_a_gradient_is_written_as_a_whole(method: str, accumulated: bool, before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one operation, the last: an interruption after any of those before it leaves all tensors as they were."""
    write, modes = maker_module._write, [Interrupt()]

    def interrupted(*args: Any) -> None:
        with modes[-1]:
            write(*args)

    monkeypatch.setattr(maker_module, "_write", interrupted)
    _, calm, end = begun(method, accumulated, before)
    end()
    operations = modes[0].writing
    assert operations == [False] * (before != "nothing") + [True] * (before != "nothing" or method == "kfac")
    maker, parameters, end = begun(method, accumulated, before)
    earlier = dict(maker.step_state.now.gradients or ((p, p.grad) for p in parameters))
    known = [(p, p.grad) for p in parameters]
    kept = [(g, g.clone()) for g in (*earlier.values(), *(g for _, g in known)) if g is not None]
    for after in range(1, len(operations)):
        modes.append(Interrupt(after))
        with pytest.raises(KeyboardInterrupt):
            end()
        assert all(p.grad is g for p, g in known) and all(torch.equal(g, value) for g, value in kept)
    modes.append(Interrupt())
    end()
    for p, q in zip(parameters, calm, strict=True):
        assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)
        assert earlier[p] is None or p.grad is earlier[p]
