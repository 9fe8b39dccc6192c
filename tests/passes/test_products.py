"""Products with the Hessian and the Gauss-Newton matrix: dense oracles, differences, randomness, buffers, micro-batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS, from_config
from gradmaker.curvature import GaussNewton, Hessian
from gradmaker.methods.custom import CustomGradientConfig
from gradmaker.passes.graph import Graph
from gradmaker.reports.spectrum import eigenpairs, fvp, ggnvp, hvp, ntk_vp
from gradmaker.representations import Implicit
from gradmaker.solvers import CG, Krylov
from tests import models, oracles
from tests.models import CLASSES, ZOO, Case

ODD = ("weight_norm", "structured", "checkpoint_reentrant")  # torch: a wrong double backward; no tensor; no autograd.grad
NAMES = [name for name in ZOO if not name.startswith(ODD) and not name.startswith(("conv1d", "conv3d", "conv_transpose3d"))]
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def vectors(case: Case, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    size = len(oracles.parameter_vector(case.model))
    return [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(count)]


def loss_of(case: Case) -> Callable[[Tensor], Tensor]:
    return lambda y: case.loss(y, case.t)


def dense(case: Case, matrix: str) -> Tensor:
    make = oracles.hessian if matrix == "hessian" else oracles.loss_ggn
    return make(case.model, case.x, loss_of(case))


def step(maker: Any, case: Case) -> Tensor:
    case.model.zero_grad(set_to_none=True)
    y = maker.setup_model_call(case.model, case.x)
    maker.setup_loss_call(case.loss, y, case.t)
    maker.forward_and_backward()
    return oracles.gradient_vector(case.model)


def solved(case: Case, curvature: Any, damping: float) -> Tensor:
    solver = CG(damping=damping, iterations=2000, tolerance=1e-13)
    config = CustomGradientConfig(curvature=curvature, representation=Implicit(), solver=solver)
    return step(METHODS["custom"](case.model, config), case)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_products_are_dense_products(name: str, matrix: str) -> None:
    case = ZOO[name]()
    C = dense(case, matrix)
    multiply = hvp if matrix == "hessian" else ggnvp
    assert oracles.relative_error(C, C.mT) < 1e-12
    for v in vectors(case):
        assert oracles.relative_error(multiply(case.model, case.run, v), C @ v) < 1e-12


@pytest.mark.parametrize("name", ["mlp", "tagger_last", "layer_norm", "batch_norm", "attention", "tied", "unused", "frozen"])
def test_matrix_free_solve_is_the_dense_solve(name: str) -> None:
    """Of the vector that a maker makes of all layers, whatever their order and form."""
    case = ZOO[name]()
    G = dense(case, "ggn")
    g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(case.run(), trainable(case), materialize_grads=True)])
    assert oracles.relative_error(solved(ZOO[name](), GaussNewton(), 0.1), oracles.tikhonov_solve(G, 0.1, g)) < 1e-9


def trainable(case: Case) -> list[nn.Parameter]:
    return [p for p in case.model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    "name", ["mlp", "mlp_gaussian", "layer_norm", "batch_norm", "conv2d_plain", "embedding_mean", "attention"]
)
def test_modes_agree_and_are_symmetric(name: str) -> None:
    """Property 33."""
    case = ZOO[name]()
    u, v = vectors(case)
    found = {mode: hvp(case.model, case.run, v, mode) for mode in ("reverse", "forward", "difference")}
    assert oracles.relative_error(found["forward"], found["reverse"]) < 1e-12
    assert oracles.relative_error(found["difference"], found["reverse"]) < 1e-6
    for multiply in (hvp, ggnvp):
        left, right = u @ multiply(case.model, case.run, v), v @ multiply(case.model, case.run, u)
        assert float((left - right).abs()) < 1e-12 * float(u.norm() * v.norm())


def test_gauss_newton_is_the_hessian_where_the_model_is_linear() -> None:
    """Property 4."""
    linear, relu = models.linear(), models.mlp_relu()
    assert oracles.relative_error(dense(linear, "ggn"), dense(linear, "hessian")) < 1e-9
    for v in vectors(linear):
        assert oracles.relative_error(ggnvp(*args(linear), v), hvp(*args(linear), v)) < 1e-9
    for where in (slice(0, 30), slice(30, 51)):  # one layer of a piecewise linear network
        for v in vectors(relu):
            alone = torch.zeros_like(v)
            alone[where] = v[where]
            found = [multiply(*args(relu), alone)[where] for multiply in (hvp, ggnvp)]
            assert oracles.relative_error(*found) < 1e-9
    assert oracles.relative_error(dense(relu, "ggn"), dense(relu, "hessian")) > 1e-2


def args(case: Case) -> tuple[nn.Module, Callable[[], Tensor]]:
    return case.model, case.run


# --- every loss that is recognised ----------------------------------------------------------------------------------------
def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


WHICH, HOLED = torch.tensor([0, 2, 1, 1, 0, 2]), torch.tensor([0, -100, 1, 1, -100, 2])
WEIGHT, SOFT, REAL = numbers(CLASSES) + 0.5, numbers(6, CLASSES, seed=1), numbers(6, CLASSES, seed=2)
RECOGNISED: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda z: F.cross_entropy(z, WHICH),
    "cross_entropy_sum": lambda z: F.cross_entropy(z, WHICH, reduction="sum"),
    "cross_entropy_none": lambda z: (F.cross_entropy(z, WHICH, reduction="none") * REAL[:, 0]).sum(),
    "weights_smoothing_holes": lambda z: F.cross_entropy(z, HOLED, WEIGHT, label_smoothing=0.1),
    "soft": lambda z: F.cross_entropy(z, SOFT, WEIGHT, label_smoothing=0.2),
    "nll": lambda z: F.nll_loss(z.log_softmax(-1), WHICH),
    "nll_weights_holes": lambda z: nn.NLLLoss(WEIGHT)(F.log_softmax(z, -1), HOLED),
    "mse": lambda z: F.mse_loss(z, REAL),
    "mse_sum": lambda z: F.mse_loss(z, REAL, reduction="sum"),
    "mse_weights": lambda z: F.mse_loss(z, REAL, weight=SOFT),
    "bernoulli": lambda z: F.binary_cross_entropy_with_logits(z, REAL),
    "bernoulli_weights": lambda z: F.binary_cross_entropy_with_logits(z, REAL, SOFT, pos_weight=WEIGHT, reduction="sum"),
    "two_on_the_same_logits": lambda z: 0.5 * F.cross_entropy(z, WHICH) + 0.3 * F.mse_loss(z, REAL),
    "one_on_a_function_of_the_other's": lambda z: F.nll_loss(z.log_softmax(-1), WHICH) + 0.3 * F.mse_loss(z, REAL),
    "parts": lambda z: F.cross_entropy(z[:, :2], WHICH % 2) + F.binary_cross_entropy_with_logits(z[:, 2:], REAL[:, 2:]),
}


@pytest.mark.parametrize("name", RECOGNISED)
def test_every_recognised_loss(name: str) -> None:
    """Products and the exact Fisher matrix; and the maker's products, several at once and one by one."""
    loss, case = RECOGNISED[name], models.mlp()
    G = oracles.loss_ggn(case.model, case.x, loss)
    for v in vectors(case):
        for multiply in (ggnvp, fvp):
            assert oracles.relative_error(multiply(case.model, lambda: loss(case.model(case.x)), v), G @ v) < 1e-12
    g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(loss(case.model(case.x)), trainable(case))])
    changed = case._replace(loss=lambda y, t: loss(y))
    assert oracles.relative_error(solved(changed, GaussNewton(), 0.1), oracles.tikhonov_solve(G, 0.1, g)) < 1e-9
    newton = from_config(case.model, {"method": "newton", "curvature": "GaussNewton", "damping": 0.1})
    assert oracles.relative_error(step(newton, changed), oracles.tikhonov_solve(G, 0.1, g)) < 1e-9


def test_what_is_added_to_a_recognised_loss() -> None:
    """Its curvature counts where the logits are named, of which then all of the loss is a function."""
    case = models.mlp()
    whole = case._replace(loss=lambda y, t: F.cross_entropy(y, t) + 0.05 * y.logsumexp(-1).square().sum())
    (v,) = vectors(case, 1)
    assert oracles.relative_error(ggnvp(*args(whole), v), dense(case, "ggn") @ v) < 1e-12
    found = []
    for named in (False, True):
        maker: Any = from_config(case.model, {"method": "newton", "curvature": "GaussNewton", "damping": 0.1})
        y = maker.setup_model_call(case.model, case.x)
        maker.setup_loss_call(whole.loss, y, case.t)
        if named:
            maker.setup_logits_repr(y)
        case.model.zero_grad(set_to_none=True)
        maker.forward_and_backward()
        found.append(oracles.gradient_vector(case.model))
    g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(whole.run(), trainable(whole))])
    for direction, G in zip(found, (dense(case, "ggn"), dense(whole, "ggn")), strict=True):
        s, Q = torch.linalg.eigh(G)
        assert oracles.relative_error(direction, (Q / (s.abs() + 0.1)) @ Q.mT @ g) < 1e-9


# --- any convex loss ------------------------------------------------------------------------------------------------------
def test_logits_that_the_loss_does_not_see() -> None:
    case = models.mlp()
    maker: Any = from_config(case.model, {"method": "curveball"})
    y = maker.setup_model_call(case.model, case.x)
    maker.setup_loss_call(case.loss, y, case.t)
    maker.setup_logits_repr(y.softmax(-1))
    with pytest.raises(ValueError, match="does not depend on what setup_logits_repr names"):
        maker.forward_and_backward()


def test_any_convex_loss() -> None:
    case = models.mlp_gaussian()
    huber = Case(case.model, case.x, case.t, lambda y, t: F.huber_loss(y, t, delta=0.4))
    G = dense(huber, "ggn")
    for v in vectors(huber):
        found = ggnvp(case.model, partial(F.huber_loss, target=case.t, delta=0.4), v, outputs=lambda: case.model(case.x))
        assert oracles.relative_error(found, G @ v) < 1e-12
    maker = METHODS["custom"](
        case.model,
        CustomGradientConfig(curvature=GaussNewton(), representation=Implicit(), solver=CG(damping=0.1), self_check="error"),
    )
    y = maker.setup_model_call(case.model, case.x)
    maker.setup_loss_call(huber.loss, y, case.t)
    with pytest.raises(ValueError, match="setup_logits_repr"):
        maker.forward_and_backward()
    y = maker.setup_model_call(case.model, case.x)
    maker.setup_loss_call(huber.loss, y, case.t)
    maker.setup_logits_repr(y)
    case.model.zero_grad(set_to_none=True)
    maker.forward_and_backward()
    g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(huber.run(), trainable(huber))])
    assert oracles.relative_error(oracles.gradient_vector(case.model), oracles.tikhonov_solve(G, 0.1, g)) < 1e-8


# --- random numbers and buffers -------------------------------------------------------------------------------------------
def noisy() -> Case:
    make = lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, CLASSES))  # noqa: E731
    return models.build(make, 8, 4)


MATRIX_FREE = ("hessian_free", "ksd", "saddle_free", "lissa", "neumann", "curveball")


@pytest.mark.parametrize("method", [*MATRIX_FREE, "newton"])
def test_random_state_and_statistics_are_as_after_one_pass(method: str) -> None:
    case, plain = noisy(), noisy()
    maker = from_config(case.model, {"method": method})
    for k in range(7):
        torch.manual_seed(k)
        step(maker, case)
        after = torch.get_rng_state()
        torch.manual_seed(k)
        plain.run()
        assert torch.equal(after, torch.get_rng_state())
        for (key, mine), its in zip(case.model.named_buffers(), plain.model.buffers(), strict=True):
            assert torch.equal(mine, its), key


def test_dropout_masks_are_those_of_the_gradient() -> None:
    """Backwards twice uses the masks of the pass; the other modes have to draw them again."""
    case = noisy()
    found = []
    for mode in ("reverse", "forward", "difference"):
        twin = copy.deepcopy(case.model)
        torch.manual_seed(11)
        maker = METHODS["custom"](
            twin,
            CustomGradientConfig(
                curvature=Hessian(mode=mode), representation=Implicit(), solver=Krylov(damping=0.1, dimension=6)
            ),  # type: ignore[arg-type]
        )
        found.append(step(maker, case._replace(model=twin)))
    assert oracles.relative_error(found[1], found[0]) < 1e-9
    assert oracles.relative_error(found[2], found[0]) < 1e-6


@pytest.mark.parametrize("mode", ["reverse", "forward", "difference"])
def test_matrices_are_formed_with_the_masks_of_the_gradient(mode: str) -> None:
    """Many products at once: dropout draws one mask for all of them, and statistics of the batch stay those of the pass."""
    case = noisy()
    torch.manual_seed(11)
    loss = case.run()
    parameters = trainable(case)
    g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = [torch.autograd.grad(x, parameters, retain_graph=True) for x in g]
    s, Q = torch.linalg.eigh(torch.stack([torch.cat([p.reshape(-1) for p in row]) for row in rows]))
    fresh = noisy()
    maker = from_config(fresh.model, {"method": "newton", "curvature": {"Hessian": {"mode": mode}}, "damping": 0.1})
    torch.manual_seed(11)
    expected = (Q / (s.abs() + 0.1)) @ Q.mT @ g.detach()
    assert oracles.relative_error(step(maker, fresh), expected) < (1e-6 if mode == "difference" else 1e-9)
    for mine, its in zip(fresh.model.buffers(), case.model.buffers(), strict=True):
        assert torch.equal(mine, its)


# --- micro-batches --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [*MATRIX_FREE, "newton"])
def test_micro_batches_add_up(method: str) -> None:
    """Products and losses of both halves, each with its own batch, are those of the whole."""
    whole, halves = models.mlp(), models.mlp()
    one, two = (from_config(case.model, {"method": method}) for case in (whole, halves))
    for _ in range(6):
        g = step(one, whole)
        halves.model.zero_grad(set_to_none=True)
        for rows, weight in ((slice(0, 2), 1 / 3), (slice(2, 6), 2 / 3)):
            y = two.setup_model_call(halves.model, halves.x[rows])
            two.setup_loss_call(F.cross_entropy, y, halves.t[rows])
            two.accumulate(weight)
        two.precondition()
        assert oracles.relative_error(oracles.gradient_vector(halves.model), g) < 1e-8
        with torch.no_grad():
            for case in (whole, halves):
                for p in case.model.parameters():
                    p -= 0.5 * p.grad  # type: ignore[operator]


class OneSided(nn.Module):
    """A constant beside the mean of squares: as the target, as the input, by name, weighted, or broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x).tanh()
        t = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).reshape(z.shape)
        named = F.mse_loss(reduction="mean", target=z, input=t) + nn.MSELoss()(z, t)
        return named + F.mse_loss(z[:1].expand_as(t), t, weight=t.square()) + F.mse_loss(z, t, reduction="sum")


def test_means_of_squares_forwards() -> None:
    """Torch's own forward derivative of them fails where one side is a constant."""
    torch.manual_seed(0)
    model, x = OneSided().double(), torch.randn(5, 4, dtype=torch.float64)
    v = torch.randn(15, dtype=torch.float64)
    found = [hvp(model, lambda: model(x), v, mode) for mode in ("reverse", "forward")]
    assert oracles.relative_error(found[1], found[0]) < 1e-12
    case = models.mlp_gaussian()
    makers = [from_config(case.model, {"method": "newton", "curvature": Hessian(mode=m)}) for m in ("reverse", "forward")]
    backwards, forwards = (step(maker, case) for maker in makers)
    assert oracles.relative_error(forwards, backwards) < 1e-9


# --- what has no second derivative ----------------------------------------------------------------------------------------
class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).unflatten(-1, (2, 4)).transpose(1, 2)
        h = F.scaled_dot_product_attention(h, h, h).transpose(1, 2).flatten(2)
        y: Tensor = self.head(h.mean(1))
        return y


def test_forward_mode_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    case = models.mlp()
    (v,) = vectors(case, 1)
    exact = hvp(*args(case), v)

    def fail(*_: Any) -> None:
        raise NotImplementedError("derivative for aten::some_backward is not implemented")

    monkeypatch.setattr(Graph, "hessian", fail)
    assert oracles.relative_error(hvp(*args(case), v), exact) < 1e-12

    def break_down(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Graph, "hessian", break_down)  # nothing but a missing derivative is a reason
    with pytest.raises(RuntimeError, match="out of memory"):
        hvp(*args(case), v)


def test_fused_attention_says_what_to_do() -> None:
    case = models.build(Fused, 3, 5, 4)
    (v,) = vectors(case, 1)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = hvp(case.model, case.run, v)
    calls: list[Callable[[], Any]] = [
        *(partial(multiply, case.model, case.run, v) for multiply in (hvp, ggnvp, fvp)),
        lambda: ntk_vp(case.model, lambda: case.model(case.x), torch.ones(3, CLASSES)),
        lambda: eigenpairs(case.model, case.run),
        *(lambda m=method: step(from_config(case.model, {"method": m}), case) for method in (*MATRIX_FREE, *PROBES)),
    ]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        for call in calls:
            with pytest.raises(RuntimeError, match=r"SDPBackend\.MATH"):
                call()
        assert oracles.relative_error(hvp(case.model, case.run, v, "difference"), exact) < 1e-6
        for method in PROBES:
            step(from_config(case.model, {"method": method, "mode": "difference"}), case)


PROBES = ("psgd", "psgd_kf", "adahessian", "esgd", "saddle_free_diagonal")


class Once(torch.autograd.Function):
    """A square whose backward pass is nothing that torch could differentiate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Squares(nn.Module):
    def __init__(self, square: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.head, self.square = nn.Linear(4, 5), nn.Linear(5, CLASSES), square

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.square(self.first(x)))
        return y


def test_what_is_differentiable_once_is_not_taken_for_a_constant() -> None:
    """Torch itself leaves such a term out of a second derivative, without a word."""
    case, plain = (models.build(partial(Squares, square), 6, 4) for square in (Once.apply, torch.square))
    (v,) = vectors(case, 1)
    calls: list[Callable[[], Any]] = [
        *(partial(multiply, case.model, case.run, v) for multiply in (hvp, ggnvp, fvp)),
        partial(hvp, case.model, case.run, v, "forward"),
        lambda: ntk_vp(case.model, lambda: case.model(case.x), torch.ones(6, CLASSES)),
        lambda: step(from_config(case.model, {"method": "newton"}), case),
        lambda: step(from_config(case.model, {"method": "hessian_free"}), case),
        lambda: step(from_config(case.model, {"method": "adahessian"}), case),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="needs second derivatives"):
            call()
    expected = oracles.hessian(plain.model, plain.x, loss_of(plain))
    assert oracles.relative_error(hvp(case.model, case.run, v, "difference"), expected @ v) < 1e-6


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by the compiler, of what it traces
def test_compiled_models() -> None:
    """Torch differentiates their backward pass in no way, but forwards what is before it."""
    case = models.mlp()
    compiled = torch.compile(case.model, backend="aot_eager")
    run, (v,) = (lambda: F.cross_entropy(compiled(case.x), case.t)), vectors(case, 1)
    assert oracles.relative_error(hvp(case.model, run, v), dense(case, "hessian") @ v) < 1e-12
    with pytest.raises(RuntimeError, match=r"Gauss-Newton product needs second derivatives.*before torch\.compile"):
        ggnvp(case.model, run, v)
