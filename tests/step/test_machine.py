"""Random transitions of a step, with planted exceptions, saves and resumes, against a simple model: what counts in the end.

The model is a list of steps, each a list of micro-batches. Whatever has happened on the way, the maker is then, bit for bit,
where one is that made these steps without trouble.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from gradmaker import from_config
from gradmaker.step.state import Phase
from tests import models
from tests.models import Case
from tests.test_retries import PLACES, Planted
from tests.test_state import equal_states

CONFIGS: dict[str, dict[str, Any]] = {
    "kfac, drawn, beside adam": {
        "method": "kfac",
        "fisher": "FisherMC",
        "fallback": "adam",
        "ignore": ["0.bias"],
        "beta1": 0.9,
        "curvature_interval": 2,
        "preconditioner_interval": 2,
    },
    "kfac, clipped": {"method": "kfac", "clip": 1e-6, "clip_learning_rate": 0.1, "preconditioner_interval": 2},
    "shampoo, grafted": {"method": "shampoo", "grafting": "adam", "beta1": 0.9, "preconditioner_interval": 2},
    "psgd": {"method": "psgd"},  # its evidence is pooled
}
BATCHES, RATE = 4, 1e-2
SIZES = (6, 3, 2, 1)
Part = tuple[int, float]
"""Which micro-batch, and its weight."""

parts = st.tuples(st.integers(0, BATCHES - 1), st.sampled_from([1.0, 0.5, 0.25]))
places = st.sampled_from([*PLACES])


class Dropping(nn.Sequential):
    """Draws from torch's global generator."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, models.CLASSES))


def made(name: str) -> tuple[Any, Case]:
    torch.manual_seed(0)
    case = models.build(Dropping, 6, 4)
    torch.manual_seed(1)
    return from_config(case.model, CONFIGS[name]), case


def declare(maker: Any, case: Case, part: Part, loss: Any = None) -> None:
    generator = torch.Generator().manual_seed(part[0])
    rows = SIZES[part[0]]
    x = torch.randn(case.x.shape, generator=generator, dtype=case.x.dtype)[:rows]
    maker.setup_loss_call(loss or case.loss, maker.setup_model_call(case.model, x), case.t[:rows])


def move(case: Case) -> list[Tensor]:
    """The optimizer's step; returns the gradients that it took."""
    found = [p.grad.clone() for p in case.model.parameters() if p.grad is not None]
    with torch.no_grad():
        for p in case.model.parameters():
            p.sub_(p.grad, alpha=RATE)  # type: ignore[arg-type]
    case.model.zero_grad()
    return found


class Steps(RuleBasedStateMachine):
    @initialize(name=st.sampled_from([*CONFIGS]))
    def begin(self, name: str) -> None:
        self.name = name
        self.maker, self.case = made(name)
        self.calm, self.other = made(name)
        self.calm_random = torch.get_rng_state()
        self.random = torch.get_rng_state()
        self.done = 0
        self.parts: list[tuple[Part, Tensor]] = []  # of the step under way, with the random numbers that each began with
        self.failed = False

    # ---------------------------------------------------------------- what is done
    def snapshot(self) -> Any:
        grads = [None if p.grad is None else p.grad.clone() for p in self.case.model.parameters()]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.case.model.modules()]
        return self.maker.state_dict(), grads, hooks, torch.get_rng_state()

    def same(self, before: Any, after: Any) -> None:
        assert equal_states(before[0], after[0])
        for a, b in zip(before[1], after[1], strict=True):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
        assert before[2] == after[2] and torch.equal(before[3], after[3])

    def tried(self, action: Callable[[Any], None], place: str | None) -> bool:
        """Whether an action has come to its end; else all is as it was."""
        torch.set_rng_state(self.random)
        before = None if place is None else self.snapshot()
        try:
            with nullcontext() if place is None else PLACES[place](self.maker, self.case) as loss:
                action(loss)
        except Planted:
            after = self.snapshot()
            if not self.failed:  # else the call may have begun the step again
                if self.maker.step_state.now.phase is Phase.FAILED:
                    before[0]["pass"]["phase"] = Phase.FAILED.name
                self.same(before, after)
            self.random = after[3]
            return False
        self.random = torch.get_rng_state()
        return True

    def began_again(self) -> None:
        """A first pass after an exception at the end begins the step again."""
        if self.failed:
            self.parts, self.failed = [], False

    @rule(part=parts, place=st.none() | places)
    def accumulate(self, part: Part, place: str | None) -> None:
        random = self.random

        def action(loss: Any) -> None:
            declare(self.maker, self.case, part, loss)
            self.maker.accumulate(part[1])

        done = self.tried(action, place)
        self.began_again()
        if done:
            self.parts.append((part, random))

    @rule(part=parts, place=st.none() | places)
    def forward_and_backward(self, part: Part, place: str | None) -> None:
        random = self.random

        def action(loss: Any) -> None:
            declare(self.maker, self.case, part, loss)
            self.maker.forward_and_backward(part[1])

        done = self.tried(action, place)
        self.began_again()
        if done:
            alone = not self.parts  # such a step may hold gradients by their rows, which are rounded differently
            self.parts.append((part, random))
            self.ended(alone)

    @precondition(lambda self: self.parts)
    @rule(place=st.none() | places)
    def end(self, place: str | None) -> None:
        if self.tried(lambda _: self.maker.precondition(), place):
            self.ended()
        else:
            self.failed = True

    @rule()
    def resume(self) -> None:
        """In another maker, on the same model."""
        state = self.maker.state_dict()
        self.maker = from_config(self.case.model, CONFIGS[self.name])
        for p in self.case.model.parameters() if self.parts else ():
            p.grad = None
        self.maker.load_state_dict(state)
        assert equal_states(self.maker.state_dict(), state)

    def ended(self, alone: bool = False) -> None:
        """The same step in the maker that has no trouble.  alone: whether one call was the whole step"""
        for part, random in self.parts:
            torch.set_rng_state(random)
            declare(self.calm, self.other, part)
            (self.calm.forward_and_backward if alone else self.calm.accumulate)(part[1])
        if not alone:
            self.calm.precondition()
        assert all(torch.equal(a, b) for a, b in zip(move(self.case), move(self.other), strict=True))
        assert equal_states(self.maker.state_dict(), self.calm.state_dict())
        self.done, self.parts, self.failed = self.done + 1, [], False

    # ---------------------------------------------------------------- what always holds
    @invariant()
    def knows_where_it_is(self) -> None:
        if not hasattr(self, "parts"):
            return
        now = self.maker.step_state.now
        expected = Phase.FAILED if self.failed else Phase.PASSES if self.parts else Phase.BETWEEN
        assert (now.index, now.phase, now.part) == (self.done, expected, len(self.parts))
        assert [weight for weight, _ in now.shares] == [part[1] for part, _ in self.parts]


TestSteps = Steps.TestCase
TestSteps.settings = settings(
    max_examples=15, stateful_step_count=16, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
