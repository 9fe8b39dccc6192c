"""Riding a loop that is not ours: the loop stays as it is, and the trajectory is that of the declared calls."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradmaker as gm
from gradmaker.curvature import Categorical, FisherEmp, FisherExact, FisherMC
from tests.models import Case, Tagger, checkpointed, convolution, mlp, mlp_bernoulli, mlp_gaussian, normed, structured, tagger

SPARSE: dict[str, Any] = {"curvature_interval": 3, "preconditioner_interval": 2, "warmup_steps": 2}
CONFIGS: dict[str, Callable[[], Any]] = {
    "adam": gm.AdamGradientConfig,
    "shampoo": gm.ShampooGradientConfig,
    "kfac_exact": lambda: gm.KfacGradientConfig(fisher=FisherExact(), **SPARSE),
    "kfac_emp": lambda: gm.KfacGradientConfig(fisher=FisherEmp(), damping=0.1, **SPARSE),
    "kfac_tokens": lambda: gm.KfacGradientConfig(fisher=FisherEmp(examples="token"), damping=0.1, **SPARSE),
    "kfac_mc": lambda: gm.KfacGradientConfig(fisher=FisherMC(samples=2), **SPARSE),
    "unit_ng": lambda: gm.UnitNaturalGradientConfig(fisher=FisherExact(), beta1=0.9, **SPARSE),
    "full_ng": lambda: gm.FullNaturalGradientConfig(fisher=FisherExact(), decay=None),
}
STEPS = 7


def maker_of(model: nn.Module, config: Any) -> Any:
    return next(make for make in gm.METHODS.values() if make.Config is type(config))(model, config)


def batches(case: Case, steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """A different batch for each step."""
    if not case.x.is_floating_point():
        return [(case.x.roll(j, 1), case.t.roll(j, -1)) for j in range(steps)]
    return [(case.x * (1 + 0.1 * j) + 0.05 * j, case.t.roll(j, 0)) for j in range(steps)]


def declared(case: Case, config: Any, accumulation: int = 1) -> list[Tensor]:
    """Parameters after the steps of a loop by the declared calls."""
    maker = maker_of(case.model, config)
    optimizer = torch.optim.SGD(case.model.parameters(), 0.02, momentum=0.5)
    for x, t in batches(case):
        optimizer.zero_grad()
        for xs, ts in zip(x.chunk(accumulation), t.chunk(accumulation), strict=True):
            maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, xs), ts)
            maker.accumulate(1 / accumulation)
        maker.precondition()
        optimizer.step()
    return [p.detach().clone() for p in case.model.parameters()]


def ridden(
    case: Case, config: Any, likelihood: Any = "categorical", accumulation: int = 1, between: Any = None, disturb: Any = None
) -> list[Tensor]:
    """The same by an ordinary loop.  between, disturb: what happens after backward, and between forward and backward"""
    optimizer = torch.optim.SGD(case.model.parameters(), 0.02, momentum=0.5)
    maker = maker_of(case.model, config)
    assert maker.attach(optimizer, likelihood, accumulation) is maker
    for x, t in batches(case):
        optimizer.zero_grad()
        for xs, ts in zip(x.chunk(accumulation), t.chunk(accumulation), strict=True):
            loss = case.loss(case.model(xs), ts) / accumulation
            if disturb:
                disturb(case, xs)
            loss.backward()
            if between:
                between(case, xs)
        optimizer.step()
    assert maker.step == STEPS and maker.skipped == 0
    return [p.detach().clone() for p in case.model.parameters()]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


# --- the same trajectory --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_trajectory_is_that_of_the_declared_calls(name: str, accumulation: int) -> None:
    case = mlp()
    start = [p.detach().clone() for p in case.model.parameters()]
    found = ridden(mlp(), CONFIGS[name](), accumulation=accumulation)
    close(found, declared(case, CONFIGS[name](), accumulation))
    assert not torch.allclose(found[0], start[0], atol=1e-4)


MODELS: dict[str, tuple[Callable[[], Case], Any]] = {
    "gaussian": (mlp_gaussian, "gaussian"),
    "bernoulli": (mlp_bernoulli, "bernoulli"),
    "last layout": (lambda: tagger("last"), "categorical"),
    "torch layout": (tagger, Categorical(axis=1)),
    "convolution": (convolution, "categorical"),
    "layer norm": (normed, "categorical"),
    "tuple": (lambda: structured("tuple"), "categorical"),
    "dict": (lambda: structured("dict"), "categorical"),
    "dataclass": (lambda: structured("dataclass"), "categorical"),
    "checkpoint": (lambda: checkpointed(False), "categorical"),
    "reentrant checkpoint": (lambda: checkpointed(True), "categorical"),
    "bare linear": (
        lambda: mlp()._replace(model=mlp().model.get_submodule("0"), loss=lambda y, t: F.cross_entropy(y, t)),
        "categorical",
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["kfac_exact", "kfac_emp", "kfac_mc"])
def test_outputs_of_any_form(method: str, name: str) -> None:
    make, likelihood = MODELS[name]
    close(ridden(make(), CONFIGS[method](), likelihood), declared(make(), CONFIGS[method]()))


@pytest.mark.parametrize("method", ["kfac_exact", "kfac_emp", "kfac_tokens", "kfac_mc"])
def test_token_models_with_a_flat_loss_and_ignored_tokens(method: str) -> None:
    """Output (N, T, C), ``F.cross_entropy(y.view(-1, C), t.view(-1), ignore_index=-100)``, the loss of language models."""

    def loss(y: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(y.reshape(-1, 3), t.reshape(-1))

    results = []
    for run in (ridden, declared):
        case = tagger("last")._replace(loss=loss)
        case.t[:, 2] = -100
        assert isinstance(case.model, Tagger)
        results.append(run(case, CONFIGS[method]()))  # type: ignore[operator]
    close(*results)


def test_a_loss_inside_the_model() -> None:
    results = []
    for ride in (True, False):
        case = structured("dataclass")
        maker = maker_of(case.model, CONFIGS["kfac_exact"]())
        optimizer = torch.optim.SGD(case.model.parameters(), 0.05)
        if ride:
            maker.attach(optimizer, "categorical")
        for x, t in batches(case):
            optimizer.zero_grad()
            if ride:
                case.model(x, labels=t).loss.backward()
            else:
                maker.setup_loss_repr(maker.setup_model_call(case.model, x, labels=t).loss)
                maker.forward_and_backward()
            optimizer.step()
        results.append([p.detach().clone() for p in case.model.parameters()])
    close(*results)


# --- what else loops do ---------------------------------------------------------------------------------------------------
def evaluate(case: Case, x: Tensor) -> None:
    case.model.eval()
    with torch.no_grad():
        case.model(x[:1])
    case.model.train()


def glance(case: Case, x: Tensor) -> None:
    """A forward pass with gradients that nobody asks for."""
    case.model(x + 1)


@pytest.mark.parametrize("method", ["adam", "kfac_exact", "kfac_emp", "kfac_mc"])
@pytest.mark.parametrize("act", [evaluate, glance])
def test_other_forward_passes_do_no_harm(act: Callable[..., None], method: str) -> None:
    close(ridden(mlp(), CONFIGS[method](), between=act), declared(mlp(), CONFIGS[method]()))


@pytest.mark.parametrize("method", ["kfac_exact", "kfac_emp"])
def test_an_evaluation_between_forward_and_backward_does_no_harm(method: str) -> None:
    close(ridden(mlp(), CONFIGS[method](), disturb=evaluate), declared(mlp(), CONFIGS[method]()))


def test_two_forward_passes_before_a_backward_are_an_error() -> None:
    case = mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), 0.1)
    maker = gm.KfacGradientMaker(case.model).attach(optimizer, "categorical")
    with pytest.raises(RuntimeError, match="called again before this pass was differentiated"):
        (case.run() + case.run()).backward()
    maker.remove()
    (case.run() + case.run()).backward()


def test_passes_without_a_backward_leave_no_graph() -> None:
    case = mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), 0.1)
    maker = gm.KfacGradientMaker(case.model).attach(optimizer, "categorical")
    counts = []
    for _ in range(6):
        case.model(case.x)
        gc.collect()
        counts.append(sum(type(o) in (Tensor, nn.Parameter) for o in gc.get_objects()))
    assert counts[-1] == counts[1] and maker.step == 0


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("keyword", [False, True])
def test_a_closure_is_preconditioned_when_it_has_run(optimizer: Any, keyword: bool) -> None:
    """As Lightning's automatic optimisation calls its optimizers."""
    results = []
    for way in ("loop", "closure"):
        case = mlp()
        chosen = optimizer(case.model.parameters(), lr=0.05)
        maker = maker_of(case.model, CONFIGS["kfac_exact"]()).attach(chosen, "categorical")
        losses = []
        for x, t in batches(case):

            def closure(x: Tensor = x, t: Tensor = t, chosen: Any = chosen, case: Case = case) -> Tensor:
                chosen.zero_grad()
                loss = case.loss(case.model(x), t)
                loss.backward()
                return loss

            if way == "loop":
                losses.append(closure())
                chosen.step()
            else:
                losses.append(chosen.step(closure=closure) if keyword else chosen.step(closure))
        assert maker.step == STEPS
        results.append([torch.stack([v.detach() for v in losses]), *(p.detach() for p in case.model.parameters())])
    close(*results)


def test_lbfgs_is_refused() -> None:
    case = mlp()
    with pytest.raises(ValueError, match="LBFGS models the curvature"):
        gm.AdamGradientMaker(case.model).attach(torch.optim.LBFGS(case.model.parameters()))


def test_learning_rate_schedulers_and_clipping_see_an_ordinary_optimizer() -> None:
    """Clipping after backward clips what is preconditioned; the scheduler counts the optimizer's steps."""
    results = []
    for ride in (True, False):
        case = mlp()
        optimizer = torch.optim.SGD(case.model.parameters(), 0.1)
        maker = maker_of(case.model, CONFIGS["shampoo"]())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        if ride:
            maker.attach(optimizer)
        for x, t in batches(case):
            optimizer.zero_grad()
            if ride:
                case.loss(case.model(x), t).backward()
            else:
                maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, x), t)
                maker.forward_and_backward()
            optimizer.step()
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
        results.append([p.detach().clone() for p in case.model.parameters()])
    close(*results)


@pytest.mark.parametrize("method", ["adam", "shampoo", "kfac_exact", "kfac_mc"])
def test_loss_scaling_does_not_change_the_step(method: str) -> None:
    """`GradScaler` takes its scale out of ``.grad`` before ``optimizer.step``, and the Fisher never saw it."""
    results = []
    for scale in (None, 2.0**8, 2.0**16):
        case = mlp()
        optimizer = torch.optim.SGD(case.model.parameters(), 0.02)
        maker = maker_of(case.model, CONFIGS[method]()).attach(optimizer, "categorical")
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None, growth_interval=1000)
        for x, t in batches(case):
            optimizer.zero_grad()
            scaler.scale(case.loss(case.model(x), t)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert maker.step == STEPS
        results.append([p.detach().clone() for p in case.model.parameters()])
    for found in results[1:]:
        close(found, results[0])


@pytest.mark.parametrize("name", ["kfac_emp", "kfac_tokens"])
def test_captured_gradients_are_unscaled_by_the_scaler(name: str) -> None:
    results = []
    for scale in (None, 2.0**8, 2.0**16):
        case = tagger() if name == "kfac_tokens" else mlp()
        optimizer = torch.optim.SGD(case.model.parameters(), 0.02)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None, growth_interval=1000)
        maker = maker_of(case.model, CONFIGS[name]()).attach(optimizer, Categorical(axis=1), scaler=scaler)
        for x, t in batches(case):
            optimizer.zero_grad()
            scaler.scale(case.loss(case.model(x), t)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert maker.step == STEPS
        results.append([p.detach().clone() for p in case.model.parameters()])
    for found in results[1:]:
        close(found, results[0])


def test_a_step_that_the_scaler_leaves_out_spoils_no_later_one() -> None:
    case = mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), 0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    maker = maker_of(case.model, CONFIGS["kfac_exact"]()).attach(optimizer, "categorical", scaler=scaler)
    for bad in (False, True, False, False):
        optimizer.zero_grad()
        loss = case.loss(case.model(case.x), case.t)
        scaler.scale(loss * float("inf") if bad else loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert (maker.step, maker.skipped) == (3, 0)
    assert not maker.silent()


def test_two_attached_makers_on_two_optimizers() -> None:
    first, second = mlp(), normed()
    results = []
    for together in (True, False):
        cases = [copy.deepcopy(first.model), copy.deepcopy(second.model)]
        optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in cases]
        makers = [maker_of(m, CONFIGS["kfac_exact"]()).attach(o, "categorical") for m, o in zip(cases, optimizers, strict=True)]
        for group in ([0, 1],) if together else ([0], [1]):
            for _ in range(3):
                for j in group:
                    optimizers[j].zero_grad()
                losses = [F.cross_entropy(cases[j]((first, second)[j].x), (first, second)[j].t) for j in group]
                for loss in losses:
                    loss.backward()
                for j in group:
                    optimizers[j].step()
        assert [m.step for m in makers] == [3, 3]
        results.append([p.detach() for m in cases for p in m.parameters()])
    close(*results)


# --- bad input ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", ["input", "loss"])
@pytest.mark.parametrize("method", ["adam", "shampoo", "kfac_exact", "kfac_emp"])
def test_what_is_not_finite_enters_no_statistic(method: str, bad: str) -> None:
    case = mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), 0.0)
    config = CONFIGS[method]()
    maker = maker_of(case.model, config).attach(optimizer, "categorical")
    for index in range(6):
        optimizer.zero_grad()
        before = maker.state_dict()["sites"]
        spoiled = index in (1, 4)  # on a step that measures, and for K-FAC on one that does not
        x = case.x * float("nan") if spoiled and bad == "input" else case.x
        loss = case.loss(case.model(x), case.t)
        (loss * float("inf") if spoiled and bad == "loss" else loss).backward()
        optimizer.step()
        with torch.no_grad():
            for p in case.model.parameters():
                p.nan_to_num_()
        for name, parts in maker.state_dict()["sites"].items():
            for part in ("state", "cache", "average", "grafting_state"):
                for key, value in parts[part].items():
                    assert value.isfinite().all()
                    if spoiled:
                        assert torch.equal(value, before[name][part][key])


@pytest.mark.parametrize(
    ("act", "error", "text"),
    [
        (lambda m, o: m.attach(o, "categoric"), ValueError, r"likelihood='categoric': expected .*; did you mean 'categorical'"),
        (lambda m, o: m.attach(o, "categorical", 0), ValueError, r"accumulation=0: expected an integer of at least 1"),
        (lambda m, o: m.attach(o, "categorical", 1.5), ValueError, r"accumulation=1.5"),
        (lambda m, o: m.attach(o, "categorical", True), ValueError, r"accumulation=True"),
    ],
)
def test_wrong_attachments_are_refused_and_leave_no_hook(act: Callable[..., Any], error: Any, text: str) -> None:
    case = mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), 0.1)
    maker = gm.KfacGradientMaker(case.model)
    with pytest.raises(error, match=text):
        act(maker, optimizer)
    assert not case.model._forward_hooks and not case.model._forward_pre_hooks and not optimizer._optimizer_step_pre_hooks


def test_the_likelihood_of_the_config_serves() -> None:
    case = mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), 0.1)
    maker = gm.KfacGradientMaker(case.model, gm.KfacGradientConfig(likelihood=Categorical())).attach(optimizer)
    case.run().backward()
    optimizer.step()
    assert maker.step == 1 and maker.silent() == []


def test_an_output_without_logits_is_an_error() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(scores=self.layer(x))

    model = Odd()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    maker = gm.KfacGradientMaker(model).attach(optimizer, "categorical")
    with pytest.raises(ValueError, match="no logits in the model's output, SimpleNamespace"):
        model(torch.randn(2, 4))
    with torch.no_grad():
        model(torch.randn(2, 4))
    maker.remove()
    model(torch.randn(2, 4))
