"""Bad input: the defined result or one clear error, and afterwards everything is bitwise as before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradmaker as gm
from gradmaker.curvature import FisherEmp, FisherExact, FisherMC
from gradmaker.representations import Dense, Diagonal
from gradmaker.solvers import Cholesky
from tests.models import Case, bare_scale, embedding_mean, frozen, linear, mlp, normed, tagger, unused

CONFIGS: dict[str, Callable[[], Any]] = {
    "gradient": gm.PlainGradientConfig,
    "adam": gm.AdamGradientConfig,
    "shampoo": lambda: gm.ShampooGradientConfig(grafting="adam"),
    "kfac": lambda: gm.KfacGradientConfig(warmup_steps=0, curvature_interval=2, beta1=0.9),
    "kfac_emp": lambda: gm.KfacGradientConfig(fisher=FisherEmp(), fallback="adam"),
    "unit_ng": lambda: gm.UnitNaturalGradientConfig(fisher=FisherMC(samples=2)),
    "full_ng": lambda: gm.FullNaturalGradientConfig(fisher=FisherExact()),
}
PRECONDITIONED = [name for name in CONFIGS if name != "gradient"]


def maker_of(model: nn.Module, config: Any) -> Any:
    return next(make for make in gm.METHODS.values() if make.Config is type(config))(model, config)


def declare(maker: Any, case: Case, model: Any = None) -> None:
    maker.setup_loss_call(case.loss, maker.setup_model_call(model or case.model, case.x), case.t)


def step(maker: Any, case: Case) -> Any:
    declare(maker, case)
    return maker.forward_and_backward()


def hooks(model: nn.Module) -> int:
    stores = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, store)) for m in model.modules() for store in stores)


def everything(model: nn.Module, maker: Any) -> dict[str, Any]:
    """What a failed call has to leave as it was; tensors as (address, copy)."""
    found: dict[str, Any] = {"hooks": hooks(model), "grad mode": torch.is_grad_enabled(), "rng": torch.get_rng_state()}
    found["keys"] = {name: set(vars(module)) for name, module in model.named_modules()}
    found["training"] = {name: module.training for name, module in model.named_modules()}
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        found[name] = (p.data_ptr(), p.detach().clone(), p.requires_grad, len(p._backward_hooks or ()))
        found[f"{name}.grad"] = None if p.grad is None else (p.grad.data_ptr(), p.grad.clone())
    return found | {"maker": copy.deepcopy(maker.state_dict())}


def assert_same(found: Any, expected: Any, path: str = "") -> None:
    if isinstance(expected, dict):
        assert set(found) == set(expected), path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, tuple):
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b, path)
    elif isinstance(expected, Tensor):
        assert torch.equal(found.nan_to_num(nan=77.0), expected.nan_to_num(nan=77.0)), path
    else:
        assert found == expected, path


# --- calls that fail ------------------------------------------------------------------------------------------------------
def _fails(y: Tensor, t: Tensor) -> Tensor:
    F.cross_entropy(y, t)
    raise KeyboardInterrupt("stop")


def _detached(y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(y.detach(), t)


def _wrong_grad(y: Tensor, t: Tensor) -> Tensor:
    loss = F.cross_entropy(y, t)
    loss.register_hook(lambda g: 1 / 0)
    return loss


FAILURES: dict[str, tuple[Callable[[Case], Case], Any, str]] = {
    "wrong input shape": (lambda c: c._replace(x=c.x[:, :2]), RuntimeError, "shapes cannot be multiplied|shape"),
    "wrong target shape": (lambda c: c._replace(t=c.t[:2]), ValueError, "batch_size"),
    "wrong target": (lambda c: c._replace(t=c.t + 99), IndexError, "out of bounds"),
    "wrong input type": (lambda c: c._replace(x=c.x.float()), RuntimeError, "dtype"),
    "vector loss": (
        lambda c: c._replace(loss=lambda y, t: y.sum(1)),
        ValueError,
        r"must be a tensor with one element, got a .*\(6,\)",
    ),
    "number loss": (lambda c: c._replace(loss=lambda y, t: float(y.detach().sum())), ValueError, r"one element, got float"),
    "detached loss": (lambda c: c._replace(loss=_detached), RuntimeError, "does not require grad"),
    "interrupt in the loss": (lambda c: c._replace(loss=_fails), KeyboardInterrupt, "stop"),
    "exception in backward": (lambda c: c._replace(loss=_wrong_grad), ZeroDivisionError, "division by zero"),
}


@pytest.mark.parametrize("zeroed", [True, False])
@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("method", CONFIGS)
def test_a_call_that_fails_leaves_everything_as_it_was(method: str, name: str, zeroed: bool) -> None:
    """At the first step and at a later one, with and without a gradient to start from; and then training goes on as if not."""
    spoil, error, text = FAILURES[name]
    case, reference = mlp(), mlp()
    makers = [maker_of(c.model, CONFIGS[method]()) for c in (case, reference)]
    for _ in range(3):
        for maker, c in zip(makers, (case, reference), strict=True):
            if zeroed:
                c.model.zero_grad()
            if maker is makers[0]:
                declare(maker, spoil(c))
                before = everything(c.model, maker)
                with pytest.raises(error, match=text):
                    maker.forward_and_backward()
                assert_same(everything(c.model, maker), before)
            step(maker, c)
        for p, q in zip(case.model.parameters(), reference.model.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)


def test_an_exception_in_the_model_leaves_everything_as_it_was() -> None:
    case = mlp()
    maker = maker_of(case.model, CONFIGS["kfac"]())
    step(maker, case)
    handle = case.model.get_submodule("2").register_forward_pre_hook(lambda m, a: 1 / 0)
    for _ in range(2):
        before = everything(case.model, maker)
        with pytest.raises(ZeroDivisionError):
            step(maker, case)
        assert_same(everything(case.model, maker), before)
    handle.remove()


@pytest.mark.parametrize("method", ["kfac", "shampoo", "full_ng", "adam"])
def test_an_exception_in_a_solver_leaves_the_gradient_as_it_was(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = mlp()
    formed = {"nesterov_average": True} if method == "adam" else {}  # otherwise its step is one operator
    maker = maker_of(case.model, CONFIGS[method](**formed))
    step(maker, case)
    for verb in ("prepare", "solve"):
        with monkeypatch.context() as patch:
            patch.setattr(type(maker.plan.blocks[-1].triple.solver), verb, lambda *a: 1 / 0)
            maker.step_state.now.clocks.of["method"].refresh.retry(maker.step)
            before = everything(case.model, maker)
            with pytest.raises(ZeroDivisionError):
                step(maker, case)
        assert_same(everything(case.model, maker), before)
    step(maker, case)


def test_batch_norm_sees_one_forward_pass_whatever_follows() -> None:
    for loss, error in ((F.cross_entropy, None), (lambda y, t: y, ValueError)):
        case, plain = normed("batch_norm"), normed("batch_norm")
        maker = maker_of(case.model, gm.KfacGradientConfig(fisher=FisherExact()))
        plain.model(plain.x)
        if error is None:
            step(maker, case)
        else:
            with pytest.raises(error):
                step(maker, case._replace(loss=loss))
        for a, b in zip(case.model.buffers(), plain.model.buffers(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("method", ["kfac", "kfac_emp", "unit_ng", "full_ng", "adam", "gradient"])
def test_a_call_of_another_model_is_an_error(method: str) -> None:
    case, other = mlp(), mlp()
    maker = maker_of(case.model, CONFIGS[method]())
    declare(maker, case, model=other.model)
    before = everything(case.model, maker)
    with pytest.raises(RuntimeError, match=r"the very model that the maker was made for|depends on no trainable parameter"):
        maker.forward_and_backward()
    assert_same(everything(case.model, maker), before)
    step(maker, case)


def test_too_many_columns_are_refused() -> None:
    case = tagger()
    maker = maker_of(case.model, gm.KfacGradientConfig(fisher=FisherExact(max_columns=8)))
    declare(maker, case)
    before = everything(case.model, maker)
    with pytest.raises(ValueError, match=r"need 9 backward passes for an output of shape \(4, 3, 3\): .*raise max_columns"):
        maker.forward_and_backward()
    assert_same(everything(case.model, maker), before)


@pytest.mark.parametrize("method", ["kfac", "kfac_emp", "unit_ng", "full_ng"])
def test_preconditioning_without_a_recorded_pass_is_an_error(method: str) -> None:
    case = mlp()
    maker = maker_of(case.model, CONFIGS[method]())
    case.run().backward()
    before = everything(case.model, maker)
    with pytest.raises(RuntimeError, match="no forward pass was recorded in this step"):
        maker.precondition()
    assert_same(everything(case.model, maker), before)
    step(maker, case)


@pytest.mark.parametrize("method", ["adam", "shampoo"])
def test_methods_of_gradients_may_precondition_what_the_user_made(method: str) -> None:
    case, reference = mlp(), mlp()
    maker, other = (maker_of(c.model, CONFIGS[method]()) for c in (case, reference))
    for _ in range(3):
        case.model.zero_grad()
        reference.model.zero_grad()
        case.run().backward()
        maker.precondition()
        step(other, reference)
        for p, q in zip(case.model.parameters(), reference.model.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)


# --- models that cannot be treated ----------------------------------------------------------------------------------------
class Untrainable(nn.Module):
    def __init__(self, *scales: int) -> None:
        super().__init__()
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(n)) for n in scales)


CONSTRUCTIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], str]] = {
    "no parameters": (nn.Tanh, gm.KfacGradientConfig, "no trainable parameter"),
    "all frozen": (lambda: nn.Linear(2, 2).requires_grad_(False), gm.AdamGradientConfig, "no trainable parameter"),
    "no supported layer": (
        lambda: Untrainable(2),
        gm.KfacGradientConfig,
        r"covers no parameter of this model \(modules with trainable parameters: .*adam, adagrad, shampoo, unit_ng",
    ),
    "all ignored": (lambda: nn.Linear(2, 2), lambda: gm.KfacGradientConfig(ignore=(nn.Linear,)), "none but ignored ones"),
    "sparse embedding": (
        lambda: nn.Sequential(nn.Embedding(3, 2, sparse=True)),
        gm.AdamGradientConfig,
        r"0 \(Embedding\) makes sparse gradients: use sparse=False",
    ),
    "dense over max_dim": (
        lambda: nn.Linear(4, 3),
        lambda: gm.FullNaturalGradientConfig(max_dim=14),
        r"Dense\(full\) would hold a 15 x 15 matrix .*raise max_dim \(now 14\)",
    ),
    "unit over max_dim": (
        lambda: nn.Linear(4, 3),
        lambda: gm.UnitNaturalGradientConfig(max_dim=4),
        r"Dense\(unit\).* 5 x 5 matrix",
    ),
    "layers over max_dim together": (
        lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
        lambda: gm.FullNaturalGradientConfig(max_dim=11),
        r"a 12 x 12 matrix",
    ),
}


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_models_that_cannot_be_treated_are_refused(name: str) -> None:
    make, config, text = CONSTRUCTIONS[name]
    model = make()
    keys = {n: set(vars(m)) for n, m in model.named_modules()}
    with pytest.raises(ValueError, match=text):
        maker_of(model, config())
    assert hooks(model) == 0 and keys == {n: set(vars(m)) for n, m in model.named_modules()}


def test_every_illegal_triple_is_refused_with_a_reason_and_a_way_out() -> None:
    refused = 0
    for c, r, s, reason in gm.legality():
        if reason is not None:
            refused += 1
            assert any(part.split("(")[0] in reason for part in (c, r, s)) and len(reason) > 30, (c, r, s)
    assert refused > 0
    with pytest.raises(gm.TripleError, match="Curvatures that fit Diagonal of single tensors: BatchGradient"):
        gm.CustomGradientConfig(curvature=FisherMC(), representation=Diagonal())
    with pytest.raises(gm.TripleError, match=r"Cholesky needs .* Solvers that fit"):
        gm.CustomGradientConfig(representation=Diagonal(), solver=Cholesky())
    assert gm.CustomGradientConfig(curvature=FisherMC(), representation=Dense(granularity="unit"), solver=Cholesky())


# --- batches that are not finite, or empty --------------------------------------------------------------------------------
SPOILED: dict[str, Callable[[Case], Case]] = {
    "nan in the batch": (lambda c: c._replace(x=c.x.index_fill(0, torch.tensor([1]), float("nan")))),
    "inf in the batch": (lambda c: c._replace(x=c.x.index_fill(0, torch.tensor([1]), float("inf")))),
    "inf loss": (lambda c: c._replace(loss=lambda y, t: F.cross_entropy(y, t) * float("inf"))),
    "nan loss": (lambda c: c._replace(loss=lambda y, t: F.cross_entropy(y, t) + float("nan"))),
    "all ignored": (lambda c: c._replace(t=torch.full_like(c.t, -100))),
}


@pytest.mark.parametrize("name", SPOILED)
@pytest.mark.parametrize("method", PRECONDITIONED)
def test_what_is_not_finite_is_counted_and_enters_no_statistic(method: str, name: str) -> None:
    """``.grad`` is autograd's own, so that a `GradScaler` or a check of the user's sees what happened."""
    case = mlp()
    config = CONFIGS[method]()
    maker = maker_of(case.model, type(config)(**vars(config) | {"curvature_interval": 1}))
    for count in (1, 2):
        case.model.zero_grad()
        spoiled = SPOILED[name](case)
        spoiled.run().backward()
        expected = [p.grad.clone() for p in case.model.parameters() if p.grad is not None]
        case.model.zero_grad()
        before = copy.deepcopy(maker.state_dict())
        _, loss = step(maker, spoiled)
        assert not loss.isfinite()
        assert_same(maker.state_dict()["sites"], before["sites"])
        assert maker.skipped == count and maker.state_dict()["measured"] == before["measured"]
        for p, g in zip(case.model.parameters(), expected, strict=True):
            assert p.grad is not None and torch.equal(p.grad.nan_to_num(), g.nan_to_num())
        case.model.zero_grad()
        step(maker, case)
        assert maker.skipped == count and maker.silent() == []
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in case.model.parameters())


def test_a_fallback_with_momentum_is_protected_off_the_schedule() -> None:
    case = bare_scale()
    maker = maker_of(case.model, gm.KfacGradientConfig(fallback="adam", curvature_interval=9, warmup_steps=0))
    step(maker, case)
    case.model.zero_grad()
    step(maker, SPOILED["inf loss"](case))
    assert maker.skipped == 1
    case.model.zero_grad()
    step(maker, case)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in case.model.parameters())


def test_an_all_ignored_micro_batch_of_a_sum_adds_nothing() -> None:
    def loss(y: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(y, t, reduction="sum")

    results = []
    for extra in (False, True):
        case = mlp()._replace(loss=loss)
        maker = maker_of(case.model, gm.KfacGradientConfig(fisher=FisherExact(), sharing="expand"))
        declare(maker, case)
        maker.accumulate()
        if extra:
            declare(maker, case._replace(t=torch.full_like(case.t, -100)))
            maker.accumulate()
        maker.precondition()
        assert maker.skipped == 0
        results.append([maker.state_dict()["sites"][k]["state"]["left"] for k in ("0", "2")])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)


def test_an_all_ignored_batch_of_a_sum_leaves_the_statistics_alone() -> None:
    case = mlp()._replace(loss=lambda y, t: F.cross_entropy(y, t, reduction="sum"))
    maker = maker_of(case.model, gm.KfacGradientConfig(fisher=FisherExact()))
    declare(maker, case)
    maker.forward_and_backward()
    before = {k: v["state"]["left"] for k, v in maker.state_dict()["sites"].items()}
    case.model.zero_grad()
    declare(maker, case._replace(t=torch.full_like(case.t, -100)))
    maker.forward_and_backward()
    assert all(torch.equal(v["state"]["left"], before[k]) for k, v in maker.state_dict()["sites"].items())
    assert all(p.grad is not None and not p.grad.any() for p in case.model.parameters())


# --- unusual, and defined -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", CONFIGS)
def test_a_model_in_eval_is_treated_as_it_is(method: str) -> None:
    case, reference = mlp(), mlp()
    case.model.eval()
    for c in (case, reference):
        step(maker_of(c.model, CONFIGS[method]()), c)
    assert not case.model.training
    for p, q in zip(case.model.parameters(), reference.model.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)


def test_batch_norm_in_eval_keeps_its_statistics() -> None:
    case = normed("batch_norm")
    case.model.eval()
    before = [b.clone() for b in case.model.buffers()]
    step(maker_of(case.model, gm.KfacGradientConfig(fisher=FisherExact())), case)
    assert all(torch.equal(a, b) for a, b in zip(case.model.buffers(), before, strict=True))


@pytest.mark.parametrize("method", CONFIGS)
def test_frozen_and_unused_parameters_are_left_alone(method: str) -> None:
    for make, names in ((frozen, {"2.weight", "2.bias"}), (unused, {"idle.weight", "idle.bias"})):
        case = make()
        maker = maker_of(case.model, CONFIGS[method]())
        for _ in range(3):
            step(maker, case)
        parameters = dict(case.model.named_parameters())
        assert {k for k, p in parameters.items() if p.grad is None} == names
        assert all(p.requires_grad == (make is unused or k not in names) for k, p in parameters.items())
        if method != "gradient":
            expected = {"idle"} if make is unused else set()
            assert {name.split(".")[0] for name in maker.silent()} == expected


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("make", [linear, embedding_mean, lambda: linear()._replace(x=linear().x[:1], t=linear().t[:1])])
def test_small_models_and_batches_work(method: str, make: Callable[[], Case]) -> None:
    """A bare layer as the model, an embedding, a batch of one."""
    case = make()
    case.run().backward()
    plain = torch.cat([p.grad.flatten() for p in case.model.parameters() if p.grad is not None])
    case.model.zero_grad()
    maker = maker_of(case.model, CONFIGS[method]())
    step(maker, case)
    found = torch.cat([p.grad.flatten() for p in case.model.parameters() if p.grad is not None])
    assert bool(found.isfinite().all()) and float(found @ plain) > 0
    if method != "gradient":
        assert maker.silent() == [] and maker.skipped == 0
        assert not torch.equal(found, plain)


def test_freezing_after_the_maker_was_made_leaves_the_frozen_alone() -> None:
    case = mlp()
    maker = maker_of(case.model, CONFIGS["kfac_emp"]())
    step(maker, case)
    case.model.zero_grad()
    layer: Any = case.model.get_submodule("0")
    layer.requires_grad_(False)
    step(maker, case)
    assert layer.weight.grad is None and layer.bias.grad is None
    assert case.model.get_submodule("2").weight.grad is not None
