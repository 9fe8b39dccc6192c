"""Checks in loops of all kinds: micro-batches, attached makers, resumed ones; and what the summary says."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import KfacGradientConfig, KfacGradientMaker
from gradmaker.curvature import FisherExact
from gradmaker.errors import SelfCheckError, SelfCheckWarning
from tests import measure
from tests.models import Case
from tests.self_checks.planted import Count, build, declared, is_right, labels, maker_of


class Centred(nn.Module):
    """Examples mix before the last layer, and a weight is used beside its module."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mid, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x))
        h = torch.tanh(self.mid(h - h.mean(0))) + F.linear(h, self.mid.weight)
        y: Tensor = self.head(h)
        return y


def centred() -> Case:
    return build(Centred, 6, 3, loss=F.cross_entropy, t=labels(6))


def test_micro_batches_are_checked_once_and_measured_rightly(count: Count) -> None:
    case = centred()
    maker = maker_of(case, "full")
    said = []
    for _ in range(2):
        case.model.zero_grad()
        for part in (slice(0, 2), slice(2, 6)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                declared(maker, case.model, case._replace(x=case.x[part], t=case.t[part]))
                maker.accumulate(weight=len(case.x[part]) / len(case.x))
            said.append(len(caught))
        maker.precondition()
    assert said[0] == 1 and sum(said[2:]) == 0
    parts = [case._replace(model=copy.deepcopy(case.model), x=case.x[p], t=case.t[p]) for p in (slice(0, 2), slice(2, 6))]
    measure.compare(maker, measure.ggn(parts[0]) / 3 + measure.ggn(parts[1]) * 2 / 3, tolerance=1e-9)


def test_an_attached_maker_checks_and_falls_back(count: Count) -> None:
    case = centred()
    maker = maker_of(case, "full")
    optimizer = torch.optim.SGD(case.model.parameters(), 0.0)
    maker.attach(optimizer, "categorical")
    before = count.checks
    for k in range(3):
        optimizer.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            case.loss(case.model(case.x), case.t).backward()
            optimizer.step()
        assert [w.category for w in caught] == ([SelfCheckWarning] if k == 0 else [])
    assert count.checks - before == 1
    maker.remove()
    assert is_right(maker, case)


def test_an_attached_maker_refuses_on_demand() -> None:
    case = centred()
    maker = maker_of(case, "full", self_check="error")
    optimizer = torch.optim.SGD(case.model.parameters(), 0.1)
    maker.attach(optimizer, "categorical")
    before = copy.deepcopy(case.model.state_dict())
    with pytest.raises(SelfCheckError, match=r"mid\.weight"):
        case.loss(case.model(case.x), case.t).backward()
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in case.model.state_dict().items())
    maker.remove()


def kfac_step(maker: Any, optimizer: torch.optim.Optimizer, case: Case) -> None:
    optimizer.zero_grad()
    declared(maker, maker.model, case)
    maker.forward_and_backward()
    optimizer.step()


def kfac_of(model: nn.Module, fallback: str) -> tuple[Any, torch.optim.Optimizer]:
    config = KfacGradientConfig(fisher=FisherExact(), fallback=fallback, decay=0.5, preconditioner_interval=2)
    return KfacGradientMaker(model, config), torch.optim.SGD(model.parameters(), 0.1)


@pytest.mark.parametrize("fallback", ["gradient", "adam", "unit_ng"])
def test_resuming_after_layers_were_left_to_the_fallback_is_bitwise(fallback: str) -> None:
    case = centred()
    with pytest.warns(SelfCheckWarning, match=r"mid\.weight"):
        maker, optimizer = kfac_of(case.model, fallback)
        kfac_step(maker, optimizer, case)
    for _ in range(2):
        kfac_step(maker, optimizer, case)
    state = copy.deepcopy(maker.state_dict())
    assert state["unseen"] == ["mid.bias", "mid.weight"]
    model = copy.deepcopy(case.model)
    fresh, other = kfac_of(model, fallback)
    fresh.load_state_dict(state)
    said: list[Any] = []
    for _ in range(3):
        kfac_step(maker, optimizer, case)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kfac_step(fresh, other, case)
        said += caught
    assert len(said) <= 1
    for p, q in zip(case.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert sorted(fresh.summary().rows) == sorted(maker.summary().rows)


def test_the_summary_says_who_treats_what() -> None:
    case = centred()
    maker, optimizer = kfac_of(case.model, "gradient")
    with pytest.warns(SelfCheckWarning):
        kfac_step(maker, optimizer, case)
    text = str(maker.summary())
    assert "has uses outside of its layer's calls, fallback 'gradient'" in text
    assert "body.weight, body.bias (measured apart)" in text
    off: Any = KfacGradientMaker(case.model, KfacGradientConfig(self_check="off"))
    kfac_step(off, optimizer, case)
    assert "unchecked, body: self_check='off'" in str(off.summary())
