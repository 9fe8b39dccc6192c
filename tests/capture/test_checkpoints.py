"""Activation checkpoints make no difference to a step, or are refused where torch allows nothing but a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradmaker import METHODS, from_config
from gradmaker.solvers import AdaptiveDamping
from tests import models, oracles
from tests.methods.test_methods import PRECONDITIONED, passes
from tests.models import CLASSES, Case
from tests.registry import suited, without_draws, without_search

SENTENCE = r"(checkpoint with use_reentrant=True|reentrant checkpoints).* checkpoint\(\.\.\., use_reentrant=False\)"
NAMES = {None: "none", False: "saved", True: "reentrant"}


class Early(nn.Module):
    """The first layers in a checkpoint: nothing that goes into it depends on a weight."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)), nn.Linear(4, CLASSES)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()  # as torch asks for
        h = self.body(x) if self.use_reentrant is None else checkpoint(self.body, x, use_reentrant=self.use_reentrant)
        y: Tensor = self.head(torch.tanh(h))
        return y


class Loose(nn.Module):
    """A parameter of no layer, that the model itself multiplies by in a checkpoint."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.scale, self.norm = nn.Parameter(torch.rand(4) + 0.5), nn.BatchNorm1d(4)
        self.use_reentrant = use_reentrant

    def body(self, h: Tensor) -> Tensor:
        y: Tensor = self.norm(torch.tanh(h * self.scale))
        return y

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = self.body(h) if self.use_reentrant is None else checkpoint(self.body, h, use_reentrant=self.use_reentrant)
        y: Tensor = self.head(h)
        return y


MAKE: dict[str, Callable[[bool | None], Case]] = {
    "middle": models.checkpointed,
    "early": lambda mode: models.build(lambda: Early(mode), 5, 4),
    "loose": lambda mode: models.build(lambda: Loose(mode), 5, 4),
}


def steps(case: Case, maker: Any, count: int = 3) -> Tensor:
    """The weights after some steps of SGD."""
    for k in range(count):
        case.model.zero_grad(set_to_none=True)
        passes(maker, case, case.x.roll(k, 1), case.t.roll(k, 0))
        with torch.no_grad():
            for p in case.model.parameters():
                p -= 0.05 * p.grad  # type: ignore[operator]
    return torch.cat([p.detach().flatten() for p in case.model.parameters()])


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved", "reentrant"])
@pytest.mark.parametrize("method", PRECONDITIONED)
@pytest.mark.filterwarnings("ignore:self-check. .*a backward pass for each:gradmaker.SelfCheckWarning")  # slower, not otherwise
def test_a_checkpoint_changes_nothing_or_is_refused(method: str, use_reentrant: bool, name: str) -> None:
    options = {"method": method, **without_search(method)}
    plain, case = suited(method, lambda: MAKE[name](None)), MAKE[name](use_reentrant)
    expected = steps(plain, from_config(plain.model, options))
    try:
        found = steps(case, from_config(case.model, options))
    except RuntimeError as error:
        assert use_reentrant, error
        with pytest.raises(RuntimeError, match=SENTENCE):
            raise
        return
    assert oracles.relative_error(found, expected) < 1e-9


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize(
    "method", [m for m in PRECONDITIONED if "fisher" in METHODS[m].Config.__dataclass_fields__ and m != "kfra"]
)
def test_what_needs_output_gradients_alone_takes_both_modes(method: str, name: str) -> None:
    """One backward pass after another; drawn targets are the same in all modes."""
    for options in ({"method": method}, {"method": method, **without_draws(method)}):
        cases = [MAKE[name](mode) for mode in NAMES]
        expected, *others = [steps(case, from_config(case.model, options)) for case in cases]
        for found in others:
            assert oracles.relative_error(found, expected) < 1e-9


@pytest.mark.parametrize("name", ["middle", "early"])
@pytest.mark.parametrize("option", [{"adaptive_damping": AdaptiveDamping(interval=1)}, {"rescale": "length"}], ids=str)
def test_a_quadratic_model_sees_through_no_reentrant_checkpoint(name: str, option: dict[str, Any]) -> None:
    options = {"method": "kfac", **option}
    plain, saved, case = (MAKE[name](mode) for mode in NAMES)
    expected = steps(plain, from_config(plain.model, options))
    assert oracles.relative_error(steps(saved, from_config(saved.model, options)), expected) < 1e-9
    with pytest.raises(RuntimeError, match=SENTENCE):
        steps(case, from_config(case.model, options))


@pytest.mark.parametrize("name", ["middle", "early"])
@pytest.mark.parametrize("method", ["kfac", "layer_ng", "smw_ng"])
def test_verify_raises_no_false_alarm(method: str, name: str) -> None:
    case = MAKE[name](True)
    maker: Any = from_config(case.model, {"method": method})
    maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
    found = maker.verify()
    assert found.passed, str(found)
    assert all(p.grad is None for p in case.model.parameters())
