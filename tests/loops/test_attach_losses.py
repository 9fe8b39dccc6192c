"""Attached: losses that the model calls itself, with the weights that they have in the loop's loss, and scalers of losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradmaker as gm
from gradmaker.curvature import FisherEmp, FisherExact
from gradmaker.loops.attachment import ChangedGradientWarning
from tests.loops.test_attach import CONFIGS, batches, maker_of
from tests.models import mlp


# --- losses that the model calls itself -----------------------------------------------------------------------------------
class WithLoss(nn.Module):
    """Returns its loss and a copy of its logits."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.body, self.head, self.options = nn.Linear(4, 5), nn.Linear(5, 3), options

    def forward(self, x: Tensor, t: Tensor) -> dict[str, Tensor]:
        z = self.head(self.body(x).tanh())
        return {"loss": F.cross_entropy(z, t, **self.options), "logits": z.float().clone()}


WEIGHTS = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "weights": {"weight": WEIGHTS},
    "smoothing": {"label_smoothing": 0.2},
    "ignored": {"ignore_index": 1},
    "sum": {"reduction": "sum"},
}


@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("method", ["kfac_exact", "kfac_emp", "kfac_mc", "kfac_tokens", "unit_ng"])
def test_a_loss_inside_is_measured_with_its_weights(method: str, options: str, factor: float) -> None:
    results = []
    for ride in (True, False):
        torch.manual_seed(0)
        model, case = WithLoss(**OPTIONS[options]).double(), mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.02)
        maker = maker_of(model, CONFIGS[method]())
        if ride:
            maker.attach(optimizer, "categorical")
        for x, t in batches(case, 3):
            optimizer.zero_grad()
            if ride:
                (factor * model(x, t)["loss"]).backward()
            else:
                loss = maker.setup_model_call(model, x, t)["loss"]
                maker.setup_loss_call(lambda value: factor * value, loss)
                maker.forward_and_backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["kfac_exact", "kfac_mc", "unit_ng"])
def test_a_loss_may_be_scaled_in_place(method: str) -> None:
    """As loops of several processes do: by ``loss *= processes``."""

    def scaled(loss: Tensor) -> Tensor:
        loss *= 0.25
        return loss

    results = []
    for way in ("apart", "in place", "attached"):
        torch.manual_seed(0)
        model, case = WithLoss().double(), mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.02)
        maker = maker_of(model, CONFIGS[method]())
        if way == "attached":
            maker.attach(optimizer, "categorical")
        for x, t in batches(case, 3):
            optimizer.zero_grad()
            if way == "attached":
                scaled(model(x, t)["loss"]).backward()
            else:
                loss = maker.setup_model_call(model, x, t)["loss"]
                maker.setup_loss_call(scaled if way == "in place" else lambda value: 0.25 * value, loss)
                maker.forward_and_backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-10, atol=1e-12)


class TwoLosses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor, t: Tensor) -> dict[str, Tensor]:
        h = self.body(x).tanh()
        z = self.one(h)
        first, second = F.cross_entropy(z, t), F.cross_entropy(self.two(h), t)
        return {"loss": first, "both": first + second, "second": second, "logits": z}


@pytest.mark.parametrize("curvature", [FisherExact(), FisherEmp()], ids=["exact", "emp"])
def test_more_losses_than_one_are_refused_and_one_of_several_is_measured(curvature: Any) -> None:
    model, case = TwoLosses().double(), mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    maker = gm.KfacGradientMaker(model, gm.KfacGradientConfig(fisher=curvature)).attach(optimizer, "categorical")
    losses: list[Callable[[Any], Tensor]] = [
        lambda y: y["both"],
        lambda y: y["loss"] + 0.1 * F.cross_entropy(y["logits"] / 2, case.t),
        lambda y: y["second"] + F.cross_entropy(y["logits"], case.t),
    ]
    for loss in losses:
        with pytest.raises(RuntimeError, match="several losses that were called inside of the model"):
            loss(model(case.x, case.t)).backward()
        optimizer.zero_grad()
    for key in ("loss", "second", "logits"):
        y = model(case.x, case.t)
        (F.cross_entropy(y[key], case.t) if key == "logits" else y[key]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert maker.step == 3 and not maker.silent()


def test_a_scaler_that_was_not_told_of() -> None:
    model, case = WithLoss().double(), mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    scaler = torch.amp.GradScaler("cpu")
    maker = gm.KfacGradientMaker(model).attach(optimizer, "categorical")
    with pytest.raises(RuntimeError, match=r"with the factor 65536, as from a GradScaler: give attach scaler="):
        scaler.scale(model(case.x, case.t)["loss"]).backward()
    maker.remove()
    optimizer.zero_grad()
    maker.attach(optimizer, "categorical", scaler=scaler)
    scaler.scale(model(case.x, case.t)["loss"]).backward()
    scaler.step(optimizer)
    assert maker.step == 1


def test_what_a_scaler_does_is_expected() -> None:
    case = mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), 0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    maker = maker_of(case.model, CONFIGS["kfac_emp"]()).attach(optimizer, "categorical", scaler=scaler)
    for clipped in (False, True):
        optimizer.zero_grad()
        scaler.scale(case.run()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(case.model.parameters(), float("inf"))
        if clipped:
            nn.utils.clip_grad_norm_(case.model.parameters(), 0.1)
            with pytest.warns(ChangedGradientWarning, match="as by clipping"):
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)
        scaler.update()
    assert maker.step == 2
