"""Length and momentum of a step by the exact Fisher matrix of the batch, against dense solves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS
from gradmaker.loss.likelihood import read_terms
from gradmaker.loss.recorder import LossRecorder
from gradmaker.trust_region.rescaling import minimise
from tests import models, oracles
from tests.models import Case
from tests.trust_region.test_kfac_damping import EVERY_STEP, move, network, passes

FAMILY = ["kfac", "kflr", "kfra", "ekfac", "skfac"]


def maker_of(case: Case, method: str = "kflr", **options: Any) -> Any:
    return METHODS[method](case.model, METHODS[method].Config(**{"damping": 0.05, **EVERY_STEP, **options}))


def dense(case: Case) -> tuple[Tensor, Tensor]:
    """Gradient and Gauss-Newton matrix of the batch."""
    g = torch.cat([v.reshape(-1) for v in torch.autograd.grad(case.run(), [*case.model.parameters()])])
    return g, oracles.loss_ggn(case.model, case.x, lambda z: case.loss(z, case.t))


def best(directions: list[Tensor], g: Tensor, C: Tensor) -> Tensor:
    """The step of the least g^T d + d^T C d / 2 in a span."""
    V = torch.stack(directions, 1)
    w = torch.linalg.solve(V.mT @ C @ V, -(V.mT @ g))
    step: Tensor = V @ w
    return step


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("rescale", ["length", "momentum"])
@pytest.mark.parametrize("method", FAMILY)
def test_every_step_is_the_best_of_its_span(rescale: str, method: str) -> None:
    case, twin = network(), network()
    maker, plain = maker_of(case, method, rescale=rescale), maker_of(twin, method)
    last: Tensor | None = None
    for k in range(6):
        passes(maker, case)
        passes(plain, twin)
        found, proposed = -oracles.gradient_vector(case.model), -oracles.gradient_vector(twin.model)
        g, G = dense(case)
        span = [proposed] if last is None or rescale == "length" else [proposed, last]
        assert oracles.relative_error(found, best(span, g, G + 0.05 * torch.eye(len(g)))) < 1e-9, k
        assert (
            (k == 0)
            or rescale == "length"
            or oracles.relative_error(found, best(span[:1], g, G + 0.05 * torch.eye(len(g)))) > 1e-3
        )
        last = found
        move(case, 1.0)
        twin.model.load_state_dict(case.model.state_dict())
    assert case.run().item() < 0.5 * network().run().item()


@pytest.mark.usefixtures("double")
def test_micro_batches_and_an_adapted_damping() -> None:
    """The model is that of the whole batch, with the damping of now."""
    case, twin = network(), network()
    options: dict[str, Any] = {"rescale": "momentum", "adaptive_damping": {"AdaptiveDamping": {"interval": 1}}}
    maker, whole = maker_of(case, **options), maker_of(twin, **options)
    seen = set()
    for _ in range(5):
        case.model.zero_grad(set_to_none=True)
        for rows in (slice(0, 5), slice(5, 12)):
            y = maker.setup_model_call(case.model, case.x[rows])
            maker.setup_loss_call(case.loss, y, case.t[rows])
            maker.accumulate((rows.stop - rows.start) / 12)
        maker.precondition()
        passes(whole, twin)
        g, G = dense(twin)
        d = -oracles.gradient_vector(twin.model)
        slope = (g + (G + whole.damping * torch.eye(len(g))) @ d) @ d
        assert abs(float(slope)) < 1e-9 * abs(float(g @ d))  # at a minimum along itself
        assert oracles.relative_error(oracles.gradient_vector(case.model), -d) < 1e-9
        for c in (case, twin):
            move(c, 1.0)
        seen.add(whole.damping)
    assert len(seen) > 2


def test_plain_gradients_keep_their_length() -> None:
    case = models.bare_scale()
    maker = maker_of(case, "kfac", rescale="momentum")
    raw = dict(
        zip(dict(case.model.named_parameters()), torch.autograd.grad(case.run(), [*case.model.parameters()]), strict=True)
    )
    passes(maker, case)
    assert set(maker.plan.plain) == {"scale"}
    assert torch.equal(case.model.get_parameter("scale").grad, raw["scale"])  # type: ignore[arg-type]


def test_without_a_gradient_nothing_happens() -> None:
    """A zero proposal, twice: no division by its length."""
    case = network()
    case = case._replace(loss=lambda y, t: 0 * F.cross_entropy(y, t))
    maker = maker_of(case, "kfac", rescale="momentum")
    for _ in range(2):
        passes(maker, case)
        assert not oracles.gradient_vector(case.model).any()


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("k", [1, 2])
def test_small_systems(k: int) -> None:
    X = torch.randn(4, k)
    A, b = X.mT @ X, torch.randn(k)
    assert oracles.relative_error(minimise(b, A), -torch.linalg.solve(A, b)) < 1e-12
    scaled = torch.diag(torch.tensor([1e-9, 1e6][:k]))  # a short and a long direction
    assert (
        oracles.relative_error(minimise(scaled @ b, scaled @ A @ scaled), -torch.linalg.solve(A, b) / scaled.diagonal()) < 1e-10
    )
    if k == 2:
        parallel = torch.tensor([[4.0, 2.0], [2.0, 1.0]])
        assert torch.equal(minimise(torch.tensor([-2.0, -1.0]), parallel), torch.tensor([0.5, 0.0]))
        assert torch.equal(minimise(torch.tensor([-2.0, 0.0]), torch.diag(torch.tensor([4.0, 0.0]))), torch.tensor([0.5, 0.0]))
    for broken in (torch.zeros(k, k), torch.full((k, k), torch.nan)):
        assert torch.equal(minimise(b, broken), torch.eye(k)[0])


# --- inner products of displaced outputs ----------------------------------------------------------------------------------
LOSSES: dict[str, tuple[Any, Any]] = {
    "categorical": (F.cross_entropy, torch.tensor([0, 2, -100, 1])),
    "gaussian": (F.mse_loss, torch.rand(4, 3, dtype=torch.float64)),
    "bernoulli": (F.binary_cross_entropy_with_logits, torch.rand(4, 3, dtype=torch.float64)),
    "weighted": (
        lambda y, t: F.cross_entropy(y, t, weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), reduction="sum"),
        torch.tensor([0, 2, 1, 1]),
    ),
}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", LOSSES)
def test_inner_products_are_those_of_the_hessian(name: str) -> None:
    loss, t = LOSSES[name]
    z = torch.randn(4, 3, requires_grad=True)
    u, v = torch.randn(4, 3), torch.randn(4, 3)
    with LossRecorder() as recorder:
        value = loss(z, t)
    (terms,) = read_terms(recorder, value)
    H = torch.func.hessian(lambda y: loss(y, t))(z.detach()).reshape(12, 12)
    assert oracles.relative_error(terms.inner(u, v), u.reshape(-1) @ H @ v.reshape(-1)) < 1e-12
    columns = torch.cat([c.reshape(len(c), 4, 3) for c in terms.exact(4)])
    assert oracles.relative_error(terms.inner(u, v), sum((c * u).sum(1) @ (c * v).sum(1) for c in columns)) < 1e-12
    if name == "categorical":  # a row that does not count may hold anything
        broken = u.clone()
        broken[2] = torch.nan
        assert torch.equal(terms.inner(broken, v), terms.inner(u, v))


# --- what is refused ------------------------------------------------------------------------------------------------------
def test_refusals() -> None:
    case = network()
    with pytest.raises(ValueError, match=r"rescale='both': expected none, length, momentum"):
        maker_of(case, rescale="both")
    with pytest.raises(ValueError, match=r"clip=0.1, rescale='length': both choose the length"):
        maker_of(case, rescale="length", clip=0.1, clip_learning_rate=1.0)
    with pytest.raises(ValueError, match=r"attach: .*rescale have to repeat the loss"):
        maker_of(case, rescale="length").attach(torch.optim.SGD(case.model.parameters(), 1.0), "categorical")
    with pytest.raises(ValueError, match="the quadratic model needs the Fisher matrix"):
        passes(maker_of(case, "kfac", rescale="length", fisher="FisherEmp"), case._replace(loss=lambda y, t: y.square().mean()))


def test_a_step_under_way_cannot_be_resumed() -> None:
    """Its batches are gone: an unscaled step would be taken in silence."""
    case, twin = network(), network()
    maker, second = (maker_of(c, rescale="momentum") for c in (case, twin))
    passes(maker, case)
    move(case, 1.0)
    y = maker.setup_model_call(case.model, case.x)
    maker.setup_loss_call(case.loss, y, case.t)
    maker.accumulate(0.5)
    state = maker.state_dict()
    second.load_state_dict(state)
    second.setup_loss_call(twin.loss, second.setup_model_call(twin.model, twin.x), twin.t)
    second.accumulate(0.5)
    with pytest.raises(RuntimeError, match="save between steps"):
        second.precondition()
    other: Any = METHODS["kflr"](nn.Sequential(nn.Linear(4, 3)), METHODS["kflr"].Config(rescale="momentum"))
    with pytest.raises(ValueError, match=r"last_step: .*0.weight.* are no parameters of this model, or of another shape"):
        other.load_state_dict(state)
