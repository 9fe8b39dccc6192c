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
    fallback = {"method": "adam", "nesterov_average": True}  # formed block by block, so that places are in its parts, too
    return from_config(case.model, {"method": method, "fallback": fallback, "beta1": 0.9}), case


def hide(case: Case, hidden: bool) -> None:
    """A pass in evaluation is of another kind, for which the self-checks are made again."""
    case.model.hidden = hidden  # type: ignore[assignment]
    case.model.train(not hidden)


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
    assert {b.name for b in maker.plan.blocks if b.ready} == {"body.weight", "body.bias", "head"}


@pytest.mark.parametrize("place", ["measurement", "first fold", "in a refresh", "in a solve"])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_a_pass_that_has_changed_the_plan_and_fails_is_repeated(method: str, late: bool, place: str) -> None:
    """late: the first micro-batch does not show the hidden use, and its evidence goes over to the new blocks."""
    found = []
    for trouble in (True, False):
        maker, case = made(method)
        hide(case, not late)
        accumulate(maker, case, slice(3))
        hide(case, True)
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


def test_what_came_before_the_plan_goes_over_to_it() -> None:
    """The statistic of a layer that both plans have is that of both micro-batches, in the step and before it."""
    found = []
    for ignored in ([], ["body.*"]):
        torch.manual_seed(0)
        case = models.build(Hidden, 6, 4)
        maker: Any = from_config(case.model, {"method": "kfac", "ignore": ignored, "decay": 0.9})
        for hidden in (False, True):
            for rows in (slice(3), slice(3, None)):
                hide(case, hidden and rows.start is not None)
                accumulate(maker, case, rows)
            maker.precondition()
        assert [b.name for b in maker.plan.blocks if b.options.method == "method"] == ["head"]
        found.append(maker.state_dict()["sites"]["head"])
    assert equal_states(*found)


class Pair(nn.Module):
    """Two layers that make one stack, one of which rests at first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.both = nn.Linear(4, 4), nn.Linear(4, 4), False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.tanh(self.a(x))
        return self.b(y) if self.both else y


def test_a_refresh_of_some_members_is_undone() -> None:
    """The cache of the stack was there before, and is not written to."""
    torch.manual_seed(0)
    case = models.build(Pair, 6, 4)
    maker: Any = from_config(case.model, {"method": "kfac"})
    accumulate(maker, case, slice(None))
    maker.precondition()
    (block,) = maker.plan.blocks
    assert block.ready == {"a"}
    case.model.both = True  # type: ignore[assignment]
    accumulate(maker, case, slice(None))
    cache = {k: v.clone() for k, v in block.cache.items()}
    with PLACES["in a solve"](maker, case), pytest.raises(Planted):
        maker.precondition()
    assert all(torch.equal(v, cache[k]) for k, v in block.cache.items()) and block.ready == {"a"}
    maker.precondition()
    assert block.ready == {"a", "b"} and not all(torch.equal(v, cache[k]) for k, v in block.cache.items())
