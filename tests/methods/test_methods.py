"""What every method of the registry owes, one row each: a method that is added to `METHODS` is tested here for nothing."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS, from_config, gathering
from gradmaker.config import GradientConfig
from gradmaker.grafting import GRAFTINGS
from gradmaker.maker import GradientMaker
from gradmaker.preconditioner import PreconditionedGradientMaker
from gradmaker.representations.roles import Unstacked, skips_first
from gradmaker.solvers.definition import Defined
from tests import models, oracles
from tests.models import CLASSES, Case
from tests.registry import from_the_first, legal_options, suited, without_draws, without_search

PRECONDITIONED = [name for name, make in METHODS.items() if issubclass(make, PreconditionedGradientMaker)]
PER_TENSOR = [name for name in PRECONDITIONED if from_config(nn.Linear(2, 2), {"method": name}).config.per_tensor]

every_method = pytest.mark.parametrize("method", METHODS)
every_preconditioned = pytest.mark.parametrize("method", PRECONDITIONED)


def maker_of(method: str, model: nn.Module, **options: Any) -> Any:
    return from_config(model, {"method": method, **options})


def passes(maker: GradientMaker, case: Case, x: Tensor | None = None, t: Tensor | None = None) -> Tensor:
    """One step of the protocol on a batch (the case's own unless given)."""
    case.model.zero_grad(set_to_none=True)
    y = maker.setup_model_call(case.model, case.x if x is None else x)
    maker.setup_loss_call(case.loss, y, case.t if t is None else t)
    return maker.forward_and_backward()[1]


def raw_gradients(case: Case, x: Tensor, t: Tensor) -> dict[str, Tensor]:
    """By autograd alone; call it before the maker's step, which may move running statistics."""
    named = {k: p for k, p in case.model.named_parameters() if p.requires_grad}
    loss = case.loss(case.model(x), t)
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), materialize_grads=True), strict=True))


def batches(case: Case, count: int) -> list[tuple[Tensor, Tensor]]:
    """Different batches: three quarters of the examples each, with other targets."""
    generator = torch.Generator().manual_seed(3)
    n = len(case.x)
    rows = [torch.randperm(n, generator=generator)[: max(2, 3 * n // 4)] for _ in range(count)]
    return [(case.x[r], case.t[r]) for r in rows]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def digits(width: int = 12) -> Case:
    """Noisy clusters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        t = torch.arange(60) % CLASSES
        x = torch.randn(CLASSES, 16)[t] + torch.randn(60, 16)
        layers = [nn.Linear(16, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, CLASSES)]
        return Case(nn.Sequential(*layers).double(), x.double(), t, F.cross_entropy)


def towers() -> Case:
    """Equal layers, so that there is something to stack, with norms and a bare parameter between them."""

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
            self.norms = nn.ModuleList([nn.LayerNorm(4) for _ in range(3)])
            self.scales = nn.ParameterList([torch.rand(4) + 0.5 for _ in range(2)])
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            for layer, norm in zip(self.layers, self.norms, strict=True):
                x = torch.tanh(norm(layer(x)))
            y: Tensor = self.head(x * self.scales[0] + self.scales[1])
            return y

    return models.build(Towers, 8, 4)


def tower() -> Case:
    """Equal layers and nothing between them, for methods that take no more than a chain."""
    make = lambda: nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(4, 4), nn.Tanh())], nn.Linear(4, CLASSES))  # noqa: E731
    return models.build(make, 8, 4)


def descends(maker: Any, index: int, product: float) -> bool:
    """Whether ``g.P g > 0``, or zero at a first step that is left out."""
    left_out = index == 0 and any(skips_first(b.triple.representation) for b in maker.plan.blocks)
    return product == 0 if left_out else product > 0


def train(maker: GradientMaker, case: Case, steps: int, lr: float, start: int = 0) -> None:
    """Plain SGD on a fixed sequence of different batches."""
    for x, t in batches(case, start + steps)[start:]:
        passes(maker, case, x, t)
        with torch.no_grad():
            for p in case.model.parameters():
                p -= 0 if p.grad is None else lr * p.grad


# --- (i) differs, (ii) descends -------------------------------------------------------------------------------------------
MODELS: dict[str, Callable[[], Case]] = {
    "mlp": models.mlp,
    "convolution": partial(models.convolution, 2, groups=2),
    "embedding": models.embedding_mean,
    "layer_norm": models.normed,
    "batch_norm": partial(models.normed, "batch_norm"),
    "bare_scale": models.bare_scale,
}


@every_preconditioned
@pytest.mark.parametrize("name", MODELS)
def test_covered_gradients_differ_and_others_are_raw(method: str, name: str) -> None:
    case = suited(method, MODELS[name])
    maker = maker_of(method, case.model)
    for x, t in batches(case, 3):
        raw = raw_gradients(case, x, t)
        passes(maker, case, x, t)
    for block in maker.plan.blocks:
        for site in block.sites:
            for key, p in site.parameters.items():
                assert oracles.relative_error(p.grad, raw[key]) > 1e-3, f"{key} was left as it was"
    covered = {k for b in maker.plan.blocks for s in b.sites for k in s.parameters}
    rest = raw.keys() - covered
    assert bool(rest) == bool(maker.plan.plain)
    for key in rest:
        assert oracles.relative_error(dict(case.model.named_parameters())[key].grad, raw[key]) < 1e-12


@every_preconditioned
@pytest.mark.parametrize("name", MODELS)
def test_direction_descends(method: str, name: str) -> None:
    """g.P g > 0 at every step, of a preconditioner as old as its schedule lets it become; momentum would mix in other g."""
    case = suited(method, MODELS[name])
    maker = maker_of(method, case.model, beta1=0.0)
    for index, (x, t) in enumerate(batches(case, 4)):
        raw = raw_gradients(case, x, t)
        passes(maker, case, x, t)
        assert descends(maker, index, sum(float((raw[k] * g).sum()) for k, g in gradients(case.model).items()))


@every_method
def test_thirty_steps_lower_the_loss(method: str) -> None:
    final = []
    for lr in (1e-3, 1e-2, 1e-1, 1.0):
        case = digits()
        maker = maker_of(method, case.model)
        optimizer = torch.optim.SGD(case.model.parameters(), lr)
        first = case.run().item()
        for _ in range(30):
            passes(maker, case)
            optimizer.step()
        final.append(case.run().item())
    assert min(final) < 0.1 * first


# --- (iii) state ----------------------------------------------------------------------------------------------------------
def reloaded(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, read in the way that runs no code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    read: dict[str, Any] = torch.load(file, weights_only=True)
    return read


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in leaves(item, f"{name}/{key}").items()}
    return {name: value}


@every_method
@pytest.mark.parametrize("at", [1, 3, 12])
def test_state_round_trip_is_bitwise(method: str, at: int) -> None:
    case, twin = (suited(method, towers, tower) for _ in range(2))
    options = legal_options(method, warmup_steps=2, curvature_interval=2, preconditioner_interval=3, beta1=0.5, grafting="adam")
    maker = maker_of(method, case.model, **options)
    train(maker, case, at, 1e-3)
    state, weights = reloaded(maker.state_dict()), copy.deepcopy(case.model.state_dict())
    train(maker, case, 7, 1e-3, at)

    twin.model.load_state_dict(weights)
    second = maker_of(method, twin.model, **options)
    second.load_state_dict(state)
    train(second, twin, 7, 1e-3, at)
    for (key, p), q in zip(case.model.named_parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(p, q), key
    mine, its = leaves(maker.state_dict()), leaves(second.state_dict())
    assert mine.keys() == its.keys()
    for key, value in mine.items():
        assert torch.equal(value, its[key]) if isinstance(value, Tensor) else value == its[key], key
    untrained = suited(method, towers, tower).model
    assert not any(torch.equal(p, q) for p, q in zip(case.model.parameters(), untrained.parameters(), strict=True))


# --- (iv) stacks ----------------------------------------------------------------------------------------------------------
@every_preconditioned
def test_stacked_equals_unstacked(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refreshes are not staggered here: a staggered refresh falls on a step that depends on the grouping."""
    together, apart = (suited(method, towers, tower) for _ in range(2))
    stacked = maker_of(method, together.model, **legal_options(method, stagger=False))
    monkeypatch.setattr(gathering, "STACK_LIMIT", 0)
    single = maker_of(method, apart.model, **legal_options(method, stagger=False))
    first = stacked.plan.blocks[0]
    if not first.full and not isinstance(first.triple.representation, Unstacked):  # such evidence is never stacked
        assert len(stacked.plan.blocks) < len(single.plan.blocks)
        assert all(len(b.sites) == 1 for b in single.plan.blocks)
    train(stacked, together, 12, 1e-3)
    train(single, apart, 12, 1e-3)
    for (key, p), q in zip(together.model.named_parameters(), apart.model.parameters(), strict=True):
        assert oracles.relative_error(p, q) < 1e-12, key
    mine, its = leaves(stacked.state_dict()["sites"]), leaves(single.state_dict()["sites"])
    assert mine.keys() == its.keys()  # the grouping does not show
    assert all(mine[key].shape == its[key].shape if isinstance(mine[key], Tensor) else mine[key] == its[key] for key in mine)


# --- (v) P itself ---------------------------------------------------------------------------------------------------------
def probe(maker: Any, model: nn.Module, v: Tensor) -> Tensor:
    """P v, through the public protocol: whatever is in ``.grad`` is preconditioned."""
    for key, where in oracles.parameter_slices(model).items():
        p = model.get_parameter(key)
        p.grad = v[where].view_as(p).clone()
    maker.precondition()
    return oracles.gradient_vector(model)


@every_preconditioned
@pytest.mark.parametrize("name", ["mlp", "convolution", "embedding", "layer_norm", "bare_scale"])
def test_preconditioner_is_linear_symmetric_positive(method: str, name: str) -> None:
    """Frozen after four measured steps, without the parts that are not linear: lengths and momentum."""
    case = suited(method, MODELS[name])
    frozen = {"curvature_interval": 1000, "preconditioner_interval": 1000, "warmup_steps": 4, "start_step": 0, "stagger": False}
    maker = maker_of(method, case.model, grafting="none", beta1=0.0, **legal_options(method, **frozen))
    if any(isinstance(s, Defined) and not s.linear for s in (b.triple.solver for b in maker.plan.blocks)):
        pytest.skip("P is that of the gradient that it is applied to")
    train(maker, case, 4, 1e-3)  # a secant needs weights that move
    eye = torch.eye(len(oracles.parameter_vector(case.model)), dtype=torch.float64)
    P = torch.stack([probe(maker, case.model, e) for e in eye], 1)
    assert oracles.relative_error(P, P.mT) < 1e-9
    s = torch.linalg.eigvalsh((P + P.mT) / 2)
    assert s[0] > 0  # damping keeps every direction
    assert s[-1] > 1.001 * s[0]  # and it is not a multiple of the identity
    v = torch.randn(len(eye), dtype=torch.float64)
    assert oracles.relative_error(probe(maker, case.model, v), P @ v) < 1e-9
    assert oracles.relative_error(probe(maker, case.model, -3 * v), -3 * (P @ v)) < 1e-9


# --- (vi) dtypes, layouts, orders -----------------------------------------------------------------------------------------
def damped_probes(method: str) -> dict[str, Any]:
    """Where the curvature is zero, a product with the Hessian is rounding alone, and what is divided by it is anything."""
    return {"damping": 0.1} if method in ("adahessian", "esgd", "saddle_free_diagonal") else {}


def in_its_own_dtype(method: str) -> dict[str, Any]:
    """Muon iterates in bfloat16, as published: three digits, whatever the model's dtype."""
    return {"half": False} if method == "muon" else {}


@every_method
@pytest.mark.parametrize("dtype, cosine", [(torch.float32, 0.9999), (torch.bfloat16, 0.9)])
@pytest.mark.parametrize("name", ["mlp", "convolution", "layer_norm", "embedding"])
def test_low_precision_models(method: str, dtype: torch.dtype, cosine: float, name: str) -> None:
    """Statistics in float32 or better; the result in the model's dtype and near the float64 one of the same (rounded) model."""
    reference = suited(method, MODELS[name])
    reference.model.to(dtype).double()  # rounded weights
    exact = Case(
        reference.model, reference.x.to(dtype).double() if reference.x.is_floating_point() else reference.x, *reference[2:]
    )
    low = Case(copy.deepcopy(exact.model).to(dtype), exact.x.to(dtype) if exact.x.is_floating_point() else exact.x, *exact[2:])
    directions = []
    for case in (exact, low):
        options = {**without_draws(method), **damped_probes(method), **without_search(method)}
        options |= {**from_the_first(method), **in_its_own_dtype(method)}
        maker = maker_of(method, case.model, **options)
        passes(maker, case)
        assert all(p.grad is None or p.grad.dtype == p.dtype for p in case.model.parameters())
        directions.append(oracles.gradient_vector(case.model).double())
        for block in getattr(maker, "plan", None).blocks if method in PRECONDITIONED else []:
            assert block.frame.dtype == torch.promote_types(next(case.model.parameters()).dtype, torch.float32)
    assert directions[1].isfinite().all()
    assert float(torch.cosine_similarity(*directions, dim=0)) > cosine


@every_method
def test_channels_last(method: str) -> None:
    plain = suited(method, partial(models.convolution, 2, groups=2))
    case = Case(copy.deepcopy(plain.model).to(memory_format=torch.channels_last), *plain[1:])
    case = case._replace(x=case.x.contiguous(memory_format=torch.channels_last))
    for twin in (plain, case):
        maker = maker_of(method, twin.model, **from_the_first(method))
        for _ in range(2):
            passes(maker, twin)
    for (key, g), h in zip(gradients(plain.model).items(), gradients(case.model).values(), strict=True):
        assert oracles.relative_error(h, g) < 1e-10, key
    weight = case.model.get_parameter("convolution.weight")
    assert weight.grad is not None and weight.grad.stride() == weight.stride()


@pytest.mark.parametrize("method", PER_TENSOR)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 1, 3), (2, 3, 2, 2), (2, 2, 1, 3, 2)])
@pytest.mark.parametrize("grafting", ["none", *GRAFTINGS])
def test_tensors_of_any_order(method: str, shape: tuple[int, ...], grafting: str) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(shape, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = (self.w * x).square().sum() / 2
            return y

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        case = Case(Bare(), torch.randn(4, *shape, dtype=torch.float64), torch.zeros(4), lambda y, t: y)
    maker = maker_of(method, case.model, grafting=grafting, beta1=0.0)
    first = case.run().item()
    for index, x in enumerate((case.x, case.x.flip(0) * 1.5, case.x)):
        raw = raw_gradients(case, x, case.t)["w"]
        passes(maker, case, x)
        (g,) = gradients(case.model).values()
        assert g.shape == shape and g.isfinite().all() and descends(maker, index, float((g * raw).sum()))
        with torch.no_grad():
            case.model.get_parameter("w").sub_(1e-3 * g)
    assert case.run().item() < first


WOODBURY = ("smw_ng", "tonga", "mfac")
"""Methods of low rank that subtract terms 1 / damping times as large as the gradient."""


# --- (vii) layers without gradients ---------------------------------------------------------------------------------------
@every_method
def test_unused_layer(method: str) -> None:
    """Its `.grad` stays None and everything else is as if it were left out."""
    case, twin = (suited(method, models.unused) for _ in range(2))
    left_out, options = legal_options(method, ignore=("idle",)), without_search(method)
    if method in WOODBURY:  # a block with such a layer holds its rows formed, and the subtraction magnifies their rounding
        options = {**options, "damping": 0.1}
    makers = maker_of(method, case.model, **options), maker_of(method, twin.model, **left_out, **options)
    for _ in range(3):
        passes(makers[0], case)
        passes(makers[1], twin)
    assert all(p.grad is None for p in case.model.get_submodule("idle").parameters())
    for (key, g), h in zip(gradients(case.model).items(), gradients(twin.model).values(), strict=True):
        assert oracles.relative_error(g, h) < 1e-12, key
    if method in PRECONDITIONED:
        assert {name.split(".")[0] for name in makers[0].silent()} == {"idle"}


@every_method
def test_frozen_layer(method: str) -> None:
    """It is neither touched nor counted: the others get what they get when it is trainable but ignored."""
    case, twin = models.frozen(), models.frozen()
    twin.model.get_submodule("2").requires_grad_(True)
    makers = maker_of(method, case.model), maker_of(method, twin.model, **legal_options(method, ignore=("2",)))
    before = copy.deepcopy(case.model.get_submodule("2").state_dict())
    for _ in range(3):
        passes(makers[0], case)
        passes(makers[1], twin)
    assert all(p.grad is None for p in case.model.get_submodule("2").parameters())
    assert all(torch.equal(v, before[k]) for k, v in case.model.get_submodule("2").state_dict().items())
    theirs = gradients(twin.model)
    for key, g in gradients(case.model).items():
        assert oracles.relative_error(g, theirs[key]) < 1e-12, key
    if method in PRECONDITIONED:
        assert not [k for b in makers[0].plan.blocks for s in b.sites for k in s.parameters if k.startswith("2.")]


# --- every method has what the rows above rely on -------------------------------------------------------------------------
@every_preconditioned
def test_config_round_trip(method: str) -> None:
    config = METHODS[method].Config()
    assert isinstance(config, GradientConfig)
    assert replace(config) == config
    assert maker_of(method, nn.Linear(2, 2), **vars(config)).config == config
