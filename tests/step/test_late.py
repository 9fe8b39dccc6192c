"""Folds that come last in a step write what folds at once write, to the last bit, and copy no statistic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS
from gradmaker.blocks import Block
from gradmaker.linalg.moments import add_moment_
from gradmaker.linalg.writes import Recorder, make
from gradmaker.representations import Kron, KronDims
from gradmaker.representations.root_dims import RootKronDims
from gradmaker.representations.rotated_dims import RotatedDims
from gradmaker.solvers import CG
from gradmaker.step import late
from tests.test_state import equal_states

SIDES = (300, 260)
LATE = ("shampoo", "kfac", "ekfac", "soap")
OF_PASSES = {"kfac", "ekfac"}  # an attached pass may not be all of its step
AT_ONCE = {"ekfac": {"moments", "mass", "predicted"}, "soap": {"moments", "mass"}}


def steps_of(method: str, attached: bool = False, **options: Any) -> tuple[Any, nn.Module, Callable[[int], None]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*SIDES), nn.Tanh(), nn.Linear(SIDES[1], 5))
    config = METHODS[method].Config(**{"warmup_steps": 0, "curvature_interval": 1, "stagger": False, **options})
    maker: Any = METHODS[method](model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    if attached:
        maker.attach(optimizer)
    draw = torch.Generator().manual_seed(1)

    def step(_: int) -> None:
        x, t = torch.randn(20, SIDES[0], generator=draw), torch.randint(5, (20,), generator=draw)
        optimizer.zero_grad(set_to_none=False)
        if attached:
            F.cross_entropy(model(x), t).backward()
        else:
            maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), t)
            maker.forward_and_backward()
        optimizer.step()

    return maker, model, step


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of blocks whose evidence was kept."""
    names, recorded = list[str](), late.recorded

    def noted(block: Block, *args: Any) -> Any:
        found = recorded(block, *args)
        names.extend([block.name] if found else [])
        return found

    monkeypatch.setattr(late, "recorded", noted)
    return names


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("method", LATE)
def test_they_are_folds_at_once_to_the_last_bit(
    method: str, attached: bool, interval: int, monkeypatch: pytest.MonkeyPatch, kept: list[str]
) -> None:
    found = list[tuple[Any, list[Tensor]]]()
    for late_too in (True, False):
        if not late_too:
            monkeypatch.setattr(late, "recorded", lambda *_: None)
        maker, model, step = steps_of(method, attached, preconditioner_interval=interval)
        for k in range(interval + 2):
            step(k)
        found.append((maker.state_dict(), [p.detach().clone() for p in model.parameters()]))
    assert bool(kept) == (not (attached and method in OF_PASSES) and (method, interval) != ("kfac", 1))
    assert equal_states(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("method", LATE)
def test_a_measured_step_copies_no_statistic(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for late_too in (True, False):
        if not late_too:
            monkeypatch.setattr(late, "recorded", lambda *_: None)
        maker, _, step = steps_of(method, preconditioner_interval=10**6)
        for k in range(2):
            step(k)
        before = dict(maker.plan.blocks[0].state)
        step(2)
        held = maker.plan.blocks[0].state
        whole = [k for k in before if k.startswith(("left", "right", "factor")) and before[k].ndim == 3]
        assert whole and all((held[k] is before[k]) == late_too for k in whole)
        assert not any(held[k] is before[k] for k in AT_ONCE.get(method, set[str]()))


@pytest.mark.parametrize("method", LATE)
def test_an_exception_before_the_last_write_leaves_the_statistic(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    maker, _, step = steps_of(method, preconditioner_interval=2)
    for k in range(2):
        step(k)
    before = maker.state_dict()

    def raising(*_: Any) -> None:
        raise MemoryError("planted")

    for owner, name in ((late, "writes"), (torch, "_foreach_copy_"), (Block, "assign")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, raising)
            with pytest.raises(MemoryError, match="planted"):
                step(2)
        assert equal_states(maker.state_dict(), before)


def test_evidence_is_not_what_the_step_writes_to() -> None:
    """``.grad`` is written before the statistic: a gradient that is held there is copied."""
    maker, model, step = steps_of("shampoo", attached=True, decay=0.5)
    step(0)
    bias: Any = model.get_parameter("0.bias")
    (state,) = (block.state for block in maker.plan.blocks if block.name == "0.bias")
    before, gradients = state["factor_0"].clone(), list[Tensor]()
    bias.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad.clone()))
    step(1)
    (g,) = gradients
    torch.testing.assert_close(state["factor_0"][0], 0.5 * before[0] + 0.5 * torch.outer(g, g), rtol=1e-4, atol=0)


def test_a_subclass_with_an_update_of_its_own_folds_at_once() -> None:
    class Own(KronDims):
        def update(self, state: Any, evidence: Any, fold: Any) -> None:
            state["mass"].fill_(1)

    assert (
        RotatedDims.folds_last
        and KronDims.folds_last
        and Kron.folds_last
        and not Own.folds_last
        and not RootKronDims.folds_last
    )


def test_recorded_writes_are_made_in_order_and_once() -> None:
    rows, recorder = torch.randn(1, 300, 260, dtype=torch.float64), Recorder()
    out, expected = torch.eye(260, dtype=torch.float64).unsqueeze(0), torch.eye(260, dtype=torch.float64).unsqueeze(0)
    add_moment_(out, rows, rows, 0.5, 2.0, recorder)
    assert torch.equal(out, expected)
    make(recorder.calls)
    add_moment_(expected, rows, rows, 0.5, 2.0)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("first", ["late", "at once"])
def test_a_cache_that_is_the_statistic_stays_as_it_was(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between refreshes, as of a solver that only multiplies with it."""
    parts: dict[str, Any] = {"representation": KronDims(), "solver": CG(damping=1.0, iterations=5)}
    maker, _, step = steps_of("custom", preconditioner_interval=4, **parts)
    with monkeypatch.context() as patch:
        if first == "at once":
            patch.setattr(late, "recorded", lambda *_: None)
        step(0)
    cache = {k: v.clone() for k, v in maker.plan.blocks[0].cache.items()}
    for k in range(1, 4):
        step(k)
    assert all(torch.equal(maker.plan.blocks[0].cache[k], v) for k, v in cache.items())
