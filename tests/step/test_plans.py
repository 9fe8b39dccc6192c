"""Another plan in the middle of a step: self-checks leave a layer to the fallback when they have seen a use that is hidden."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmaker import from_config
from gradmaker.errors import SelfCheckWarning
from tests import models
from tests.models import Case
from tests.test_retries import PLACES, Planted
from tests.test_state import equal_states

pytestmark = pytest.mark.filterwarnings(f"ignore::{SelfCheckWarning.__module__}.{SelfCheckWarning.__qualname__}")


class Hidden(nn.Module):
    """One weight is used beside the call of its layer, when asked."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.hidden = nn.Linear(4, 5), nn.Linear(5, models.CLASSES), True

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.body(x)))
        return y + (torch.tanh(x) @ self.body.weight.T)[:, : models.CLASSES] if self.hidden else y


def made(method: str) -> tuple[Any, Case]:
    torch.manual_seed(0)
    case = models.build(Hidden, 6, 4)
    return from_config(case.model, {"method": method, "fallback": "adam", "momentum": 0.9}), case


def accumulate(maker: Any, case: Case, rows: slice) -> None:
    maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x[rows]), case.t[rows])
    maker.accumulate(0.5)


@pytest.mark.parametrize("method", ["kfac", "ekfac", "kbfgs"])
def test_a_fallback_that_comes_later_has_clocks(method: str) -> None:
    """What it treats is measured and refreshed from then on."""
    maker, case = made(method)
    assert "fallback" not in maker.plan.methods
    for _ in range(2):
        case.model.zero_grad()
        accumulate(maker, case, slice(None))
        raw = case.model.body.weight.grad.clone()  # type: ignore[union-attr, operator]
        maker.precondition()
        assert not torch.equal(case.model.body.weight.grad, raw)  # type: ignore[union-attr, arg-type]
    assert {b.name for b in maker.plan.blocks if b.cache} == {"body.weight", "body.bias", "head"}


@pytest.mark.parametrize("place", ["measurement", "first fold", "second fold", "in a refresh", "in a solve"])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_a_pass_that_has_changed_the_plan_and_fails_is_repeated(method: str, late: bool, place: str) -> None:
    """late: the first micro-batch does not show the hidden use, and its evidence goes over to the new blocks."""
    found = []
    for trouble in (True, False):
        maker, case = made(method)
        case.model.hidden = not late  # type: ignore[assignment]
        accumulate(maker, case, slice(3))
        case.model.hidden = True  # type: ignore[assignment]
        if trouble:
            with PLACES[place](maker, case), pytest.raises(Planted):
                accumulate(maker, case, slice(3, None))
                maker.precondition()
        if not trouble or maker.step_state.now.part == 1:
            accumulate(maker, case, slice(3, None))
        maker.precondition()
        found.append((maker.state_dict(), [p.grad for p in case.model.parameters()]))
    assert equal_states(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
