"""Schedules: which steps measure and which refresh, counted where it happens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import gradmaker as gm
from gradmaker.blocks import Block
from gradmaker.curvature.step import Step
from gradmaker.schedule import Clock, Linear, Stepped, as_schedule
from tests.models import mlp

STEPS = 24


def recorded(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, config: Any, x: Any, t: Any
) -> tuple[Any, list[int], dict[str, list[int]]]:
    """A maker after `STEPS` steps, the steps at which curvature was measured, and those at which each block was prepared."""
    maker: Any = next(make for make in gm.METHODS.values() if make.Config is type(config))(model, config)
    measured: list[int] = []
    prepared: dict[str, list[int]] = {b.name: [] for b in maker.plan.blocks}

    curvature = type(maker.plan.blocks[0].triple.curvature)
    measure, refreshed = curvature.measure, Block.refreshed

    def watched_measure(self: Any, step: Step) -> Any:
        measured.append(step.index)
        return measure(self, step)

    def watched_refresh(self: Any, state: Any, previous: Any) -> Any:
        prepared[self.name].append(maker.step)
        return refreshed(self, state, previous)

    monkeypatch.setattr(curvature, "measure", watched_measure)
    monkeypatch.setattr(Block, "refreshed", watched_refresh)
    for _ in range(STEPS):
        model.zero_grad()
        maker.setup_loss_call(nn.functional.cross_entropy, maker.setup_model_call(model, x), t)
        maker.forward_and_backward()
    return maker, measured, prepared


def run(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[list[int], list[int]]:
    """The steps of measurements, and those of refreshes of the first block."""
    case = mlp()
    _, measured, prepared = recorded(monkeypatch, case.model, gm.KfacGradientConfig(stagger=False, **options), case.x, case.t)
    assert len({tuple(p) for p in prepared.values()}) == 1  # without staggering, all at once
    return measured, next(iter(prepared.values()))


UPDATES: dict[str, tuple[Any, int, list[int]]] = {
    "every": (1, 0, list(range(24))),
    "7": (7, 0, [0, 7, 14, 21]),
    "100": (100, 0, [0]),
    "7 after 1": (7, 1, [0, 7, 14, 21]),
    "7 after 2": (7, 2, [0, 1, 8, 15, 22]),
    "7 after 5": (7, 5, [0, 1, 2, 3, 4, 11, 18]),
    "1 after 5": (1, 5, list(range(24))),
    "linear, total 1": (Linear(first=1, last=10, total=1), 0, [0, 1, 11, 21]),
    "linear, total 2": (Linear(first=1, last=10, total=2), 0, [0, 1, 7, 17]),
    "linear, total 3": (Linear(first=1, last=10, total=3), 0, [0, 1, 5, 15]),
    "linear, down": (Linear(first=6, last=1, total=10), 0, [0, 6, 9, *range(11, 24)]),
    "linear, equal": (Linear(first=4, last=4, total=1), 0, [0, 4, 8, 12, 16, 20]),
    "linear after 3": (Linear(first=2, last=10, total=2), 3, [0, 1, 2, 12, 22]),
    "stepped, one": (Stepped(milestones={0: 5}), 0, [0, 5, 10, 15, 20]),
    "stepped": (Stepped(milestones={0: 1, 3: 4, 12: 6}), 0, [0, 1, 2, 3, 7, 11, 15, 21]),
    "stepped, unordered": (Stepped(milestones={12: 6, 3: 4, 0: 1}), 0, [0, 1, 2, 3, 7, 11, 15, 21]),
}


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("key", ["curvature_interval", "preconditioner_interval"])
def test_updates_happen_when_they_are_due(key: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule, warmup, expected = UPDATES[name]
    other = {"curvature_interval": "preconditioner_interval", "preconditioner_interval": "curvature_interval"}[key]
    measured, prepared = run(monkeypatch, **{key: schedule, other: 1, "warmup_steps": warmup})
    found = {"curvature_interval": measured, "preconditioner_interval": prepared}
    assert found[key] == expected and found[other] == list(range(STEPS))


def test_methods_of_gradients_follow_the_same_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = mlp()
    config = gm.ShampooGradientConfig(curvature_interval=5, preconditioner_interval=8, warmup_steps=2, stagger=False)
    _, measured, prepared = recorded(monkeypatch, case.model, config, case.x, case.t)
    assert measured == [0, 1, 6, 11, 16, 21]
    assert set(map(tuple, prepared.values())) == {(0, 1, 9, 17)}


@pytest.mark.parametrize("interval", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("warmup", [0, 3])
def test_staggering_refreshes_every_block_once_a_period_and_shares_the_cost(
    interval: int, warmup: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight layers of eight sizes, so that nothing is stacked; the first refresh of all is at once."""
    widths = [5, 6, 7, 8, 9, 10, 11, 12, 3]
    model = nn.Sequential(*(nn.Linear(i, o) for i, o in pairwise(widths))).double()
    x, t = torch.randn(4, 5, dtype=torch.float64), torch.randint(3, (4,))
    config = gm.KfacGradientConfig(curvature_interval=1, preconditioner_interval=interval, warmup_steps=warmup)
    maker, _, prepared = recorded(monkeypatch, model, config, x, t)
    assert len(prepared) == 8
    begins = range(max(warmup - 1, 0), STEPS - interval + 1, interval)
    for name, steps in prepared.items():
        assert steps[: max(warmup, 1)] == list(range(max(warmup, 1))), name
        for begin in begins[1:]:
            assert sum(begin <= s < begin + interval for s in steps) == 1, name
    cost = {b.name: b.cost for b in maker.plan.blocks}
    begin = begins[1]
    loads = [sum(cost[k] for k, steps in prepared.items() if s in steps) for s in range(begin, begin + interval)]
    assert max(loads) <= sum(cost.values()) / interval + max(cost.values())


def test_before_start_step_the_gradient_stays_plain_and_statistics_are_gathered() -> None:
    case = mlp()
    case.run().backward()
    plain = [p.grad.clone() for p in case.model.parameters() if p.grad is not None]
    maker: Any = gm.KfacGradientMaker(case.model, gm.KfacGradientConfig(start_step=3))
    for index in range(5):
        case.model.zero_grad()
        maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
        maker.forward_and_backward()
        grads = [p.grad for p in case.model.parameters() if p.grad is not None]
        assert all(torch.equal(g, p) for g, p in zip(grads, plain, strict=True)) == (index < 3)
        assert maker.silent() == []


def test_a_measurement_that_comes_to_nothing_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    case = mlp()
    maker: Any = gm.KfacGradientMaker(case.model, gm.KfacGradientConfig(curvature_interval=10, warmup_steps=0))
    reached = []
    for x in (case.x * float("nan"), case.x, case.x):
        case.model.zero_grad()
        maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, x), case.t)
        maker.forward_and_backward()
        reached.append((maker.skipped, len(maker.silent()), maker.step_state.now.clocks.of["method"].measure.next))
    assert reached == [(1, 2, 1), (1, 0, 11), (1, 0, 11)]


def test_hooks_cost_nothing_on_steps_that_measure_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = mlp()
    tapes: list[int] = []
    maker: Any = gm.KfacGradientMaker(case.model, gm.KfacGradientConfig(curvature_interval=4, warmup_steps=0))
    make = maker.new_tape
    monkeypatch.setattr(maker, "new_tape", lambda: tapes.append(maker.step) or make())
    for _ in range(9):
        maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
        maker.forward_and_backward()
    assert tapes == [0, 4, 8]


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "zero": (lambda: as_schedule("curvature_interval", 0), r"curvature_interval=0: expected an integer of at least 1"),
    "negative": (lambda: as_schedule("x", -1), "x=-1"),
    "fraction": (lambda: as_schedule("x", 1.5), "x=1.5"),  # type: ignore[arg-type]
    "true": (lambda: as_schedule("x", True), "x=True"),
    "first": (lambda: Linear(first=0, last=1, total=1), "first=0"),
    "last": (lambda: Linear(first=1, last=-2, total=1), "last=-2"),
    "total": (lambda: Linear(first=1, last=1, total=0), "total=0"),
    "no milestone 0": (lambda: Stepped(milestones={1: 2}), "with one for step 0"),
    "empty": (lambda: Stepped(milestones={}), "with one for step 0"),
    "not a mapping": (lambda: Stepped(milestones=[1, 2]), "with one for step 0"),  # type: ignore[arg-type]
    "interval": (lambda: Stepped(milestones={0: 1, 5: 0}), r"milestones\[5\]=0"),
    "milestone": (lambda: Stepped(milestones={0: 1, -5: 1}), "-5 is not a step"),
    "text": (lambda: Stepped(milestones={0: 1, "5": 1}), "'5' is not a step"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_schedules_are_refused(name: str) -> None:
    make, text = WRONG[name]
    with pytest.raises(ValueError, match=text):
        make()


def test_schedules_are_values() -> None:
    for make in (lambda: Linear(first=1, last=2, total=3), lambda: Stepped(milestones={0: 1, 2: 3})):
        assert make() == make() and len({make(), make()}) == 1
        with pytest.raises(FrozenInstanceError):
            make().total = 3  # type: ignore[attr-defined,union-attr,misc]
    assert Stepped(milestones={0: 1, 2: 3}) != Stepped(milestones={0: 1, 2: 4})


def test_a_clock_that_was_set_back_does_not_repeat_a_period() -> None:
    clock = Clock(as_schedule("x", 4), 0)
    assert [s for s in range(10) if clock.tick(s)] == [0, 4, 8]
    assert not any(clock.tick(s) for s in (9, 10, 11)) and clock.tick(12)


def test_blocks_share_a_period_by_cost() -> None:
    case = mlp()
    maker: Any = gm.KfacGradientMaker(case.model)
    blocks: list[Block] = maker.plan.blocks
    shares = [b.share for b in blocks]
    assert shares[0] == 0.0 and shares == sorted(shares) and shares[-1] < 1.0
    assert shares[1] == pytest.approx(blocks[0].cost / sum(b.cost for b in blocks))
