"""Tolerances: right models raise no alarm in any precision, wrong ones do."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import nn

from gradmaker.errors import SelfCheckError
from tests.models import ZOO, Case
from tests.self_checks import test_examples, test_loss, test_uses
from tests.self_checks.planted import Planted, maker_of, step

PRECISIONS = ["float32", "bfloat16", "autocast"]
RIGHT = {
    **{f"uses: {name}": make for name, make in test_uses.RIGHT.items()},
    **{f"examples: {name}": make for name, make in test_examples.LAYOUTS.items()},
}
SMALL = ("functional 1e-4", "penalty in the output")  # less than half precision leaves to see
WRONG: dict[str, Planted] = {
    **{f"uses: {name}": planted for name, planted in test_uses.PLANTED.items() if name not in SMALL},
    **{f"examples: {name}": planted for name, planted in test_examples.PLANTED.items() if name != "neighbour"},
    **{f"loss: {name}": test_loss.PLANTED[name] for name in ("term", "focal", "exponential", "squared", "unnormalised")},
}


def cast(case: Case, precision: str) -> tuple[Case, AbstractContextManager[object]]:
    """In bfloat16 the loss is in float32, as everywhere."""
    if precision == "float32":
        return case._replace(
            model=case.model.float(), x=case.x.float() if case.x.is_floating_point() else case.x
        ), nullcontext()
    if precision == "autocast":
        case = case._replace(model=case.model.float(), x=case.x.float() if case.x.is_floating_point() else case.x)
        return case, torch.autocast("cpu", torch.bfloat16)
    x = case.x.bfloat16() if case.x.is_floating_point() else case.x
    loss = case.loss
    return case._replace(model=case.model.bfloat16(), x=x, loss=lambda z, t: loss(z.float(), t)), nullcontext()


def raises_no_alarm(case: Case, precision: str, draws: int) -> None:
    case, context = cast(case, precision)
    maker = maker_of(case, "layer", self_check="error")
    with context:
        for seed in range(draws):
            maker.checks.arrangement.checked.clear()
            maker.checks.seed = seed
            step(maker, case)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", RIGHT)
def test_right_models_raise_no_alarm(name: str, precision: str) -> None:
    raises_no_alarm(RIGHT[name](), precision, 3)


MODELS = [name for name in ZOO if not name.startswith("structured")]  # whose outputs are not one tensor, to be cast


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", [pytest.param(m, marks=[] if j % 4 == 0 else pytest.mark.slow) for j, m in enumerate(MODELS)])
def test_layers_of_all_kinds_raise_no_alarm(name: str, precision: str) -> None:
    raises_no_alarm(ZOO[name](), precision, 2)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_models_are_found(name: str, precision: str) -> None:
    case, context = cast(WRONG[name].make(), precision)
    maker = maker_of(case, "layer", self_check="error")
    with context, pytest.raises(SelfCheckError):
        step(maker, case)


def test_a_deep_network_raises_no_alarm_in_float32() -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(20) for m in (nn.Linear(32, 32), nn.ReLU())]
    case = Case(nn.Sequential(*layers), torch.randn(128, 32), torch.arange(128) % 32, nn.functional.cross_entropy)
    step(maker_of(case, "layer", self_check="error"), case)
