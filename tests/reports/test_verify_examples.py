"""`maker.verify()` on rules that are wrong for one example alone, the first or the last, in batches of several sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS
from gradmaker.capture.rules.convolutions import ConvRule
from gradmaker.capture.rules.layers import EmbeddingRule, LinearRule
from gradmaker.capture.rules.normalisations import LayerNormRule
from tests import models
from tests.models import Case

SUBJECTS: dict[str, tuple[Any, Any, str]] = {  # the rule, a model of n examples, the site
    "linear": (
        LinearRule,
        lambda n: models.build(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)), n, 4),
        "0",
    ),
    "convolution": (ConvRule, lambda n: models.build(lambda: nn.Sequential(nn.Conv1d(2, 3, 4), nn.Flatten()), n, 2, 4), "0"),
    "norm": (LayerNormRule, lambda n: models.build(lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)), n, 4), "0"),
    "embedding": (
        EmbeddingRule,
        lambda n: models.build_tokens(
            lambda: nn.Sequential(nn.Embedding(7, 2), nn.Flatten(), nn.Linear(6, 3)), n, 3, 7, tags=False
        ),
        "0.weight",
    ),
}


def verified(case: Case) -> Any:
    maker: Any = METHODS["kfac"](case.model)
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(case.model, case.x), case.t)
    return maker.verify()


@pytest.mark.parametrize("which", ["first", "last"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_rule_that_is_wrong_for_one_example_alone(name: str, n: int, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, make, site = SUBJECTS[name]
    assert verified(make(n)).passed
    original, index = rule.gradients, 0 if which == "first" else n - 1

    def off(self: Any, *args: Any) -> Tensor:
        found = original(self, *args).clone()  # (k, G, n, r, o)
        found[:, :, index] *= 1.5
        return found

    monkeypatch.setattr(rule, "gradients", off)
    found = verified(make(n))
    assert not found.passed and site in {c.site for c in found.checks if not c.passed}


@pytest.mark.parametrize("n", [2, 3, 6])
def test_the_inputs_of_the_last_example_alone(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LinearRule.inputs

    def off(self: Any, *args: Any) -> Tensor:
        found = original(self, *args).clone()  # (G, n, r, i)
        found[:, -1] = found[:, -1].flip(-1)
        return found

    monkeypatch.setattr(LinearRule, "inputs", off)
    assert not verified(SUBJECTS["linear"][1](n)).passed


@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize("trained", [True, False])
def test_no_alarm_for_the_eps_of_a_norm(eps: float, trained: bool) -> None:
    """With a layer before a batch norm, whose statistics are then held fixed."""
    layers: Any = nn.Linear(4, 4), nn.BatchNorm1d(4, eps=eps), nn.Linear(4, 4), nn.LayerNorm(4, eps=eps), nn.Linear(4, 3)
    case = models.build(lambda: nn.Sequential(*layers), 6, 4)
    case = case._replace(x=case.x * (1.0 if eps > 0.1 else 1e-2))
    with torch.no_grad():
        case.model[0].bias.zero_()  # type: ignore[index, union-attr, operator]
    found = verified(Case(case.model.train(trained), *case[1:]))
    assert found.passed, str(found)
