"""Losses that are not the sum of recognised ones: the whole loss' curvature at its outputs, against dense oracles."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradmaker as gm
from gradmaker.curvature import Categorical, FisherEmp, FisherExact, FisherMC, GaussNewton, SampledGradient
from gradmaker.errors import SelfCheckError, SelfCheckWarning
from gradmaker.representations import Dense, Implicit, Kron
from gradmaker.solvers import CG
from tests import oracles
from tests.measure import compare, custom, measure, setup
from tests.models import CLASSES, Case, build, mlp, tagger

pytestmark = pytest.mark.usefixtures("double")

N = 6


def target(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


q = target(N, CLASSES).softmax(1)
r, counts, two = target(N, CLASSES), target(N, CLASSES).exp(), target(N, 2)
near = (mlp().model(mlp().x).detach() + 0.1 * r).log_softmax(1)  # a divergence from it is convex here


def focal(z: Tensor, t: Tensor) -> Tensor:
    each = F.cross_entropy(z, t, reduction="none")
    return ((1 - torch.exp(-each)) ** 1.5 * each).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "focal": focal,
    "exponential": lambda z, t: F.cross_entropy(z, t).exp(),
    "penalty of logits": lambda z, t: F.cross_entropy(z, t) + 1e-2 * z.square().mean(),
    "penalty of the normaliser": lambda z, t: F.cross_entropy(z, t) + 1e-2 * z.logsumexp(1).square().mean(),
    "smoothed by hand": lambda z, t: -(q * z.log_softmax(1)).sum(1).mean(),
    "labels and a teacher": lambda z, t: F.cross_entropy(z, t) + F.kl_div((z / 2).log_softmax(1), q, reduction="batchmean"),
    "teacher": lambda z, t: F.kl_div(z.log_softmax(1), q, reduction="batchmean"),
    "teacher, reversed": lambda z, t: F.kl_div(near, z.log_softmax(1), reduction="batchmean", log_target=True),
    "power of nll": lambda z, t: F.nll_loss(z.log_softmax(1), t).square(),
    "huber": lambda z, t: F.huber_loss(z, r.to(z.dtype)),
    "poisson": lambda z, t: F.poisson_nll_loss(z, counts),
    "cauchy, near zero": lambda z, t: (0.1 * z).square().log1p().sum(),
    "by hand, bce and its penalty": lambda z, t: (z.exp().log1p() - q * z).mean() + 0.1 * z.pow(4).sum(),
}
SEEN = ("teacher",)  # recognised as they are


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SelfCheckWarning)
        yield


def cased(name: str) -> Case:
    return mlp()._replace(loss=LOSSES[name])


@pytest.mark.parametrize("granularity", ["full", "layer"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_matrix_is_that_of_the_whole_loss(name: str, granularity: Any) -> None:
    case = cased(name)
    G = oracles.loss_ggn(case.model, case.x, lambda z: case.loss(z, case.t))
    compare(measure(case, representation=Dense(granularity=granularity)), G)


@pytest.mark.parametrize("name", ["focal", "penalty of logits", "teacher, reversed", "huber"])
def test_kronecker_factors_are_those_of_the_whole_loss(name: str) -> None:
    case = cased(name)
    maker = measure(case, representation=Kron())
    with torch.no_grad():
        z = case.model(case.x)
    H: Any = torch.func.hessian(lambda z: case.loss(z, case.t))(z)

    def columns(_: Tensor, n: int) -> Tensor:
        s, Q = torch.linalg.eigh(H[n, :, n])
        return (Q * s.clamp(min=0).sqrt()).mT

    for block in maker.plan.blocks:
        for site, slot in zip(block.sites, block.slots, strict=True):
            layer = next(iter(site.parameters)).rpartition(".")[0]
            (pair,) = oracles.kfac_factors(case.model, case.x, layer, columns, 1.0)
            C = block.triple.representation.to_dense({k: v[slot] for k, v in block.state.items()})[0]
            assert oracles.relative_error(C, oracles.kron(pair.A, pair.B)) < 1e-10 or (
                oracles.relative_error(C, oracles.kron(pair.B, pair.A)) < 1e-10
            )


@pytest.mark.parametrize("name", ["focal", "huber", "penalty of logits"])
def test_samples_are_unbiased(name: str) -> None:
    case = cased(name)
    G = oracles.loss_ggn(case.model, case.x, lambda z: case.loss(z, case.t))
    count = 20000
    maker = measure(case, FisherMC(samples=count))
    ((block,),) = [maker.plan.blocks]
    found = block.triple.representation.to_dense(block.state)[0].trace()
    # the trace of a Wishart matrix of rank count has variance 2 |G|^2 / count at most
    assert abs(float(found - G.trace())) < 5 * float(G.norm()) * (2 / count) ** 0.5


def test_one_sampled_gradient_needs_no_likelihood() -> None:
    maker = measure(cased("huber"), SampledGradient(samples=3), Dense(granularity="layer"))
    assert all(bool(block.state["matrix"].any()) for block in maker.plan.blocks)


# ------------------------------------------------------------------ other outputs
class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.a, self.b = nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.trunk(x)
        return {"a": self.a(h), "b": self.b(h)}


def joined(y: dict[str, Tensor]) -> Tensor:
    return torch.cat([y["a"], y["b"]], 1)


@pytest.mark.parametrize("recognised", [True, False])
def test_two_heads(recognised: bool) -> None:
    def loss(z: Tensor, t: Tensor) -> Tensor:
        first = F.cross_entropy(z[:, :3], t) if recognised else F.huber_loss(z[:, :3], r)
        return first + F.smooth_l1_loss(z[:, 3:], two)

    case = build(Two, N, 4)
    G = oracles.loss_ggn(case.model, case.x, lambda z: loss(z, case.t), select=joined)
    own = case._replace(loss=lambda y, t: loss(joined(y), t))
    compare(measure(own), G)


def test_two_heads_that_the_loss_couples_are_refused() -> None:
    case = build(Two, N, 4, loss=lambda y, t: (y["a"].sum(1) * y["b"].sum(1)).exp().mean())
    maker = custom(case.model, FisherExact(), Dense(granularity="full"))
    setup(maker, case)
    with pytest.raises(SelfCheckError, match="the loss couples outputs"):
        maker.forward_and_backward()
    assert all(p.grad is None for p in case.model.parameters())


def test_log_probabilities_of_the_model() -> None:
    """The loss is linear in what the model returns; its curvature is that of the log-softmax."""
    case = build(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES), nn.LogSoftmax(1)), N, 4)
    own = case._replace(loss=lambda x, t: -x[torch.arange(N), t].mean())
    G = oracles.loss_ggn(case.model[:3], case.x, lambda z: F.cross_entropy(z, case.t))
    compare(measure(own), G)


def test_examples_that_the_loss_couples_are_one() -> None:
    def loss(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z, t) + (z.mean(0) - 0.2).square().sum()

    case = mlp()._replace(loss=loss)
    compare(measure(case), oracles.loss_ggn(case.model, case.x, lambda z: loss(z, case.t)))


@pytest.mark.parametrize("coupled", [False, True])
def test_positions(coupled: bool) -> None:
    case = tagger("last")

    def loss(z: Tensor, t: Tensor) -> Tensor:
        return (z.flatten(1) if coupled else z).logsumexp(-1).mean() - z[..., 0].mean() + 1e-2 * z.square().sum()

    own = case._replace(loss=loss)
    G = oracles.loss_ggn(case.model, case.x, lambda z: loss(z, case.t))
    compare(measure(own), G)


def test_named_logits_are_what_is_differentiated() -> None:
    case = mlp()
    maker = custom(case.model, FisherExact(), Dense(granularity="full"))
    y = maker.setup_model_call(lambda x: {"wide": torch.cat([z := case.model(x), z], 1), "z": z}, case.x)
    maker.setup_loss_call(lambda y: F.huber_loss(y["wide"], target(N, 2 * CLASSES)), y)
    maker.setup_logits_repr(y["z"])
    maker.forward_and_backward()
    G = oracles.loss_ggn(case.model, case.x, lambda z: F.huber_loss(torch.cat([z, z], 1), target(N, 2 * CLASSES)))
    compare(maker, G)


def divergence(p: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(1).mean()


def test_what_is_convex_in_probabilities_alone() -> None:
    """As the divergence from a teacher: in the logits it is refused, and the probabilities can be named."""
    case = mlp()
    maker = custom(case.model, FisherExact(), Dense(granularity="full"))
    maker.setup_loss_call(lambda y: divergence(y.softmax(1)), maker.setup_model_call(case.model, case.x))
    with pytest.raises(SelfCheckError, match=r"not convex.*setup_logits_repr"):
        maker.forward_and_backward()
    p = maker.setup_model_call(case.model, case.x).softmax(1)
    maker.setup_loss_call(divergence, p)
    maker.setup_logits_repr(p)
    maker.forward_and_backward()
    compare(maker, oracles.loss_ggn(case.model, case.x, divergence, select=lambda y: y.softmax(1)))


def test_a_declared_likelihood_comes_first() -> None:
    case = mlp()
    maker = custom(case.model, FisherExact(), Dense(granularity="full"), likelihood=Categorical())
    y = maker.setup_model_call(case.model, case.x)
    maker.setup_loss_call(lambda y: -(q * y.log_softmax(1)).sum(1).mean() + y.square().mean(), y)
    maker.setup_logits_repr(y)
    maker.forward_and_backward()
    compare(maker, oracles.loss_ggn(case.model, case.x, lambda z: F.cross_entropy(z, case.t)))


# ------------------------------------------------------------------ products
def by_products(case: Case) -> Any:
    config = gm.CustomGradientConfig(curvature=GaussNewton(), representation=Implicit(), solver=CG(damping=0.1))
    maker = gm.CustomGradientMaker(case.model, config)
    setup(maker, case)
    return maker


@pytest.mark.parametrize("name", ["huber", "poisson", "smoothed by hand", "teacher, reversed"])
def test_gauss_newton_products(name: str) -> None:
    case = cased(name)
    G = oracles.loss_ggn(case.model, case.x, lambda z: case.loss(z, case.t))
    parameters = list(case.model.parameters())
    g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(case.run(), parameters)])
    by_products(case).forward_and_backward()
    assert oracles.relative_error(oracles.gradient_vector(case.model), oracles.tikhonov_solve(G, 0.1, g)) < 1e-8


def test_gauss_newton_products_of_two_heads() -> None:
    case = build(Two, N, 4, loss=lambda y, t: F.huber_loss(y["a"], r) + F.smooth_l1_loss(y["b"], two))
    G = oracles.loss_ggn(
        case.model, case.x, lambda z: F.huber_loss(z[:, :3], r) + F.smooth_l1_loss(z[:, 3:], two), select=joined
    )
    g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(case.run(), list(case.model.parameters()))])
    by_products(case).forward_and_backward()
    assert oracles.relative_error(oracles.gradient_vector(case.model), oracles.tikhonov_solve(G, 0.1, g)) < 1e-8


@pytest.mark.parametrize("what", ["not convex", "does not go through the model's outputs"])
def test_products_that_cannot_be_right_are_refused(what: str) -> None:
    case = mlp()
    weight = case.model[0].weight
    loss = {"not convex": lambda z, t: z.cos().sum()}.get(what, lambda z, t: F.huber_loss(z, r) + weight.square().sum())
    with pytest.raises(SelfCheckError, match=f"{what}.*setup_logits_repr"):
        by_products(case._replace(loss=loss)).forward_and_backward()
    assert all(p.grad is None for p in case.model.parameters())


# ------------------------------------------------------------------ what is said, and kept
def test_it_is_said_once_and_shown() -> None:
    case = cased("focal")
    maker = custom(case.model, FisherExact(), Dense(granularity="full"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", SelfCheckWarning)
        for _ in range(3):
            setup(maker, case)
            maker.forward_and_backward()
    assert len(said) == 1 and "Hessian of the whole loss" in str(said[0].message) and "costs" in str(said[0].message)
    assert "Hessian of the whole loss" in str(maker.summary())


def test_later_steps_follow_the_loss() -> None:
    """The weights move, and so does what is measured; the checks are those of the first pass alone."""
    case = cased("exponential")
    maker = measure(case)
    with torch.no_grad():
        for p in case.model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    setup(maker, case)
    maker.forward_and_backward()
    compare(maker, oracles.loss_ggn(case.model, case.x, lambda z: case.loss(z, case.t)))


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_micro_batches(weight: float) -> None:
    case = cased("focal")
    maker = custom(case.model, FisherExact(), Dense(granularity="full"), decay=0.0)
    for part in (slice(0, 3), slice(3, 6)):
        y = maker.setup_model_call(case.model, case.x[part])
        maker.setup_loss_call(lambda y, t: focal(y, t), y, case.t[part])
        maker.accumulate(0.5 if weight == 1.0 else weight)
    maker.precondition()
    G = oracles.loss_ggn(case.model, case.x, lambda z: case.loss(z, case.t))
    compare(maker, G if weight == 1.0 else 2 * weight * G)


def test_a_penalty_of_weights_is_named() -> None:
    case = mlp()
    first = case.model[0].weight
    own = case._replace(loss=lambda z, t: F.cross_entropy(z, t) + 1e-2 * first.square().sum())
    maker = measure(own)
    assert "0.weight without going through its outputs" in maker.summary().notes["outside of the curvature"]
    compare(maker, oracles.loss_ggn(case.model, case.x, lambda z: F.cross_entropy(z, case.t)))
    plain = measure(mlp())
    assert not plain.summary().notes


def test_verify_follows() -> None:
    case = cased("focal")
    maker = custom(case.model, FisherExact(), Dense(granularity="full"))
    setup(maker, case)
    result = maker.verify()
    assert result.passed and "Hessian of the whole loss" in str(result)


ALONE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross entropy": F.cross_entropy,
    "nll": lambda z, t: F.nll_loss(z.log_softmax(1), t),
    "divergence": lambda z, t: F.kl_div(z.log_softmax(1), q.to(z.dtype), reduction="batchmean"),
    "squares": lambda z, t: F.mse_loss(z, r.to(z.dtype)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALONE)
def test_recognised_losses_raise_no_alarm(name: str, dtype: torch.dtype) -> None:
    case = mlp()._replace(loss=ALONE[name])
    half = dtype == torch.bfloat16
    case = case._replace(model=case.model.to(torch.float32 if half else dtype), x=case.x.to(torch.float32 if half else dtype))
    with warnings.catch_warnings(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        warnings.simplefilter("error")
        maker = measure(case)
    assert not maker.summary().notes and not maker.summary().unchecked


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", ["focal", "penalty of logits", "huber"])
def test_lower_precision_is_near(name: str, half: bool) -> None:
    case = cased(name)
    G = oracles.loss_ggn(case.model, case.x, lambda z: case.loss(z, case.t))
    low = case._replace(model=case.model.float(), x=case.x.float(), loss=lambda z, t: case.loss(z.float(), t))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        maker = measure(low)
    compare(maker, G, tolerance=0.1 if half else 1e-4)


# ------------------------------------------------------------------ refusals
def hidden(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """A penalty of what a layer inside of the model returns."""
    kept: list[Tensor] = []
    case.model[0].register_forward_hook(lambda module, args, output: kept.append(output))
    return lambda z, t: F.cross_entropy(z, t) + 0.1 * kept[-1].square().mean()


REFUSED: dict[str, tuple[Callable[[Case], Any], str]] = {
    "an activation": (hidden, "activation inside of the model is penalised"),
    "not convex": (lambda case: lambda z, t: z.cos().sum(), "not convex"),
    "linear": (lambda case: lambda z, t: z.mean(), "no curvature"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_right_path_is_refused(name: str) -> None:
    make, words = REFUSED[name]
    case = mlp()
    case = case._replace(loss=make(case))
    maker = custom(case.model, FisherExact(), Dense(granularity="full"))
    setup(maker, case)
    with pytest.raises(SelfCheckError, match=words):
        maker.forward_and_backward()
    assert all(p.grad is None for p in case.model.parameters())
    assert not maker.verify().passed


@pytest.mark.parametrize("name", ["focal", "huber"])
def test_strict_makers_refuse(name: str) -> None:
    case = cased(name)
    maker = custom(case.model, FisherExact(), Dense(granularity="full"), self_check="error")
    setup(maker, case)
    with pytest.raises(ValueError, match="recognised"):
        maker.forward_and_backward()


def test_off_takes_the_recognised_terms() -> None:
    case = cased("penalty of logits")
    maker = measure(case, self_check="off")
    compare(maker, oracles.loss_ggn(case.model, case.x, lambda z: F.cross_entropy(z, case.t)))


def test_the_empirical_fisher_needs_nothing_of_it() -> None:
    case = cased("huber")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maker = measure(case, FisherEmp())
    assert not maker.summary().notes


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_of_tokens_have_the_same_scale(reduction: Any) -> None:
    """Of one position an example, tokens are sequences; the terms of the whole loss stand in for recognised ones."""
    case = mlp()._replace(loss=lambda z, t: F.huber_loss(z, r, reduction=reduction))
    found = measure(case, FisherEmp(examples="token"), loss_reduction=reduction).plan.blocks[0].state["matrix"]
    expected = measure(case, FisherEmp(), loss_reduction=reduction).plan.blocks[0].state["matrix"]
    assert oracles.relative_error(found, expected) < 1e-10


def test_methods_by_name() -> None:
    for name in ("kfac", "ekfac", "unit_ng", "kflr", "tengrad_exact"):
        if name not in gm.METHODS:
            continue
        case = cased("focal")
        maker: Any = gm.from_config(case.model, {"method": name})
        setup(maker, case)
        maker.forward_and_backward()
        assert all(bool(p.grad.isfinite().all()) for p in case.model.parameters() if p.grad is not None)
