"""Attached without a likelihood: the terms of the loss and their weights are read from its gradient in the logits."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradmaker as gm
from gradmaker.curvature import FisherEmp, FisherExact, FisherMC
from gradmaker.loops.reader import TRIES
from gradmaker.representations import Diagonal
from gradmaker.solvers import Division
from tests.loops.test_attach import CONFIGS, maker_of
from tests.models import Case, mlp, tagger
from tests.test_state import equal_states

READ = {
    **{name: CONFIGS[name] for name in ("kfac_exact", "kfac_emp", "kfac_tokens", "kfac_mc", "unit_ng", "full_ng")},
    "ekfac": lambda: gm.EkfacGradientConfig(fisher=FisherExact()),
    "smw_ng": lambda: gm.SmwNaturalGradientConfig(),
    "seng": lambda: gm.SengGradientConfig(),
    "diagonal": lambda: gm.CustomGradientConfig(
        curvature=FisherMC(), representation=Diagonal(granularity="layer"), solver=Division()
    ),
}
CLASSES = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
Loss = Callable[[Tensor, Tensor], Tensor]


def per_class(y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(y, t, weight=CLASSES.to(y))


def per_example(y: Tensor, t: Tensor) -> Tensor:
    return (F.cross_entropy(y, t, reduction="none") * torch.linspace(0.5, 1.5, len(t), dtype=y.dtype)).mean()


def log_probabilities(y: Tensor, t: Tensor) -> Tensor:
    return F.nll_loss(y.log_softmax(-1), t)


def binary(y: Tensor, t: Tensor, **options: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(y, F.one_hot(t, 3).to(y), **options)


LOSSES: dict[str, Loss] = {
    "mean": F.cross_entropy,
    "sum": partial(F.cross_entropy, reduction="sum"),
    "ignored": partial(F.cross_entropy, ignore_index=1),
    "class weights": per_class,
    "example weights": per_example,
    "binary": binary,
    "pos_weight": partial(binary, pos_weight=CLASSES),
}


def data(steps: int = 4, n: int = 12, seed: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 4, dtype=torch.float64, generator=generator), torch.randint(3, (n,), generator=generator))
        for _ in range(steps)
    ]


def trained(
    config: Any, loss: Loss, parts: list[int], attached: bool, model: nn.Module | None = None, **options: Any
) -> list[Tensor]:
    """Parameters after some steps, each with micro-batches of these sizes.  attached: else by the declared calls"""
    model = mlp().model if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.5)
    maker = maker_of(model, config)
    if attached:
        maker.attach(optimizer, **options)
    for step, (x, t) in enumerate(data()):
        own = parts if step < 3 else parts[:2]  # a last group that is shorter
        rows = list(zip(x[: sum(own)].split(own), t[: sum(own)].split(own), strict=True))
        optimizer.zero_grad()
        for xs, ts in rows:
            weight = len(ts) / sum(own)
            if attached:
                (weight * loss(model(xs), ts)).backward()
            else:
                maker.setup_loss_call(loss, maker.setup_model_call(model, xs), ts)
                maker.accumulate(weight)
        if not attached:
            maker.precondition()
        optimizer.step()
    assert (maker.step, maker.skipped, maker.unread) == (4, 0, 0) and not maker.silent()
    return [p.detach().clone() for p in model.parameters()]


def close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance / 100)


# --- the same step --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("method", ["kfac_exact", "kfac_emp", "kfac_mc"])
def test_weights_are_read_whatever_the_loss(method: str, loss: str) -> None:
    parts = [5, 4, 3] if loss == "ignored" else [5, 3, 3, 1]  # a mean over nothing is NaN
    close(*(trained(READ[method](), LOSSES[loss], parts, attached) for attached in (True, False)))


@pytest.mark.parametrize("parts", [[12], [5, 3, 3, 1]], ids=["one batch", "accumulated"])
@pytest.mark.parametrize("method", READ)
def test_no_accumulation_has_to_be_declared(method: str, parts: list[int]) -> None:
    close(*(trained(READ[method](), per_class, parts, attached) for attached in (True, False)))


def test_an_accumulation_that_is_given_changes_nothing() -> None:
    found = [trained(READ["kfac_exact"](), F.cross_entropy, [3, 3, 3, 3], True, accumulation=k) for k in (None, 1, 4)]
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_log_probabilities_are_logits() -> None:
    """As of models that end in a log-softmax, before `F.nll_loss`."""
    results = []
    for attached in (True, False):
        model = nn.Sequential(*mlp().model.children(), nn.LogSoftmax(-1))
        results.append(trained(READ["kfac_exact"](), F.nll_loss, [7, 5], attached, model))
    close(*results)


def shifted(y: Tensor, t: Tensor) -> Tensor:
    """The loss of language models: of the next token, by a part of the logits."""
    return F.cross_entropy(y[:, :-1].reshape(-1, 3), t[:, 1:].reshape(-1), reduction="sum")


def padded(y: Tensor, t: Tensor) -> Tensor:
    """The same, by targets that are moved."""
    return F.cross_entropy(y.reshape(-1, 3), F.pad(t, (0, 1), value=-100)[:, 1:].reshape(-1), reduction="sum")


def channels(y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(y, F.pad(t, (0, 1), value=-100)[:, 1:], reduction="sum")


@pytest.mark.parametrize("layout", ["last", "torch"])
@pytest.mark.parametrize("method", ["kfac_exact", "kfac_emp", "kfac_tokens", "kfac_mc"])
def test_tokens_that_are_counted_over_the_step(method: str, layout: str) -> None:
    results = []
    for attached in (True, False):
        case = tagger(layout)
        case.t[0, 2], case.t[1] = -100, -100
        optimizer = torch.optim.SGD(case.model.parameters(), 0.05)
        maker = maker_of(case.model, READ[method]())
        if attached:
            maker.attach(optimizer)
        total = case.t[:, 1:].ne(-100).sum()
        loss, other = (shifted, padded) if layout == "last" else (channels, channels)
        for _ in range(4):
            optimizer.zero_grad()
            for xs, ts in zip(case.x.split([3, 1]), case.t.split([3, 1]), strict=True):
                if attached:
                    (loss(case.model(xs), ts) / total).backward()
                else:
                    y = maker.setup_model_call(case.model, xs)
                    maker.setup_loss_call(lambda y, t, other=other, total=total: other(y, t) / total, y, ts)
                    maker.accumulate()
            if not attached:
                maker.precondition()
            optimizer.step()
        results.append([p.detach() for p in case.model.parameters()])
    close(*results)


@pytest.mark.parametrize("method", ["kfac_exact", "kfac_emp", "kfac_mc"])
def test_a_scaler_is_taken_out(method: str) -> None:
    results = []
    for scale in (None, 2.0**16):
        case = mlp()
        optimizer = torch.optim.SGD(case.model.parameters(), 0.02)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None, growth_interval=1000)
        maker = maker_of(case.model, READ[method]()).attach(optimizer, scaler=scaler)
        for x, t in data():
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(case.model(x), t)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert maker.step == 4
        results.append([p.detach() for p in case.model.parameters()])
    close(*results)


@pytest.mark.parametrize("loss", ["mean", "sum", "class weights", "binary"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_scaler_that_was_not_told_of(dtype: torch.dtype, loss: str) -> None:
    case, (x, t) = mlp(), data(1)[0]
    optimizer = torch.optim.SGD(case.model.to(dtype).parameters(), 0.02)
    maker = gm.KfacGradientMaker(case.model)
    for accumulation in (1, 3):
        maker.remove()
        maker.attach(optimizer, accumulation=accumulation)
        optimizer.zero_grad()
        (65536.0 / accumulation * LOSSES[loss](case.model(x.to(dtype)), t)).backward()
        with pytest.raises(RuntimeError, match=r"the factor 65536, as from a GradScaler: give attach scaler="):
            optimizer.step()


def test_sums_of_many_terms_are_no_scale() -> None:
    case, optimizer, maker = attached()
    x, t = data(1, n=4096)[0]
    F.cross_entropy(case.model(x), t, reduction="sum").backward()
    optimizer.step()
    assert maker.step == 1 and not maker.silent()


@pytest.mark.parametrize("converted", [False, True], ids=["bf16 logits", "converted logits"])
def test_a_bfloat16_loop(converted: bool) -> None:
    """As plain autocast runs it; and as Accelerate does, which returns outputs in float32."""
    results = []
    for likelihood in (None, "categorical"):
        model = mlp().model.float()
        start = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), 0.02)
        maker = maker_of(model, gm.KfacGradientConfig(fisher=FisherExact(), damping=0.1)).attach(optimizer, likelihood)
        forward = model.forward

        def cast(x: Tensor, forward: Any = forward) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                y = forward(x)
            return y.float() if converted else y

        model.forward = cast  # type: ignore[method-assign]
        for x, t in data():
            optimizer.zero_grad()
            F.cross_entropy(model(x.float()).float(), t).backward()
            optimizer.step()
        assert not maker.silent() and maker.unread == 0
        results.append([p.detach() for p in model.parameters()])
    for found, expected, p in zip(*results, start, strict=True):
        assert (found - expected).norm() <= (1e-4 if converted else 1e-2) * (expected - p).norm()


# --- what has to be declared ----------------------------------------------------------------------------------------------
def attached(method: str = "kfac_exact", **options: Any) -> tuple[Case, Any, Any]:
    case = mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), 0.02)
    return case, optimizer, maker_of(case.model, READ[method]()).attach(optimizer, **options)


def soft(y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(y, (y.detach() * 0.7 + F.one_hot(t, 3)).softmax(-1))


def mixed(y: Tensor, t: Tensor) -> Tensor:
    return 0.7 * F.cross_entropy(y, t) + 0.3 * F.cross_entropy(y, t.roll(1))


def squared(y: Tensor, t: Tensor) -> Tensor:
    return F.mse_loss(y, F.one_hot(t, 3).to(y))


def with_z_loss(y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(y, t) + 1e-2 * y.logsumexp(-1).square().mean()


def focal(y: Tensor, t: Tensor) -> Tensor:
    each = F.cross_entropy(y, t, reduction="none")
    return ((1 - (-each).exp()).square() * each).mean()


WRONG: dict[str, Loss] = {
    "smoothing": partial(F.cross_entropy, label_smoothing=0.1),
    "soft labels": soft,
    "mixed labels": mixed,
    "temperature": lambda y, t: F.cross_entropy(y / 1.5, t),
    "squared errors": squared,
    "z-loss": with_z_loss,
    "entropy bonus": lambda y, t: F.cross_entropy(y, t) - 0.01 * torch.special.entr(y.softmax(-1)).sum(-1).mean(),
    "soft binary labels": lambda y, t: F.binary_cross_entropy_with_logits(y, 0.1 + 0.8 * F.one_hot(t, 3).to(y)),
    "margin": F.multi_margin_loss,
}


@pytest.mark.parametrize("loss", WRONG)
def test_other_losses_are_asked_for(loss: str) -> None:
    case, optimizer, maker = attached()
    x, t = data(1)[0]
    before = maker.state_dict()
    text = (
        r"of shape \(12, 3\) is not that of .*\(categorical with the classes on axis -1 misses .* and bernoulli .*give attach"
    )
    WRONG[loss](case.model(x), t).backward()
    gradients = [p.grad.clone() for p in case.model.parameters()]  # type: ignore[union-attr]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=text):
            optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(case.model.parameters(), gradients, strict=True))  # type: ignore[arg-type]
    assert equal_states(maker.state_dict()["sites"], before["sites"])
    maker.remove()
    optimizer.zero_grad()
    maker.attach(optimizer, "categorical")
    WRONG[loss](case.model(x), t).backward()
    optimizer.step()
    assert maker.step == 1


def test_a_focal_loss_is_named() -> None:
    case, optimizer, _ = attached()
    x, t = data(1, n=64)[0]
    focal(case.model(x), t).backward()
    with pytest.raises(RuntimeError, match=r"as in a focal loss .* give attach likelihood="):
        optimizer.step()


def test_a_loss_that_changes_is_read_or_refused() -> None:
    case, (x, t) = mlp(), data(1)[0]
    optimizer = torch.optim.SGD(case.model.parameters(), 0.02)
    maker = gm.KfacGradientMaker(case.model, gm.KfacGradientConfig(curvature_interval=1)).attach(optimizer)
    for loss in (F.cross_entropy, binary):
        optimizer.zero_grad()
        loss(case.model(x), t).backward()
        optimizer.step()
    optimizer.zero_grad()
    mixed(case.model(x), t).backward()
    with pytest.raises(RuntimeError, match="It was one in an earlier pass"):
        optimizer.step()
    assert maker.step == 2
    maker.remove()
    assert maker.state_dict()["likelihood"] == ""  # another loop may have another loss


@pytest.mark.parametrize("method", ["kfac_exact", "kfac_emp"])
def test_losses_of_passes_that_are_no_part_of_a_step_may_be_any(method: str) -> None:
    """An attack, a saliency map, the loss of another network: what they write is zeroed."""
    results = []
    for disturbed in (True, False):
        case, optimizer, maker = attached(method)
        for x, t in data():
            if disturbed:
                squared(case.model(x), t).backward()
                z = x.clone().requires_grad_()
                torch.autograd.grad(mixed(case.model(z), t), z)
            optimizer.zero_grad()
            F.cross_entropy(case.model(x), t).backward()
            optimizer.step()
        assert (maker.step, maker.unread) == (4, 0)
        results.append([p.detach() for p in case.model.parameters()])
    close(*results)


@pytest.mark.parametrize("method", ["kfac_exact", "kfac_emp"])
def test_equal_logits_prove_nothing_and_are_waited_for(method: str) -> None:
    """A head that begins at zero: smoothed labels would fit as well. Nothing is measured, the step is that of the gradient."""
    case, optimizer, maker = attached(method)
    head = case.model.get_submodule("2")
    for p in head.parameters():
        nn.init.zeros_(p)
    for step, (x, t) in enumerate(data()):
        optimizer.zero_grad()
        F.cross_entropy(case.model(x), t).backward()
        gradient = head.weight.grad.clone()  # type: ignore[union-attr, operator]
        optimizer.step()
        assert torch.equal(gradient, head.weight.grad) == (step == 0)  # type: ignore[arg-type]
        assert (maker.step, maker.unread) == (step + 1, 1)
    assert not maker.silent()


def test_what_stays_open_is_asked_for_in_the_end() -> None:
    """One example of each of two classes: a single number, which any loss has."""
    model = nn.Linear(4, 2, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    maker = gm.KfacGradientMaker(model).attach(optimizer)
    x, t = data(1)[0]
    for _ in range(TRIES):
        F.cross_entropy(model(x[:2]), torch.tensor([0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (maker.unread, maker.step) == (TRIES, TRIES) and maker.silent()
    F.cross_entropy(model(x[:2]), torch.tensor([0, 1])).backward()
    with pytest.raises(RuntimeError, match=r"in 32 passes .* did not show whether .* give attach likelihood="):
        optimizer.step()
    optimizer.zero_grad()
    F.cross_entropy(model(x), t % 2).backward()
    optimizer.step()
    assert not maker.silent()


# --- gradients that have rounded away -------------------------------------------------------------------------------------
class Sharp(nn.Module):
    """Logits that grow with `scale`: the gradient of a fitted example rounds away, to the last digit and then to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 3), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["kfac_exact", "kfac_emp", "kfac_mc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", ["mean", "binary", "two classes"])
def test_a_fitted_model_raises_nothing(loss: str, dtype: torch.dtype, method: str) -> None:
    torch.manual_seed(0)
    model = Sharp().to(dtype)
    if loss == "two classes":
        model.layer = nn.Linear(4, 2, dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    maker = maker_of(model, replace(READ[method](), curvature_interval=1, warmup_steps=0)).attach(optimizer)
    x = torch.randn(64, 4, dtype=dtype)
    with torch.no_grad():
        y = model(x)
        t = (y > 0).float() if loss == "binary" else y.argmax(-1)
    function: Any = F.binary_cross_entropy_with_logits if loss == "binary" else F.cross_entropy
    for scale in (1.0, 4.0, 16.0, 64.0, 256.0, 1e3, 1e4, 1e5):
        model.scale = scale
        for part in (slice(0, 64), slice(0, 3), slice(5, 6)):
            optimizer.zero_grad()
            function(model(x[part]).float(), t[part]).backward()
            optimizer.step()
    assert maker.step == 24 and maker.skipped == 0 and not maker.silent()
    assert 0 < maker.unread < 16


def test_a_batch_of_ignored_terms_is_not_measured() -> None:
    case, optimizer, maker = attached()
    x, t = data(1)[0]
    for ignored in (False, True):
        optimizer.zero_grad()
        before = copy.deepcopy(maker.state_dict()["sites"])
        F.cross_entropy(case.model(x), t * (not ignored) - 100 * ignored, reduction="sum").backward()
        optimizer.step()
        assert equal_states(maker.state_dict()["sites"], before) == ignored
        assert maker.unread == ignored


@pytest.mark.parametrize("method", ["kfac_exact", "kfac_emp"])
def test_what_is_not_finite_is_skipped_and_not_counted(method: str) -> None:
    case, optimizer, maker = attached(method)
    for bad in (True, False):
        optimizer.zero_grad()
        before = copy.deepcopy(maker.state_dict()["sites"])
        (F.cross_entropy(case.model(data(1)[0][0]), data(1)[0][1]) * (float("inf") if bad else 1.0)).backward()
        optimizer.step()
        assert equal_states(maker.state_dict()["sites"], before) == bad
        optimizer.zero_grad()
        with torch.no_grad():
            for p, q in zip(case.model.parameters(), mlp().model.parameters(), strict=True):
                p.copy_(q)
    assert (maker.step, maker.skipped, maker.unread) == (2, 1, 0)


# --- state ----------------------------------------------------------------------------------------------------------------
def test_what_was_proven_is_saved() -> None:
    """A pass that proves nothing by itself, a single example of two classes, goes on as in the run that was not stopped."""
    results = []
    for stopped in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 2, dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        config = gm.KfacGradientConfig(fisher=FisherEmp(), damping=0.1)
        maker = gm.KfacGradientMaker(model, config).attach(optimizer)
        assert maker.state_dict()["likelihood"] == ""
        x, t = data(1)[0]
        for part in (slice(0, 12), slice(0, 1), slice(1, 2)):
            if stopped:
                saved = pickle.loads(pickle.dumps(maker.state_dict()))
                maker.remove()
                maker = gm.KfacGradientMaker(model, config).attach(optimizer)
                maker.load_state_dict(saved)
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), t[part] % 2).backward()
            optimizer.step()
        assert maker.unread == 0 and maker.state_dict()["likelihood"] == "categorical -1"
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- a declared axis ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_classes_declared_on_the_wrong_axis_are_refused(smoothing: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 7)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, t = torch.randint(5, (3, 6)), torch.randint(7, (18,))

    def backward() -> None:
        F.cross_entropy(model(x).flatten(0, 1), t, label_smoothing=smoothing).backward()

    wrong = gm.KfacGradientMaker(model, gm.KfacGradientConfig(likelihood="categorical")).attach(optimizer)
    with pytest.raises(RuntimeError, match=r"declared on axis 1 .* over axis 2 alone: give likelihood=Categorical\(axis=2\)"):
        backward()
        optimizer.step()
    wrong.remove()
    right = gm.KfacGradientMaker(model).attach(optimizer, likelihood="categorical")
    optimizer.zero_grad()
    backward()
    optimizer.step()
    assert not right.silent()
