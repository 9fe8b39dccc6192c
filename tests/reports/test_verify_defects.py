"""`maker.verify()` where something is wrong with the model, the loss or a rule; and what it leaves behind, which is nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import from_config
from gradmaker.capture.rules.layers import LinearRule
from gradmaker.errors import SelfCheckWarning
from gradmaker.reports.verification import Check, Verification
from gradmaker.self_checks.checks import SelfChecks
from gradmaker.solvers import Cholesky
from tests import models


def maker_of(case: models.Case, method: str = "kfac", loss: Callable[..., Tensor] | None = None, **options: Any) -> Any:
    maker = from_config(case.model, {"method": method, **options})
    declare(maker, case, loss)
    return maker


def declare(maker: Any, case: models.Case, loss: Callable[..., Tensor] | None = None) -> None:
    maker.setup_loss_call(loss or case.loss, maker.setup_model_call(case.model, case.x), case.t)


def named(found: Verification) -> set[str]:
    """The sites that are not right."""
    return {c.site for c in found.checks if not c.passed}


def only(found: Verification, site: str) -> Check:
    (check,) = (c for c in found.checks if c.site == site)
    return check


# ------------------------------------------------------------------ rules
def wrong_for(monkeypatch: pytest.MonkeyPatch, side: str, example: int, error: float) -> None:
    """A rule of linear layers that is off for one example alone."""
    original = getattr(LinearRule, side)

    def off(self: Any, *args: Any) -> Any:
        value = original(self, *args)
        axis = 1 if side == "inputs" else 2  # (G, n, r, i), (k, G, n, r, o)
        scale = torch.ones(value.shape[axis], dtype=value.dtype)
        scale[example] += error
        return value * scale.view(-1, 1, 1)

    monkeypatch.setattr(LinearRule, side, off)


@pytest.mark.parametrize("self_check", ["fallback", "off"])
@pytest.mark.parametrize("method", ["kfac", "unit_ng", "smw_ng"])
@pytest.mark.parametrize("side", ["inputs", "gradients"])
@pytest.mark.parametrize("example", [0, -1], ids=["first", "last"])
def test_a_rule_that_is_wrong_for_one_example_is_found(
    example: int, side: str, method: str, self_check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = models.mlp()
    assert maker_of(case, method, self_check=self_check).verify().passed
    wrong_for(monkeypatch, side, example, 0.1)
    found = maker_of(case, method, self_check=self_check).verify()
    assert named(found) == {c.site for c in found.checks}, str(found)
    assert all(c.gradients is not None and c.gradients > 0.05 for c in found.checks), str(found)


def test_the_gradients_alone_show_an_example_that_is_off_by_a_millionth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than what the self-checks allow for the sum over the batch need not be, and more than the tolerance."""
    case = models.mlp()
    monkeypatch.setattr(SelfChecks, "run", lambda self, *args, **kwargs: set())
    wrong_for(monkeypatch, "gradients", -1, 1e-6)
    found = maker_of(case).verify()
    assert not found.passed
    assert all(c.verdict == "ABOVE TOLERANCE" and c.gradients is not None and 1e-7 < c.gradients < 1e-5 for c in found.checks)


# ------------------------------------------------------------------ models
class Beside(nn.Module):
    """A layer that is called, and whose weight is used once more without it."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.body, self.head, self.strength = nn.Linear(4, 4), nn.Linear(4, models.CLASSES), strength

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x))
        out: Tensor = self.head(h + self.strength * F.linear(h, self.body.weight))
        return out


@pytest.mark.parametrize("self_check", ["fallback", "off"])
@pytest.mark.parametrize("method", ["kfac", "ekfac", "unit_ng", "smw_ng"])
@pytest.mark.parametrize("strength", [1.0, 1e-3])
def test_a_layer_that_is_used_beside_its_module_is_named(strength: float, method: str, self_check: str) -> None:
    case = models.build(lambda: Beside(strength), 6, 4)
    found = maker_of(case, method, self_check=self_check).verify()
    assert named(found) == {"body"}, str(found)
    assert only(found, "body").verdict == "SELF-CHECK FAILED" and "self-check failed" in str(found)
    assert only(found, "head").verdict == "ok"


@pytest.mark.parametrize("method", ["kfac", "unit_ng"])
def test_it_is_named_after_a_step_too(method: str) -> None:
    case = models.build(lambda: Beside(1.0), 6, 4)
    maker = maker_of(case, method)
    with pytest.warns(SelfCheckWarning):
        maker.forward_and_backward()
    declare(maker, case)
    found = maker.verify()
    assert named(found) == {"body.weight", "body.bias"} and "SELF-CHECK FAILED" in str(found)


def test_it_is_said_in_the_summary() -> None:
    case = models.build(lambda: Beside(1.0), 6, 4)
    maker = maker_of(case, "unit_ng")
    assert "measured directly" not in str(maker.summary())
    with pytest.warns(SelfCheckWarning):
        maker.forward_and_backward()
    marked = [row[0] for row in maker.summary().rows if "measured directly" in row[0]]
    assert marked == ["body.weight (measured directly)", "body.bias (measured directly)"]


class Mixing(nn.Module):
    """Examples that depend on each other in front of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, models.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        out: Tensor = self.head(torch.tanh(h - h.mean(0)))
        return out


@pytest.mark.parametrize("method", ["kfac", "unit_ng"])
def test_examples_that_depend_on_each_other_are_noted_and_right(method: str) -> None:
    case = models.build(Mixing, 6, 4)
    maker = maker_of(case, method)
    found = maker.verify()
    assert found.passed and found.complete, str(found)
    assert only(found, "body").gradients is not None and "apart" in found.notes["body"] and "head" not in found.notes
    strict = maker_of(case, method, self_check="error").verify()
    assert named(strict) == {"body"} and only(strict, "body").verdict == "SELF-CHECK FAILED"
    maker.forward_and_backward()
    assert any(row[0] == "body.weight, body.bias (measured apart)" for row in maker.summary().rows)


# ------------------------------------------------------------------ losses
def penalised(y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(y, t) + 0.1 * y.square().mean()


def focal(y: Tensor, t: Tensor) -> Tensor:
    ce = F.cross_entropy(y, t)
    return ce.exp()


@pytest.mark.parametrize("loss", [penalised, focal])
def test_a_part_of_the_loss_that_is_not_recognised_is_found(loss: Callable[..., Tensor]) -> None:
    case = models.mlp()
    found = maker_of(case, loss=loss, self_check="error").verify()
    assert named(found) == {"0", "2"} and "of the loss" in str(found), str(found)
    followed = maker_of(case, loss=loss).verify()
    assert followed.passed and "Hessian of the whole loss" in followed.notes["loss"]
    emp = {"fisher": "FisherEmp"}
    assert maker_of(case, loss=loss, **emp).verify().passed
    assert maker_of(case, "adam", loss=loss).verify().passed


def twice(y: Tensor, t: Tensor) -> Tensor:
    """Of an output, and of what is made of it."""
    return F.cross_entropy(y, t) + F.cross_entropy(2 * y.tanh(), t)


def test_a_loss_that_cannot_be_checked_is_noted() -> None:
    case = models.mlp()
    maker = maker_of(case, loss=twice)
    found = maker.verify()
    assert found.passed and found.complete
    assert "unchecked" in found.notes["loss"] and "computed from another" in str(found)
    assert not maker.summary().unchecked and "unchecked" not in str(maker.summary())
    maker.forward_and_backward()
    assert list(maker.summary().unchecked) == ["loss"] and "unchecked, loss: one output" in str(maker.summary())


def test_a_part_of_the_loss_that_was_accepted_is_noted() -> None:
    found = maker_of(models.mlp(), loss=penalised, self_check="off").verify()
    assert found.passed and "of the loss" in found.notes["loss"]


def test_the_summary_says_that_nothing_was_checked() -> None:
    case = models.mlp()
    maker = maker_of(case, self_check="off")
    maker.forward_and_backward()
    assert maker.summary().unchecked == dict.fromkeys(["0", "2"], "self_check='off'")
    assert "unchecked, 0: self_check='off'" in str(maker.summary())


def test_the_summary_names_layers_without_a_gradient() -> None:
    """Behind weights that are zero nothing can be proven, until they are not."""
    case = models.mlp()
    with torch.no_grad():
        case.model.get_submodule("2").weight.zero_()  # type: ignore[operator, union-attr]
    maker = maker_of(case)
    maker.forward_and_backward()
    assert list(maker.summary().unchecked) == ["0"] and "was zero" in str(maker.summary())
    with torch.no_grad():
        case.model.get_submodule("2").weight.fill_(0.1).add_(torch.arange(5.0))  # type: ignore[operator, union-attr]
    declare(maker, case)
    maker.forward_and_backward()
    assert not maker.summary().unchecked


# ------------------------------------------------------------------ nothing is left behind
class Stateful(nn.Module):
    """Batch norm, dropout, a buffer that is written to, and examples that depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.mixed = nn.Linear(4, 5), nn.BatchNorm1d(5), Mixing()
        self.pre, self.drop = nn.Linear(5, 4), nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros(()))
        self.broken = False

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.mixed(self.pre(self.drop(self.norm(self.body(x)))))
        if self.broken:
            raise RuntimeError("broken")
        return out


def snapshot(case: models.Case, maker: Any) -> list[Any]:
    """All that must stay."""
    model, own = case.model, maker.checks.arrangement
    tensors = [*model.state_dict().values(), *(t for p in model.parameters() if (t := p.grad) is not None)]
    held = [v for b in maker.plan.blocks for part in (b.state, b.cache, b.average) for v in part.values()]
    flags = [m.training for m in model.modules()] + [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    verdicts = [dict(own.orders), set(own.direct), set(own.joint), dict(own.checked), dict(own.notes)]
    return [
        [t.clone() for t in tensors + held],
        torch.get_rng_state(),
        flags,
        verdicts,
        maker.step,
        list(map(id, maker.plan.blocks)),
    ]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def broken(monkeypatch: pytest.MonkeyPatch, case: models.Case, where: str) -> None:
    def fail(self: Any, *args: Any) -> Any:
        raise KeyError("broken")

    if where == "model":
        case.model.broken = True  # type: ignore[assignment]
    elif where == "rule":
        monkeypatch.setattr(LinearRule, "inputs", fail)
    elif where == "solver":
        monkeypatch.setattr(Cholesky, "axes", fail)


@pytest.mark.parametrize("where", ["nowhere", "model", "rule", "solver"])
@pytest.mark.parametrize("steps", [0, 1])
def test_verify_leaves_nothing_behind(steps: int, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = models.build(Stateful, 6, 4)
    maker = maker_of(case)
    for _ in range(steps):
        maker.forward_and_backward()
        declare(maker, case)
    before = snapshot(case, maker)
    broken(monkeypatch, case, where)
    if where == "nowhere":
        assert maker.verify().passed
    else:
        with pytest.raises((RuntimeError, KeyError), match="broken"):
            maker.verify()
    assert same(snapshot(case, maker), before)


def test_findings_are_those_of_the_next_step_alone() -> None:
    """What `verify` finds is not what the maker goes by, before a step of its own."""
    case = models.build(lambda: Beside(1.0), 6, 4)
    maker = maker_of(case, "unit_ng")
    before, blocks = snapshot(case, maker), list(maker.plan.blocks)
    assert not maker.verify().passed
    assert same(snapshot(case, maker), before) and list(maker.plan.blocks) == blocks
    with pytest.warns(SelfCheckWarning):
        maker.forward_and_backward()


def test_a_step_after_verify_is_the_step_without_it() -> None:
    found = []
    for checked in (False, True):
        case = models.build(Stateful, 6, 4)
        maker = maker_of(case)
        torch.manual_seed(0)
        for _ in range(3):
            if checked:
                assert maker.verify().passed
            maker.forward_and_backward()
            declare(maker, case)
        found.append([p.grad.clone() for p in case.model.parameters() if p.grad is not None])
    assert all(map(torch.equal, *found))
