"""Predicted costs of a step: for every method, before the first step, from its own code on tensors without data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gradmaker import METHODS, CostError, CostlyMethodWarning, PreconditionedGradientMaker, cost, from_config
from gradmaker.costs import prediction
from gradmaker.costs.counting import Key, Recorder, Work
from gradmaker.costs.flops import OWN
from gradmaker.costs.prediction import cost_of_gradient, warn_if_costly
from gradmaker.costs.rates import Rates
from gradmaker.costs.trial import build_like, run, trying

NAMES = [name for name in METHODS if name not in ("gradient", "custom")]
FEWER: dict[str, dict[str, Any]] = {"hessian_free": {"iterations": 5}, "lissa": {"terms": 5}}
"""Fewer iterations, whose number does not matter here."""


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 6), torch.randint(3, (8,))


def step(maker: Any, x: Tensor, t: Tensor) -> None:
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(maker.model, x), t)
    maker.forward_and_backward()


@pytest.fixture(autouse=True)
def fixed_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that are not measured: a nanosecond for each FLOP and each byte, a microsecond for each call."""
    monkeypatch.setattr(prediction, "rates", Rates)
    monkeypatch.setattr(Rates, "_time", lambda self, key: 1e-6 if key.kind in ("call", "view") else 1e-9)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """The model, its gradients, its hooks and torch's generator are as they were."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random, hooks = torch.get_rng_state(), [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    yield
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


# ------------------------------------------------------------------ every method
@pytest.mark.parametrize("name", NAMES)
def test_every_method_is_predicted(name: str) -> None:
    """Before the first step: seconds are positive, and the bytes are those that a step then holds."""
    model, (x, t) = net(), batch()
    maker = from_config(model, {"method": name, **FEWER.get(name, {})})
    assert isinstance(maker, PreconditionedGradientMaker)
    with unchanged(model):
        found = cost(maker, x)
    assert 0 < found.idle < found.seconds * 1.001 and found.peak > 0 and found.flops > 0
    assert maker.step == 0 and not any(block.cache for block in maker.plan.blocks)
    assert str(found).startswith(f"{found.seconds * 1e3:.3g} ms a step, {found.held:,} bytes held")
    for _ in range(2):
        step(maker, x, t)
    for block in maker.plan.blocks:  # a step by one operator holds no cache, and is predicted as formed
        block.held = block.explicit(block.held)
    held = sum(block.bytes for block in maker.plan.blocks)
    assert found.held == held or any(block.late for block in maker.plan.blocks)  # windows, which fill over some steps
    assert found.held >= held


def test_the_plain_gradient_is_predicted_too() -> None:
    model, (x, _) = net(), batch()
    with unchanged(model):
        plain, adam = cost(METHODS["gradient"](model), x), cost_of_gradient(model, x, optimizer=torch.optim.Adam)
    assert plain.held == 0 and plain.seconds == plain.idle and not plain.parts
    assert plain.flops == adam.flops == 2 * 8 * (6 * 5 * 2 + 5 * 3 * 3)  # the first layer has no gradient of its inputs
    assert adam.seconds > plain.seconds


def test_flops_of_kinds_of_steps_are_those_that_are_counted() -> None:
    """K-FAC on real tensors, counted by torch's counter: idle, measuring and refreshing steps."""
    model, (x, t) = net(), batch()
    maker = from_config(model, {"method": "kfac", "self_check": "off"})
    assert isinstance(maker, PreconditionedGradientMaker)
    with trying(model, build_like(maker), x) as (loop, recorder):
        steps = run(replace(loop), recorder)
    step(maker, x, t)
    for measures, refreshes, work in ((False, False, steps.idle), (True, True, steps.refreshed["method"])):
        now, own = maker.step_state.now, ["method"]
        clocks = now.clocks.forced(now.index, own if measures else (), own if refreshes else ())
        maker.step_state.load(replace(now, clocks=clocks))
        with FlopCounterMode(display=False, custom_mapping=OWN) as counter:
            step(maker, x, t)
        assert work.total_flops == pytest.approx(counter.get_total_flops(), rel=0.02)


# ------------------------------------------------------------------ clocks
def test_costs_fall_with_the_intervals() -> None:
    model, (x, _) = net(), batch()
    pairs = ((1, 1), (1, 10), (10, 100))
    options = [{"curvature_interval": c, "preconditioner_interval": p} for c, p in pairs]
    found = [cost(from_config(model, {"method": "kfac", **each}), x) for each in options]  # type: ignore[arg-type]
    seconds = [each.seconds for each in found]
    assert seconds == sorted(seconds, reverse=True) and len(set(seconds)) == len(seconds)
    part = found[2].parts["method"]
    assert seconds[1] == pytest.approx(found[0].at(10), rel=0.01)  # where refreshes are rare, they fold the evidence apart
    wanted = found[2].idle + (part.measured - found[2].idle) / 10 + (part.refreshed - part.measured) / 100
    assert seconds[2] == pytest.approx(wanted)


def test_a_fallback_has_its_own_clocks() -> None:
    maker = from_config(
        nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)),
        {"method": "kbfgs", "fallback": "adam", "curvature_interval": 10},
    )
    found = cost(maker, batch()[0])  # type: ignore[arg-type]
    assert {name: part.curvature_interval for name, part in found.parts.items()} == {"method": 10, "fallback": 1}


def test_soap_renews_its_basis_at_every_tenth_step() -> None:
    """And at the first: its default interval is 10, without a warm-up or a stagger."""
    model, (x, t) = net(), batch()
    maker = METHODS["soap"](model)
    assert isinstance(maker, PreconditionedGradientMaker)
    block, turned = max(maker.plan.blocks, key=lambda b: b.cost), []
    for index in range(22):
        before = {k: v.clone() for k, v in block.cache.items() if k.startswith("basis")}
        step(maker, x, t)
        after = {k: v for k, v in block.cache.items() if k.startswith("basis")}
        if not before or any(not torch.equal(v, before[k]) for k, v in after.items()):
            turned.append(index)
    assert turned == [0, 10, 20]
    part = cost(maker, x).parts["method"]
    assert (part.curvature_interval, part.preconditioner_interval) == (1, 10)


# ------------------------------------------------------------------ inputs
def test_batches_and_losses() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 3)

        def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"z": self.inner(x) * scale}

    model, (x, _) = Named(), batch()
    maker, scale = METHODS["adam"](model), torch.ones(())
    assert cost(maker, {"x": x, "scale": scale}).flops == cost(maker, (x, scale)).flops  # type: ignore[arg-type]
    assert cost(maker, (x, scale), loss=lambda out: out["z"].square().mean()).seconds > 0  # type: ignore[arg-type]
    larger = cost(maker, (torch.randn(800, 6), scale))  # type: ignore[arg-type]
    assert larger.flops == 100 * cost(maker, (x, scale)).flops  # type: ignore[arg-type]


def test_what_cannot_be_tried_says_why() -> None:
    class Reads(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.from_numpy(x.detach().numpy()))

    with pytest.raises(CostError, match="steps on tensors without data failed: RuntimeError: "):
        cost(METHODS["adam"](Reads(6, 3)), batch()[0])  # type: ignore[arg-type]


def test_ignored_modules_and_hooks() -> None:
    """A rule that is a module names that of the copy; an attached maker is not copied, and its hooks stay silent."""
    model, (x, _) = net(), batch()
    maker = from_config(model, {"method": "kfac", "ignore": [model[2]]})  # type: ignore[index]
    assert isinstance(maker, PreconditionedGradientMaker)
    other = METHODS["kfac"](net()[0])  # type: ignore[index]
    maker.attach(torch.optim.SGD(model.parameters(), lr=0.1), likelihood="categorical")
    with unchanged(model):
        assert cost(maker, x).held == cost(other, x).held  # type: ignore[arg-type]


def test_summary_has_the_cost_of_a_batch() -> None:
    model, (x, t) = net(), batch()
    maker = METHODS["kfac"](model)
    assert isinstance(maker, PreconditionedGradientMaker)
    found = maker.summary(x)
    assert found.step is not None and f"\npredicted: {found.step}\ntotal" in str(found)
    assert maker.summary().step is None and "predicted" not in str(maker.summary())
    step(maker, x, t)
    assert maker.summary().bytes == found.step.held


# ------------------------------------------------------------------ the warning
@pytest.mark.parametrize(("name", "warned"), [("shampoo", True), ("adam", False)])
def test_costly_defaults_are_warned_of(name: str, warned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "WITHIN", 100.0)
    maker = METHODS[name](nn.Linear(512, 512))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_costly(maker, torch.randn(64, 512))  # type: ignore[arg-type]
    assert bool(caught) == warned
    if warned:
        assert caught[0].category is CostlyMethodWarning
        assert str(caught[0].message).startswith("shampoo at these shapes: about ")
        assert "preconditioner_interval=" in str(caught[0].message)


def test_intervals_that_were_chosen_are_not_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "_cost", lambda *_: pytest.fail("nothing is to be predicted"))
    maker = from_config(nn.Linear(64, 64), {"method": "shampoo", "preconditioner_interval": 2})
    warn_if_costly(maker, torch.randn(4, 64))  # type: ignore[arg-type]
    warn_if_costly(METHODS["gradient"](nn.Linear(4, 4)), torch.randn(4, 4))  # type: ignore[arg-type]


def test_a_trial_that_takes_too_long_is_given_up() -> None:
    warn_if_costly(METHODS["shampoo"](nn.Linear(64, 64)), torch.randn(4, 64), within=0.0)  # type: ignore[arg-type]


# ------------------------------------------------------------------ counting
def test_bytes_that_live_at_the_same_time() -> None:
    x = torch.ones(256, dtype=torch.float32)
    with Recorder() as recorder:
        y = x + 1
        kept = y * 2
        view = kept.view(16, 16)
        del y
        z = kept + 1
        del z, view
    assert (recorder.peak, recorder.live, recorder.kept) == (2048, 1024, 1024)


def test_views_and_host_reads_are_calls_alone() -> None:
    x = torch.ones(4, 4)
    with Recorder() as recorder:
        x.mT.reshape(4, 4).unsqueeze(0)
        assert bool(torch.zeros((), dtype=torch.bool)) and float(torch.zeros(())) == 1.0 and not torch.equal(x, x)
    assert recorder.work.total_flops == 0


FORMULAS: list[tuple[Callable[[Tensor], object], float]] = [
    (lambda A: A @ A, 2 * 8**3),
    (lambda A: torch.linalg.eigh(A), 9 * 8**3),
    (lambda A: torch.linalg.qr(A[:, :4]), 4 * 4**2 * (8 - 4 / 3)),
    (lambda A: torch.linalg.qr(A[:, :4], mode="r"), 2 * 4**2 * (8 - 4 / 3)),
    (lambda A: torch.linalg.svd(A[:, :4], full_matrices=False), 14 * 8 * 4**2 + 8 * 4**3),
    (lambda A: torch.linalg.cholesky_ex(A), 8**3 / 3),
    (lambda A: torch.linalg.solve_triangular(A, A[:, :4], upper=False), 8**2 * 4),
    (lambda A: torch.linalg.solve_triangular(A, A[:4], upper=False, left=False), 8**2 * 4),
    (lambda A: torch.linalg.solve_triangular(A, A[None, :4].expand(3, 4, 8), upper=False, left=False), 3 * 8**2 * 4),
    (lambda A: A.clone().addmm_(A, A), 2 * 8**3),
    (lambda A: A @ A[0], 2 * 8**2),
]


@pytest.mark.parametrize(("call", "flops"), FORMULAS)
def test_flops_are_the_textbooks(call: Callable[[Tensor], object], flops: float) -> None:
    with Recorder() as recorder:
        call(torch.eye(8))
    assert recorder.work.total_flops == pytest.approx(flops, abs=1)


# ------------------------------------------------------------------ rates
def test_seconds_are_calls_flops_and_bytes() -> None:
    rates, work = Rates(torch.device("cpu")), Work()
    work.add(Key("product", torch.float32, 5), 2, 1000, 400)
    work.add(Key("stream", torch.float32, 12), 1, 0, 500)
    work.add(Key("view", torch.float32, 0), 3, 0, 0)
    calls = 3 * rates.call + 3 * rates.view
    assert rates.seconds(work) == pytest.approx(calls + 1500e-9)


def test_rates_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    rates = Rates(torch.device("cpu"))
    for kind in ("product", "convolution", "convolution_backward", "_linalg_eigh", "linalg_qr", "stream", "random", "fresh"):
        key = Key(kind, torch.float32, 4)
        found = rates._measured(key) if kind == "fresh" else rates.rate(key)
        assert 0 <= found < 1e-3 and (rates._measured(key) if kind == "fresh" else rates.rate(key)) == found
