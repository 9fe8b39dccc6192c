"""Steps of element-wise methods by one operator: as those formed block by block, and only where the operator fits."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import from_config
from gradmaker.linalg import fused
from gradmaker.step.state import StepState
from tests.live import Live
from tests.test_state import equal_states

RATE = 1e-2


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Two equal layers, which make a stack, and others."""
    torch.manual_seed(0)
    layers = [nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 7), nn.LayerNorm(7), nn.Linear(7, 5)]
    return nn.Sequential(*layers).to(dtype)


class Run:
    """A maker and plain gradient descent on what it writes."""

    def __init__(self, config: dict[str, Any], dtype: torch.dtype = torch.float64) -> None:
        self.model = model(dtype)
        self.maker: Any = from_config(self.model, config)

    def declare(self, index: int, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(index)
        like = next(self.model.parameters())
        x = torch.randn(8, 7, generator=generator, dtype=torch.float64).to(like.dtype)
        t = torch.randint(5, (8,), generator=generator)
        y = self.maker.setup_model_call(self.model, x)
        self.maker.setup_loss_call(lambda y, t: scale * F.cross_entropy(y, t), y, t)

    def step(self, index: int, scale: float = 1.0) -> None:
        self.model.zero_grad()
        self.declare(index, scale)
        self.maker.forward_and_backward()
        self.move()

    def move(self) -> None:
        with torch.no_grad():
            for p in self.model.parameters():
                if p.grad is not None:
                    p.sub_(p.grad, alpha=RATE)

    def weights(self) -> Tensor:
        return torch.cat([p.detach().double().flatten() for p in self.model.parameters()])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that were called, one after the other."""
    found: list[str] = []
    for known, dtype in product(KNOWN.values(), (torch.float32, torch.float64)):  # their trials are calls, too
        known(dtype)
    for name in ("adam", "adagrad"):
        original = getattr(fused, name)

        def called(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            found.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(fused, name, called)
    return found


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Lets torch lack the operators, or have them again."""

    def switch(on: bool) -> None:
        for name in ("has_adam", "has_adagrad"):
            monkeypatch.setattr(fused, name, (lambda dtype: False) if on else KNOWN[name])

    return switch


KNOWN = {name: getattr(fused, name) for name in ("has_adam", "has_adagrad")}
CONFIGS: dict[str, dict[str, Any]] = {
    "adam": {"method": "adam"},
    "adam, short averages": {"method": "adam", "beta1": 0.6, "decay": 0.5, "damping": 1e-3},
    "adam, the newest square": {"method": "adam", "decay": 0.0, "damping": 0.1},
    "adagrad": {"method": "adagrad"},
    "groups of adam": {"method": "adam", "groups": {"0": "adam", "*": "adam"}},
    "different groups": {"method": "adam", "groups": {"0": {"method": "adam", "beta1": 0.5}, "2": "adagrad", "*": "adam"}},
    "beside kfac": {"method": "kfac", "groups": {"0": "adam", "*": "kfac"}, "damping": 0.1},
    "beside shampoo": {"method": "shampoo", "groups": {"0": "adam", "2": "adagrad", "*": "shampoo"}},
}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 3e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_step_formed_block_by_block(
    name: str, dtype: torch.dtype, tolerance: float, calls: list[str], formed: Callable[[bool], None]
) -> None:
    found = []
    for on in (False, True):
        formed(on)
        run = Run(CONFIGS[name], dtype)
        for index in range(20):
            run.step(index)
        found.append(run.weights())
        assert bool(calls) != on
        if not on and "groups" not in CONFIGS[name]:
            assert calls == [CONFIGS[name]["method"]] * 20
        calls.clear()
    assert (found[0] - found[1]).norm() <= tolerance * found[1].norm()


def oracle(steps: int, beta1: float, beta2: float, damping: float) -> Tensor:
    """Adam as it is published, on the same losses."""
    net = model()
    parameters = list(net.parameters())
    m, v = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for index in range(steps):
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(8, 7, generator=generator, dtype=torch.float64)
        loss = F.cross_entropy(net(x), torch.randint(5, (8,), generator=generator))
        for k, g in enumerate(torch.autograd.grad(loss, parameters)):
            m[k], v[k] = beta1 * m[k] + (1 - beta1) * g, beta2 * v[k] + (1 - beta2) * g * g
            step = m[k] / (1 - beta1 ** (index + 1)) / ((v[k] / (1 - beta2 ** (index + 1))).sqrt() + damping)
            parameters[k].data -= RATE * step
    return torch.cat([p.detach().flatten() for p in parameters])


def test_it_is_adam(calls: list[str]) -> None:
    run = Run({"method": "adam", "damping": 1e-4})
    for index in range(15):
        run.step(index)
    assert len(calls) == 15
    expected = oracle(15, 0.9, 0.999, 1e-4)
    assert (run.weights() - expected).norm() <= 1e-12 * expected.norm()


# --- where it is not ------------------------------------------------------------------------------------------------------
def large(run: Run, index: int) -> None:
    """Beyond what the operator keeps exact."""
    run.step(index, 1e9)


def accumulated(run: Run, index: int) -> None:
    """A gradient from before the step, to which it adds."""
    for p in run.model.parameters():
        p.grad = torch.ones_like(p)
    run.declare(index)
    run.maker.forward_and_backward()
    run.move()


def parts(run: Run, index: int) -> None:
    """Two micro-batches, whose sum is scaled by the user."""
    run.model.zero_grad()
    for part in range(2):
        run.declare(index + part)
        run.maker.accumulate(0.5)
    for p in run.model.parameters():
        p.grad.mul_(0.25)  # type: ignore[union-attr]
    run.maker.precondition()
    run.move()


def missing(run: Run, index: int) -> None:
    """One parameter has no gradient."""
    run.model.zero_grad()
    run.declare(index)
    run.maker.accumulate()
    next(run.model.parameters()).grad = None
    run.maker.precondition()
    run.move()


def turned(run: Run, index: int) -> None:
    """A gradient whose storage is in another order."""
    run.model.zero_grad()
    run.declare(index)
    run.maker.accumulate()
    p = next(run.model.parameters())
    p.grad = p.grad.mT.contiguous().mT  # type: ignore[union-attr]
    run.maker.precondition()
    run.move()


WAYS: dict[str, Callable[[Run, int], None]] = {f.__name__: f for f in (large, accumulated, parts, missing, turned)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["adam", "adagrad"])
def test_steps_of_both_forms_take_turns(method: str, way: str, calls: list[str], formed: Callable[[bool], None]) -> None:
    found = []
    for on in (False, True):
        formed(on)
        run = Run({"method": method})
        for index in range(9):
            calls.clear()
            (WAYS[way] if index % 3 == 1 else Run.step)(run, index)
            lost = index % 3 == 1 and method == "adam" and way == "large"
            assert bool(calls) == (not on and not lost), (index, calls)
        found.append(run.weights())
    assert (found[0] - found[1]).norm() <= 1e-10 * found[1].norm()


@pytest.mark.parametrize(
    "config",
    [
        {"method": "adam", "preconditioner_interval": 2},
        {"method": "adam", "curvature_interval": 2},
        {"method": "adam", "beta1": 0.0},
        {"method": "adam", "nesterov_average": True},
        {"method": "adam", "start_step": 100},
        {"method": "adam", "dtype": "float32"},
        {"method": "shampoo"},
    ],
    ids=str,
)
def test_other_plans_are_formed(config: dict[str, Any], calls: list[str]) -> None:
    run = Run(config)
    for index in range(3):
        run.step(index)
    assert not calls


def test_squares_that_overflow_are_counted_as_ever(calls: list[str]) -> None:
    """Finite gradients of infinite squares."""
    run = Run({"method": "adam", "failures_allowed": 1}, torch.float32)
    weights, before = run.weights(), run.maker.plan.blocks[0]
    run.step(0)
    denominator = before.state["diagonal"].sqrt() / before.state["mass"].sqrt().view(-1, 1, 1) + 1e-8
    with torch.no_grad():
        nn.utils.vector_to_parameters(weights.float(), run.model.parameters())
    run.model.zero_grad()
    run.declare(1, 1e25)
    run.maker.forward_and_backward()
    assert calls == ["adam"] and run.maker.skipped == 0
    torch.testing.assert_close(before.cache["denominator"], denominator)  # that of the last step
    with pytest.raises(RuntimeError, match=r"failed for the 2\. time in a row"):
        run.step(2)
    assert calls == ["adam"]


def test_gradients_that_are_not_finite_when_the_step_ends_are_skipped() -> None:
    """They were when the pass ended."""
    run = Run({"method": "adam"})
    run.step(0)
    before = run.maker.state_dict()["sites"]
    run.model.zero_grad()
    run.declare(1)
    run.maker.accumulate()
    run.model[0].weight.grad[0, 0] = torch.inf  # type: ignore[index, union-attr]
    run.maker.precondition()
    assert run.maker.skipped == 1 and equal_states(run.maker.state_dict()["sites"], before)


# --- the operator is the last action ----------------------------------------------------------------------------------------
class Planted(Exception):
    """Nothing else raises it."""


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("name", ["adam", "adagrad"])
def test_an_exception_leaves_all_as_it_was(name: str, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In what writes, or before."""
    run, calm = Run({"method": name}), Run({"method": name})
    for index in range(4):
        calm.step(index)
        run.model.zero_grad()
        run.declare(index)
        run.maker.accumulate()
        before = run.maker.state_dict()["sites"], [p.grad.clone() for p in run.model.parameters()]  # type: ignore[union-attr]
        with monkeypatch.context() as patch:
            patch.setattr(torch, "_fused_adamw_" if name == "adam" else "_foreach_copy_", raising)
            if early:
                patch.undo()
                patch.setattr(StepState, "finish", raising)
            with pytest.raises(Planted):
                run.maker.precondition()
        assert equal_states(run.maker.state_dict()["sites"], before[0])
        assert all(torch.equal(p.grad, g) for p, g in zip(run.model.parameters(), before[1], strict=True))  # type: ignore[arg-type]
        run.maker.precondition()
        run.move()
        assert torch.equal(run.weights(), calm.weights())
        assert equal_states(run.maker.state_dict(), calm.maker.state_dict())


def raising(*_: Any, **__: Any) -> None:
    raise Planted


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_maker_has_tensors_of_its_own(copied: Callable[[Run], Run]) -> None:
    run = Run({"method": "adam"})
    run.step(0)
    run.maker._declared = {}
    other = copied(run)
    before = other.maker.state_dict()
    run.step(1)
    assert equal_states(other.maker.state_dict(), before)
    other.step(1)
    assert equal_states(other.maker.state_dict(), run.maker.state_dict())


def test_a_loaded_state_goes_on_to_the_last_bit() -> None:
    run, other = Run({"method": "adam"}, torch.float32), Run({"method": "adam"}, torch.float32)
    for index in range(5):
        run.step(index)
    other.maker.load_state_dict(run.maker.state_dict())
    other.model.load_state_dict(run.model.state_dict())
    for index in range(5, 8):
        run.step(index)
        other.step(index)
    assert torch.equal(run.weights(), other.weights())


def test_it_holds_two_tensors_and_makes_none() -> None:
    """Beside the weights and their gradient."""
    net = nn.Linear(300, 300, bias=False)
    size = 4 * 300**2
    maker: Any = from_config(net, {"method": "adam"})
    x, t = torch.randn(4, 300), torch.randint(300, (4,))
    for step in range(4):
        net.zero_grad()
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(net, x), t)
        maker.accumulate()
        with Live() as live:
            maker.precondition()
        assert step == 0 or live.peak < size / 10
    assert sum(b.bytes for b in maker.plan.blocks) < 2.1 * size


# --- the operators are tried first ------------------------------------------------------------------------------------------
@pytest.fixture
def untried() -> Iterator[None]:
    for known in KNOWN.values():
        known.cache_clear()
    yield
    for known in KNOWN.values():
        known.cache_clear()


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_this_torch_has_them(dtype: torch.dtype) -> None:
    assert fused.has_adam(dtype) and fused.has_adagrad(dtype)


def weaker(operator: Any) -> Any:
    """The operator with a tenth of the damping."""

    def call(*args: Any, eps: float, **options: Any) -> Any:
        return operator(*args, eps=eps / 10, **options)

    return call


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("fault", ["missing", "other arguments", "wrong"])
@pytest.mark.parametrize("method, name", [("adam", "_fused_adamw_"), ("adagrad", "_fused_adagrad_")])
def test_without_an_operator_the_step_is_formed(
    method: str, name: str, fault: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, original = Run({"method": method}), getattr(torch, name)
    for known in KNOWN.values():
        known.cache_clear()
    if fault == "missing":
        monkeypatch.delattr(torch, name)
    else:
        monkeypatch.setattr(torch, name, weaker(original) if fault == "wrong" else lambda *args: None)
    for index in range(5):
        run.step(index)
    assert len(calls) == 1  # the trial
    monkeypatch.setattr(torch, name, original, raising=False)
    other = Run({"method": method})
    for index in range(5):
        other.step(index)
    for known in KNOWN.values():
        known.cache_clear()
    assert (run.weights() - other.weights()).norm() <= 1e-12 * other.weights().norm()
