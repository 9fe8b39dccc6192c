"""An exception anywhere in a loop that is not the maker's, and that part of the loop again: it counts once, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import Case
from tests.step.test_machine import SIZES
from tests.test_retries import PLACES, Planted, maker_of
from tests.test_state import equal_states

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "kfac": ("kfac", {"beta1": 0.9, "curvature_interval": 2, "preconditioner_interval": 2, "warmup_steps": 0}),
    "kfac beside adam": ("kfac", {"fallback": "adam", "ignore": ["0.bias"], "fisher": "FisherMC"}),
    "kfac clipped": ("kfac", {"clip": 1e-6, "clip_learning_rate": 0.1}),
    "ekfac": ("ekfac", {}),
    "shampoo": ("shampoo", {"grafting": "adam", "beta1": 0.9}),
    "soap": ("soap", {}),
    "adam": ("adam", {}),
    "smw_ng": ("smw_ng", {}),
}


class Loop:
    """A loop with an optimizer of its own."""

    def __init__(self, name: str, accumulation: int) -> None:
        method, options = METHODS[name]
        self.maker, self.case = maker_of(method, **options)
        self.optimizer = torch.optim.SGD(self.case.model.parameters(), 0.01)
        self.maker.attach(self.optimizer, "categorical", accumulation=accumulation)
        self.accumulation = accumulation

    def passes(self, index: int, loss: Any) -> None:
        self.optimizer.zero_grad()
        for part in range(self.accumulation):
            generator = torch.Generator().manual_seed(10 * index + part)
            x = torch.randn(self.case.x.shape, generator=generator, dtype=self.case.x.dtype)[: SIZES[part]]
            (loss(self.case.model(x), self.case.t[: SIZES[part]]) / self.accumulation).backward()

    def held(self) -> Any:
        """What must not change with an exception: what the maker holds, `.grad`, weights and hooks."""
        state = self.maker.state_dict()
        kept = {key: state[key] for key in ("step", "skipped", "measured", "sites")}
        values = {k: p.detach().clone() for k, p in self.case.model.named_parameters()}
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.case.model.modules())
        return {**kept, "weights": values, "hooks": {"number": hooks + len(self.optimizer._optimizer_step_pre_hooks)}}

    def gradients(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.case.model.parameters() if p.grad is not None]

    def step(self, index: int, place: str | None, over: bool) -> None:
        """One step of the loop; after an exception its passes again, or the call of the optimizer, or all if ``over``."""
        if place is None:
            self.passes(index, self.case.loss)
            self.optimizer.step()
            return
        before = self.held()
        if self.failed(place, lambda loss: self.passes(index, loss or self.case.loss)):
            self.optimizer.zero_grad()
            assert equal_states(self.held(), before), place
            self.passes(index, self.case.loss)
        gradients = self.gradients()
        if not self.failed(place, lambda _: self.optimizer.step()):
            return
        assert equal_states(self.held(), before), place
        assert all(torch.equal(a, b) for a, b in zip(gradients, self.gradients(), strict=True)), place
        if over:
            self.passes(index, self.case.loss)
        self.optimizer.step()

    def failed(self, place: str, action: Callable[[Any], Any]) -> bool:
        with PLACES[place](self.maker, self.case) as loss:
            try:
                action(loss)
            except Planted:
                return True
        return False


@pytest.mark.parametrize("over", [False, True], ids=["the optimizer again", "all again"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_what_fails_in_a_loop_is_repeated(name: str, accumulation: int, over: bool) -> None:
    loop, calm = Loop(name, accumulation), Loop(name, accumulation)
    for index, place in enumerate(PLACES):
        loop.step(index, place, over)
        calm.step(index, None, over)
        for p, q in zip(loop.case.model.parameters(), calm.case.model.parameters(), strict=True):
            assert torch.equal(p, q), (index, place)
        assert equal_states(loop.maker.state_dict(), calm.maker.state_dict()), (index, place)


def test_without_zeroing_the_passes_before_an_exception_still_count() -> None:
    """Their gradient is in ``.grad`` still."""
    found = []
    for trouble in (True, False):
        loop = Loop("kfac", 2)
        x, t = loop.case.x, loop.case.t
        for part in (slice(0, 3), slice(3, 6)):
            (loop.case.loss(loop.case.model(x[part]), t[part]) / 2).backward()
            if trouble and not part.start:
                with PLACES["in a solve"](loop.maker, loop.case), pytest.raises(Planted):
                    loop.optimizer.step()
        loop.optimizer.step()
        found.append(loop.maker.state_dict())
    assert equal_states(*found)


@pytest.mark.parametrize("place", [k for k in PLACES if k not in ("model", "loss", "backward")])
def test_an_end_that_is_called_by_hand_leaves_all_as_it_was(place: str) -> None:
    """The user has run the passes; methods of gradients need no more."""
    found = []
    for trouble in (True, False):
        case: Case
        maker, case = maker_of("shampoo", beta1=0.9, grafting="adam")
        for _ in range(2):
            case.model.zero_grad()
            case.loss(case.model(case.x), case.t).backward()
            before, gradients = maker.state_dict(), [p.grad.clone() for p in case.model.parameters()]  # type: ignore[union-attr]
            if trouble:
                with PLACES[place](maker, case), pytest.raises(Planted):
                    maker.precondition()
                assert equal_states(maker.state_dict(), before)
                assert all(torch.equal(p.grad, g) for p, g in zip(case.model.parameters(), gradients, strict=True))  # type: ignore[arg-type]
            maker.precondition()
        found.append((maker.state_dict(), [p.grad for p in case.model.parameters()]))
    assert equal_states(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
