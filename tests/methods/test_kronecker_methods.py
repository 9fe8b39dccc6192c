"""KFLR, KFRA, SKFAC, TNT, natural gradients of layers and diagonals, and the KL clip, against dense oracles in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS
from gradmaker.curvature import Curvature, FisherEmp, FisherExact, FisherRecursive, Gradient, OneHot, Outer, SampledGradient
from gradmaker.representations import Dense, Kron, KronRows, Representation, TensorNormal
from gradmaker.representations.base import Fold, Frame
from gradmaker.solvers import Cholesky, FactorWoodbury, Solver
from tests import models, oracles
from tests.measure import ggn, site_order
from tests.methods.test_invariances import outputs_after
from tests.models import CLASSES, Case

EVERY_STEP: dict[str, Any] = {"curvature_interval": 1, "preconditioner_interval": 1, "warmup_steps": 0, "stagger": False}
EXACT, EMP = FisherExact(), FisherEmp()
NEW = Fold(0.0, 1.0, 1.0)


def make_of(method: str, case: Case, **options: Any) -> Any:
    return METHODS[method](case.model, METHODS[method].Config(**options))


def custom(case: Case, curvature: Curvature, representation: Representation, solver: Solver, **options: Any) -> Any:
    parts: Any = {"curvature": curvature, "representation": representation, "solver": solver}
    return make_of("custom", case, **{"decay": 0.0, **parts, **options})


def step(maker: Any, case: Case) -> Tensor:
    """P g of a step that leaves the weights where they are."""
    case.model.zero_grad(set_to_none=True)
    y = maker.setup_model_call(case.model, case.x)
    maker.setup_loss_call(case.loss, y, case.t)
    maker.forward_and_backward()
    return oracles.gradient_vector(case.model)


def raw(case: Case) -> Tensor:
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(case.run(), list(case.model.parameters()))])


def pairs(maker: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Site -> (B, A), of one group."""
    found = {}
    for block in maker.plan.blocks:
        left, right = block.triple.representation.factors(block.state)
        found |= {s.name: (left[slot][0], right[slot][0]) for s, slot in zip(block.sites, block.slots, strict=True)}
    return found


def first(case: Case, count: int) -> Case:
    return case._replace(x=case.x[:count], t=case.t[:count])


# --- KFLR -------------------------------------------------------------------------------------------------------------------
def test_kflr_is_kfac_with_the_exact_fisher() -> None:
    one, other = models.mlp(), models.mlp()
    found = step(make_of("kflr", one, **EVERY_STEP), one)
    assert torch.equal(found, step(make_of("kfac", other, fisher=EXACT, **EVERY_STEP), other))
    with pytest.raises(ValueError, match="use kfac for another Fisher"):
        make_of("kflr", one, fisher=EMP)


def test_kflr_last_factor_is_the_mean_output_hessian() -> None:
    case = models.mlp()
    maker = make_of("kflr", case, **EVERY_STEP)
    step(maker, case)
    expected = oracles.output_hessian("categorical", case.model(case.x), case.t).mean(0)
    assert oracles.relative_error(pairs(maker)["2"][0], expected) < 1e-13


def test_kflr_is_exact_for_deep_linear_nets() -> None:
    case = models.deep_linear()
    maker = make_of("kflr", case, **EVERY_STEP)
    step(maker, case)
    C = ggn(models.deep_linear())
    for block in maker.plan.blocks:
        found = block.triple.representation.to_dense(block.state)
        for site, slot in zip(block.sites, block.slots, strict=True):
            assert oracles.relative_error(found[slot][0], oracles.reorder(C, site_order(case.model, site))) < 1e-12


@pytest.mark.parametrize("method, options", [("kflr", {"damping": 0.0}), ("skfac", {"damping": 1e-24, "fisher": EXACT})])
def test_affine_invariance(method: str, options: dict[str, Any], double: None) -> None:
    """Property 28."""
    difference, moved = outputs_after(method, **options)
    assert difference < 1e-6 and moved > 1e-2


# --- KFRA -------------------------------------------------------------------------------------------------------------------
def chain(activation: type[nn.Module], loss: Any = F.cross_entropy, n: int = 8, last: bool = False) -> Case:
    """Three linear layers; `last` puts an activation behind the last one too."""
    layers = [nn.Linear(4, 5), activation(), nn.Linear(5, 4, bias=False), activation(), nn.Linear(4, CLASSES)]
    case = models.build(lambda: nn.Sequential(*layers[:3], nn.Sequential(*layers[3:]), *[activation()] * last), n, 4)
    with torch.no_grad():
        for p in case.model.parameters():
            p *= 3  # far from linear
    if loss is F.cross_entropy:
        return case
    return case._replace(loss=loss, t=torch.rand(n, CLASSES, dtype=torch.float64))


def output_factors(case: Case, method: str) -> dict[str, Tensor]:
    maker = make_of(method, case, **EVERY_STEP)
    step(maker, case)
    return {name: B for name, (B, _) in pairs(maker).items()}


def errors(case: Case) -> list[float]:
    """Of KFRA against KFLR, layer by layer."""
    kfra, kflr = output_factors(case, "kfra"), output_factors(case, "kflr")
    assert kfra.keys() == kflr.keys()
    return [oracles.relative_error(kfra[k], kflr[k]) for k in kflr]


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.SiLU])
def test_kfra_is_kflr_where_nothing_is_averaged_too_early(activation: type[nn.Module]) -> None:
    for loss in (F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits):
        assert max(errors(chain(activation, loss, n=1, last=True))) < 1e-12
        assert max(errors(chain(nn.Identity, loss))) < 1e-12
    cross, square = errors(chain(activation)), errors(chain(activation, F.mse_loss))
    assert cross[2] < 1e-12 and square[2] < 1e-12  # the last layer
    assert square[1] < 1e-12  # with a constant Lambda, the one before as well
    assert cross[1] > 1e-2 and cross[0] > 1e-2 and square[0] > 1e-2  # and no more


def test_kfra_recursion() -> None:
    """By hand, with a loss that leaves out an example."""
    case = chain(nn.Tanh)
    case = case._replace(t=torch.where(torch.arange(8) == 3, -100, case.t))
    maker = make_of("kfra", case, **EVERY_STEP)
    step(maker, case)
    kept = torch.arange(8) != 3
    a, linear = case.x[kept], [m for m in case.model.modules() if isinstance(m, nn.Linear)]
    inputs, slopes = [], []
    for module in linear:
        inputs.append(a)
        a = torch.tanh(module(a)).detach()
        slopes.append(1 - a.square())
    B = oracles.output_hessian("categorical", linear[2](inputs[2]), case.t[kept]).mean(0)
    for j, name in ((2, "3.1"), (1, "2.weight"), (0, "0")):
        x = inputs[j] if j == 1 else torch.cat([inputs[j], torch.ones(7, 1).double()], 1)
        found = pairs(maker)[name.removesuffix(".weight") if name not in pairs(maker) else name]
        assert oracles.relative_error(found[0], B) < 1e-12
        assert oracles.relative_error(found[1], x.mT @ x / 7) < 1e-12
        if j:
            B = (linear[j].weight.mT @ B @ linear[j].weight).detach() * (slopes[j - 1].mT @ slopes[j - 1] / 7)


def test_kfra_counts_the_dropout_of_each_example() -> None:
    case = models.build(lambda: nn.Sequential(nn.Linear(4, 40), nn.Dropout(0.5), nn.Linear(40, CLASSES)), 5, 4)
    maker = make_of("kfra", case, **EVERY_STEP)
    step(maker, case)
    B, W = pairs(maker)["0"][0], case.model.get_parameter("2.weight").detach()
    rest = oracles.relative_error(B, W.mT @ pairs(maker)["2"][0] @ W)
    assert rest > 0.1  # a mask of zeros and twos is in it


def test_kfra_is_refused_elsewhere() -> None:
    for make, name in (
        (partial(models.convolution, 2), "the model is ConvNet"),
        (models.embedding_mean, "the model is Bag"),
        (lambda: Case(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.LayerNorm(2))), *models.mlp()[1:]), "1.0 is LayerNorm"),
    ):
        with pytest.raises(ValueError, match=f"{name}.*use FisherExact .kflr."):
            make_of("kfra", make())
    with pytest.raises(ValueError, match=r"function of a tensor of shape \(4, 3, 3\)"):
        step(make_of("kfra", case := sequences()), case)
    with pytest.raises(ValueError, match="use kfac for another Fisher"):
        make_of("kfra", chain(nn.Tanh), fisher=EXACT)


def sequences() -> Case:
    case = models.build(lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, CLASSES)), 4, 3, 4)
    return case._replace(loss=lambda y, t: F.cross_entropy(y.mT, t), t=torch.zeros(4, 3, dtype=torch.long))


def test_kfra_leaves_the_gradient_and_trains() -> None:
    case, first_loss = chain(nn.Tanh, n=30), None
    plain = custom(case, FisherRecursive(), Kron(), Cholesky(damping=1e12))
    assert oracles.relative_error(step(plain, case) * 1e12, raw(case)) < 1e-5
    maker = make_of("kfra", case, **EVERY_STEP)
    optimizer = torch.optim.SGD(case.model.parameters(), 0.1)
    for _ in range(40):
        first_loss = first_loss or case.run().item()
        step(maker, case)
        optimizer.step()
    assert case.run().item() < 0.5 * first_loss
    assert maker.verify().passed


# --- SKFAC ------------------------------------------------------------------------------------------------------------------
SKFAC: dict[str, Callable[[], Case]] = {
    "mlp": models.mlp,
    "no_bias": partial(models.mlp, bias=False),
    "few": lambda: first(models.mlp(), 2),
    "convolution": partial(models.convolution, 2, groups=2),
    "depthwise": partial(models.convolution, 1, groups=4),
    "tagger": partial(models.tagger, mix=True),
    "bag": models.embedding_mean,
    "norm": models.normed,
}


@pytest.mark.parametrize("name", SKFAC)
@pytest.mark.parametrize("reduction, sharing", [("sum", "reduce"), ("none", "expand")])
@pytest.mark.parametrize("fisher", [EXACT, EMP])
def test_skfac_is_local_kfac(name: str, reduction: str, sharing: str, fisher: Curvature) -> None:
    """The newest batch alone, whatever came before, on both sides of n = d."""
    one, other = SKFAC[name](), SKFAC[name]()
    options = {"fisher": fisher, "damping": 0.01, **EVERY_STEP}
    makers = (
        make_of("skfac", one, reduction=reduction, **options),
        make_of("kfac", other, decay=0.0, sharing=sharing, **options),
    )
    for k in range(3):
        found = [step(m, c._replace(t=c.t.roll(k, 0))) for m, c in zip(makers, (one, other), strict=True)]
        assert oracles.relative_error(*found) < 1e-10, k
    assert makers[0].verify().passed


def test_skfac_has_both_paths() -> None:
    """The two layers of six examples with an exact Fisher: 18 rows of gradients, six of inputs for five or more columns."""
    forms = set()
    for name in ("mlp", "few", "convolution"):
        case = SKFAC[name]()
        maker = make_of("skfac", case, fisher=EXACT, **EVERY_STEP)
        step(maker, case)
        for block in maker.plan.blocks:
            forms |= {key.split("_")[1] for key in block.state if "mass" not in key}
            for k, held in enumerate(block.triple.representation.rows(block.state)):
                assert held is None or held[0].shape[1] < held[0].shape[2]
                assert (held is None) == (f"inverse_{k}" in block.cache)
    assert forms == {"rows", "factor"}


@pytest.mark.parametrize("damping", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_woodbury_is_the_inverse_of_the_factor(damping: float, dtype: torch.dtype, tolerance: float) -> None:
    """Property 19, and n > d as n < d: rows that are zero change nothing but the path."""
    representation, solver = KronRows(), FactorWoodbury(damping=damping)
    Y, X, g = torch.randn(2, 3, 5).to(dtype), torch.randn(2, 4, 7).to(dtype), torch.randn(2, 5, 7).to(dtype)
    few = {"left_rows": Y, "right_rows": X, "left_mass": torch.ones(2).to(dtype), "right_mass": torch.full((2,), 0.5).to(dtype)}
    many = {"left_factor": Y.mT @ Y, "right_factor": X.mT @ X, **{k: v for k, v in few.items() if "mass" in k}}
    found = [solver.solve(representation, solver.prepare(representation, state, None), g) for state in (few, many)]
    P = solver.operator(representation, {k: v.double() for k, v in few.items()})
    for value in found:
        assert oracles.relative_error(value.double(), (P @ g.double().reshape(2, -1, 1)).view_as(g)) < tolerance
    A, B = 2 * X[0].double().mT @ X[0].double(), Y[0].double().mT @ Y[0].double()
    expected = oracles.kfac_direction(g[0].double(), A, B, damping=damping)
    assert oracles.relative_error(found[0][0].double(), expected) < tolerance


def test_skfac_convolution_with_one_position_is_linear() -> None:
    """Property 42 for every reduction."""
    weight, x = torch.randn(3, 2 * 3 * 3).double(), torch.randn(4, 2, 3, 3).double()
    for reduction in ("sum", "subsample", "none"):
        found = []
        for module, inputs in ((nn.Conv2d(2, 3, 3).double(), x), (nn.Linear(18, 3).double(), x.flatten(1))):
            with torch.no_grad():
                module.get_parameter("weight").copy_(weight.view_as(module.get_parameter("weight")))
                module.get_parameter("bias").fill_(0.1)
            case = Case(module, inputs, torch.tensor([0, 1, 2, 0]), lambda y, t: F.cross_entropy(y.flatten(1), t))
            found.append(step(make_of("skfac", case, fisher=EXACT, reduction=reduction, **EVERY_STEP), case))
        assert oracles.relative_error(*found) < 1e-10


def test_skfac_subsample_weighs_what_it_keeps() -> None:
    """Exact where all positions are alike, and the whole where all are kept."""
    alike, all_kept = models.deep_linear(6), models.deep_linear(6)
    with torch.no_grad():
        alike = alike._replace(x=alike.x[:, :1].expand(-1, 6, -1).clone(), t=alike.t[:, :1].expand(-1, 6, -1).clone())
    for case, positions, same in ((alike, 2, True), (all_kept, 6, True), (all_kept, 2, False)):
        options: Any = {"fisher": EXACT, **EVERY_STEP}
        thin = make_of("skfac", case, reduction="subsample", positions=positions, **options)
        whole = make_of("skfac", case, reduction="none", **options)
        difference = oracles.relative_error(step(thin, case), step(whole, case))
        assert difference < 1e-10 if same else difference > 1e-3


def test_skfac_micro_batches_append() -> None:
    whole, parts = models.mlp(), models.mlp()
    one, other = (make_of("skfac", c, fisher=EXACT, **EVERY_STEP) for c in (whole, parts))
    for k in range(2):
        found = step(one, whole._replace(t=whole.t.roll(k)))
        parts.model.zero_grad(set_to_none=True)
        for rows in (slice(0, 1), slice(1, 6)):
            y = other.setup_model_call(parts.model, parts.x[rows])
            other.setup_loss_call(parts.loss, y, parts.t.roll(k)[rows])
            other.accumulate((rows.stop - rows.start) / 6)
        other.precondition()
        assert oracles.relative_error(oracles.gradient_vector(parts.model), found) < 1e-10, k


def test_skfac_batches_of_other_sizes_resume() -> None:
    """A cache that is older than the statistic has rows of another number; a lost block of another shape has no past."""
    case = models.mlp()
    options = {**EVERY_STEP, "preconditioner_interval": 2}
    for at in range(1, 5):
        maker, second = (make_of("skfac", case, **options) for _ in range(2))
        for k in range(at):
            step(maker, first(case, 3 + k % 3))
        second.load_state_dict(maker.state_dict())
        for k in range(at, at + 4):
            assert torch.equal(step(maker, first(case, 3 + k % 3)), step(second, first(case, 3 + k % 3)))


def test_skfac_that_fails_falls_back() -> None:
    representation, solver = KronRows(), FactorWoodbury(damping=0.1)
    g, ones = torch.randn(1, 5, 7).double(), torch.ones(1).double()
    state = {"left_rows": torch.full((1, 3, 5), torch.nan).double(), "right_factor": torch.eye(7)[None].double()}
    state |= {"left_mass": ones, "right_mass": ones}
    cache = solver.prepare(representation, state, None)
    assert oracles.relative_error(solver.solve(representation, cache, g), g / 0.1) < 1e-12 and int(cache["failures"]) == 1
    good = solver.prepare(representation, {**state, "left_rows": torch.randn(1, 3, 5).double()}, cache)
    again = solver.prepare(representation, state, good)
    assert torch.equal(solver.solve(representation, again, g), solver.solve(representation, good, g))
    wider = {**state, "left_rows": torch.full((1, 4, 5), torch.nan).double()}
    assert oracles.relative_error(solver.solve(representation, solver.prepare(representation, wider, good), g), g / 0.1) < 1e-12


@pytest.mark.parametrize(
    "options", [{"decay": 0.9}, {"decay": None}, {"reduction": "mean"}, {"reduction": "subsample", "positions": 0}]
)
def test_skfac_illegal_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected|legal"):
        make_of("skfac", models.mlp(), **options)


# --- TNT --------------------------------------------------------------------------------------------------------------------
def normal_factors(*sizes: int) -> list[Tensor]:
    roots = [torch.randn(d, d, dtype=torch.float64) for d in sizes]
    return [R @ R.mT for R in roots]


def evidence_of(C: Tensor, shape: tuple[int, ...]) -> list[Gradient]:
    """Gradients whose outer products sum to C."""
    s, Q = torch.linalg.eigh(C)
    return [Gradient((Q[:, k] * s[k].clamp(min=0).sqrt()).reshape(1, *shape)) for k in range(len(s))]


def tensor_normal(C: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
    representation = TensorNormal(granularity="tensor")
    state = representation.init(Frame(1, shape, frozenset(), torch.float64, torch.device("cpu")))
    for k, evidence in enumerate(evidence_of(C, shape)):
        representation.update(state, evidence, NEW if k == 0 else Fold(1.0, 1.0, 0.0))
    return state


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_tnt_reproduces_tensor_normal_covariances(shape: tuple[int, ...]) -> None:
    """And of any other its trace; the factors are balanced."""
    C = torch.ones(1, 1, dtype=torch.float64)
    for H in normal_factors(*shape):
        C = oracles.kron(C, H)
    representation, state = TensorNormal(granularity="tensor"), tensor_normal(C, shape)
    assert oracles.relative_error(representation.to_dense(state)[0], C) < 1e-13
    (other,) = normal_factors(len(C))
    state = tensor_normal(other, shape)
    found = representation.to_dense(state)[0]
    assert abs(found.trace() - other.trace()) < 1e-12 * other.trace()
    means = torch.stack([H[0].diagonal().mean() for H in representation.factors(state)])
    assert oracles.relative_error(means, (other.trace() / len(C)).sqrt().new_full(means.shape, means[0])) < 1e-12
    if len(shape) > 1:
        assert oracles.relative_error(found, other) > 1e-2
        v = torch.randn(1, *shape, dtype=torch.float64)
        assert oracles.relative_error(representation.matvec(state, v).reshape(-1), found @ v.reshape(-1)) < 1e-13


def test_tnt_of_nothing_is_zero() -> None:
    representation = TensorNormal(granularity="tensor")
    state = representation.init(Frame(2, (3, 4), frozenset({1}), torch.float64, torch.device("cpu")))
    representation.update(state, Gradient(torch.zeros(2, 3, 4).double()), NEW)
    assert torch.equal(representation.to_dense(state), torch.zeros(2, 12, 12).double())


@pytest.mark.parametrize("fisher", [EXACT, EMP])
def test_tnt_one_datum_is_the_block_and_kfac(fisher: Curvature) -> None:
    case = first(models.mlp(), 1)
    C = ggn(first(models.mlp(), 1))
    if fisher == EMP:
        C = torch.outer(raw(case), raw(case))
    found = []
    for representation in (TensorNormal(), Kron()):
        maker = custom(case, fisher, representation, Cholesky(damping=0.1))
        found.append(step(maker, case))
        for block in maker.plan.blocks:
            where = site_order(case.model, block.sites[0])
            assert oracles.relative_error(representation.to_dense(block.state)[0], oracles.reorder(C, where)) < 1e-12
    assert oracles.relative_error(*found) < 1e-12  # K-FAC's pi finds factors of one scale, too


def test_tnt_keeps_the_trace_and_kfac_does_not() -> None:
    case = models.mlp()
    C, error = ggn(models.mlp()), []
    for representation in (TensorNormal(), Kron()):
        maker = custom(case, EXACT, representation, Cholesky())
        step(maker, case)
        for block in maker.plan.blocks:
            trace = oracles.reorder(C, site_order(case.model, block.sites[0])).trace()
            error.append(float(representation.to_dense(block.state)[0].trace() / trace - 1))
    assert max(map(abs, error[:2])) < 1e-12 and min(map(abs, error[2:])) > 1e-3


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("R", [1, 3])
def test_tnt_of_examples_sums_positions_first(transposed: bool, bias: bool, R: int) -> None:
    evidence = Outer(torch.randn(2, 4, R, 3).double(), torch.randn(2, 2, 4, R, 5).double(), bias, transposed)
    shape = (3 + bias, 5) if transposed else (5, 3 + bias)
    J = evidence.rows()  # (N, G, *shape)
    for wide in (frozenset(), frozenset({0}), frozenset({1})):
        state = TensorNormal().init(Frame(2, shape, wide, torch.float64, torch.device("cpu")))
        TensorNormal().update(state, evidence, NEW)
        expected = [torch.einsum("ngij,ngkj->gik", J, J), torch.einsum("ngij,ngik->gjk", J, J)]
        for axis, H in enumerate(expected):
            H = H.diagonal(dim1=1, dim2=2) if axis in wide else H
            assert oracles.relative_error(state[f"factor_{axis}"], H) < 1e-13


def test_tnt_of_tokens() -> None:
    evidence = Outer(OneHot(torch.tensor([[0, 2, 2], [1, 0, 3]]), 4), torch.randn(2, 1, 2, 3, 5).double(), transposed=True)
    state = TensorNormal().init(Frame(1, (4, 5), frozenset({0}), torch.float64, torch.device("cpu")))
    TensorNormal().update(state, evidence, NEW)
    J = evidence.rows()[:, 0]
    assert oracles.relative_error(state["factor_0"][0], torch.einsum("nij,nij->i", J, J)) < 1e-13
    assert oracles.relative_error(state["factor_1"][0], torch.einsum("nij,nik->jk", J, J)) < 1e-13


LOSSES: dict[str, Callable[[], Case]] = {
    "mlp": models.mlp,
    "sum": lambda: models.mlp()._replace(loss=partial(F.cross_entropy, reduction="sum")),
    "gaussian": models.mlp_gaussian,
    "tagger": partial(models.tagger, mix=True),
    "normed": models.normed,
    "convolution": partial(models.convolution, 1, groups=2),
}


@pytest.mark.parametrize("name", LOSSES)
def test_sampled_gradient_is_the_fisher_on_average(name: str) -> None:
    """E G G^T = F, no factor of the batch size missing: every entry within 5 sigma, and the trace within 15 %."""
    case, found = LOSSES[name](), []
    C = ggn(LOSSES[name]())
    for seed in range(80):
        maker = custom(case, SampledGradient(samples=60), Dense(granularity="full"), Cholesky(damping=1.0), seed=seed)
        step(maker, case)
        found.append(maker.plan.blocks[0].state["matrix"][0])
    where = torch.cat([site_order(case.model, s) for s in maker.plan.blocks[0].sites])
    all_of = torch.stack(found)
    error = all_of.mean(0) - oracles.reorder(C, where)
    deviation = all_of.std(0) / len(found) ** 0.5
    assert float((error.abs() / (deviation + 1e-9 * C.abs().max())).max()) < 5
    assert abs(float(all_of.mean(0).trace() / C.trace()) - 1) < 0.15


def test_sampled_gradient_leaves_everything_else() -> None:
    """``.grad`` and the global random numbers; and the same draw for the same seed and step."""
    case = models.mlp()
    state = torch.get_rng_state()
    found = []
    for seed in (0, 0, 1):
        maker = custom(case, SampledGradient(), Dense(granularity="layer"), Cholesky(damping=1e12), seed=seed)
        assert oracles.relative_error(step(maker, case) * 1e12, raw(case)) < 1e-9
        found.append(maker.plan.blocks[0].state["matrix"].clone())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    unknown = case._replace(loss=lambda y, t: y.square().mean())
    with pytest.raises(ValueError, match="SampledGradient needs the likelihood"):
        step(custom(unknown, SampledGradient(), Dense(), Cholesky(), self_check="error"), unknown)


def test_tnt_direction() -> None:
    """The balanced factors, each damped, inverted densely; by the history of its own statistic."""
    case = models.mlp()
    maker = make_of("tnt", case, damping=0.05, decay=0.8, **EVERY_STEP)
    for k in range(3):
        found = step(maker, case._replace(t=case.t.roll(k)))
    g = raw(case._replace(t=case.t.roll(2)))
    for block in maker.plan.blocks:
        where, H = site_order(case.model, block.sites[0]), block.triple.representation.factors(block.state)
        damped = [torch.linalg.inv(F[0] + 0.05 * torch.eye(F.shape[-1], dtype=F.dtype)) for F in H]
        assert oracles.relative_error(found[where], oracles.kron(*damped) @ g[where]) < 1e-10
    assert maker.verify().passed


# --- natural gradients of layers and diagonals --------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [models.mlp, partial(models.convolution, 1), models.normed, models.embedding_mean])
def test_layer_and_diagonal_natural_gradients(make: Callable[[], Case]) -> None:
    case, C = make(), ggn(make())
    of_layers = make_of("layer_ng", case, fisher=EXACT, damping=0.05)
    found = step(of_layers, case)
    for block in of_layers.plan.blocks:
        for site in block.sites:
            where = site_order(case.model, site)
            expected = oracles.tikhonov_solve(oracles.reorder(C, where), 0.05, raw(case)[where])
            assert oracles.relative_error(found[where], expected) < 1e-10
    found = step(make_of("diag_ng", case, fisher=EXACT, damping=0.05), case)
    assert oracles.relative_error(found, raw(case) / (C.diagonal() + 0.05)) < 1e-10


def test_layer_natural_gradient_of_one_layer_is_the_full_one() -> None:
    case = models.linear()
    found = [step(make_of(m, case, fisher=EXACT), case) for m in ("layer_ng", "full_ng", "diag_ng")]
    assert oracles.relative_error(*found[:2]) < 1e-11 and oracles.relative_error(found[2], found[1]) > 1e-2


# --- the KL clip --------------------------------------------------------------------------------------------------------------
CLIPPED = ("kfac", "kflr", "ekfac", "skfac", "kfra")


@pytest.mark.parametrize("method", CLIPPED)
def test_clip_shortens_the_whole_step(method: str) -> None:
    """nu = min(1, sqrt(kappa / (eta^2 sum g.Pg))): one factor for the model, none where the step is short enough."""
    case = models.mlp()
    free = step(make_of(method, case), case)
    product = float(free @ raw(case))
    for kappa in (1e-3 * product, 0.24 * product, 0.26 * product, product):
        maker = make_of(method, case, clip=kappa, clip_learning_rate=0.5)
        nu = min(1.0, (kappa / (0.25 * product)) ** 0.5)
        assert oracles.relative_error(step(maker, case), nu * free) < 1e-12
        assert (nu < 1) == (kappa < 0.25 * product)
    maker.clip_learning_rate = 50.0  # a schedule
    assert oracles.relative_error(step(make_and_set(method, case, product, 50.0), case), free / 50) < 1e-12


def make_and_set(method: str, case: Case, kappa: float, rate: float) -> Any:
    maker = make_of(method, case, clip=kappa, clip_learning_rate=0.5)
    maker.clip_learning_rate = rate
    return maker


def test_clip_bounds_the_divergence() -> None:
    """The quadratic of the dense Fisher, which K-FAC only approximates, within half an order of kappa."""
    case = models.mlp()
    maker = make_of("kfac", case, fisher=EXACT, clip=1e-4, clip_learning_rate=0.3, damping=1e-4)
    d = 0.3 * step(maker, case)
    assert float(d @ ggn(models.mlp()) @ d) < 3e-4


def test_clip_leaves_plain_gradients() -> None:
    case = models.bare_scale()
    plain = torch.autograd.grad(case.run(), case.model.get_parameter("scale"))[0]
    free = step(make_of("kfac", case), case)
    clipped = step(make_of("kfac", case, clip=1e-9, clip_learning_rate=1.0), case)
    where = oracles.parameter_slices(case.model)["scale"]
    assert torch.equal(clipped[where], plain.reshape(-1)) and oracles.relative_error(clipped, free) > 0.1


def test_clip_before_the_start_and_of_a_zero_gradient() -> None:
    case = models.mlp()
    maker = make_of("kfac", case, clip=1e-12, clip_learning_rate=1.0, start_step=1)
    assert oracles.relative_error(step(maker, case), raw(case)) < 1e-14
    assert float(step(maker, case).norm()) < 1e-3 * float(raw(case).norm())
    zero = case._replace(loss=lambda y, t: 0.0 * F.cross_entropy(y, t))
    assert torch.equal(
        step(make_of("kfac", zero, clip=1e-3, clip_learning_rate=1.0), zero), torch.zeros(53).double()[: len(raw(case))]
    )


@pytest.mark.parametrize("options", [{"clip": 1e-3}, {"clip_learning_rate": 0.1}, {"clip": 0.0, "clip_learning_rate": 0.1}])
def test_clip_illegal_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="clip"):
        make_of("kfac", models.mlp(), **options)


# --- all ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [*CLIPPED, "tnt", "layer_ng", "diag_ng"])
def test_resume_is_bitwise_at_any_step(method: str) -> None:
    options: dict[str, Any] = {"preconditioner_interval": 3, "curvature_interval": 2, "warmup_steps": 2}
    for at in (1, 2, 3, 5):
        case = models.mlp()
        maker, second = make_of(method, case, **options), make_of(method, case, **options)
        for k in range(at):
            step(maker, case._replace(t=case.t.roll(k)))
        second.load_state_dict(maker.state_dict())
        for k in range(at, at + 4):
            now = case._replace(t=case.t.roll(k))
            assert torch.equal(step(maker, now), step(second, now)), (at, k)
