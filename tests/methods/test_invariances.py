"""What preconditioned gradients do not depend on, and negative controls that do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS, from_config
from gradmaker.curvature import Curvature, FisherEmp, FisherExact
from tests import models, oracles
from tests.models import Case
from tests.registry import without_draws

pytestmark = pytest.mark.usefixtures("double")


def step(maker: Any, case: Case) -> None:
    case.model.zero_grad(set_to_none=True)
    y = maker.setup_model_call(case.model, case.x)
    maker.setup_loss_call(case.loss, y, case.t)
    maker.forward_and_backward()


def update(case: Case, method: str, **options: Any) -> Tensor:
    """P g as one vector; written into the weights as a step of length -1/10 as well."""
    step(from_config(case.model, {"method": method, **options}), case)
    with torch.no_grad():
        for p in case.model.parameters():
            p -= 0.1 * p.grad if p.grad is not None else 0
    return oracles.gradient_vector(case.model)


# --- K-FAC under affine changes of inputs and activations (property 28) ---------------------------------------------------
class Transformed(nn.Module):
    """Two Linear layers; what each is fed is moved by a fixed invertible affine map (or not)."""

    def __init__(self, maps: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.maps = maps

    def forward(self, x: Tensor) -> Tensor:
        (R, r), (S, s) = self.maps
        y: Tensor = self.second(torch.tanh(self.first(x @ R.mT + r)) @ S.mT + s)
        return y


def twins() -> tuple[Case, Case]:
    """One function in two parametrisations: W' (R x + r) + b' = W x + b in each layer."""
    x, t = torch.randn(40, 3), torch.randn(40, 2)
    identity = [(torch.eye(d), torch.zeros(d)) for d in (3, 4)]
    moved = [(torch.randn(d, d) + 2 * torch.eye(d), torch.randn(d)) for d in (3, 4)]
    plain, other = Transformed(identity), Transformed(moved)
    with torch.no_grad():
        for (R, r), layer, source in zip(moved, (other.first, other.second), (plain.first, plain.second), strict=True):
            layer.weight.copy_(source.weight @ torch.linalg.inv(R))
            layer.bias.copy_(source.bias - layer.weight @ r)
    assert oracles.relative_error(other(x), plain(x)) < 1e-12
    return Case(plain, x, t, F.mse_loss), Case(other, x, t, F.mse_loss)


def outputs_after(method: str, **options: Any) -> tuple[float, float]:
    """Relative difference of the twins' outputs after a step, and how far the step went."""
    one, other = twins()
    before = one.model(one.x).detach()
    update(one, method, **options)
    update(other, method, **options)
    after = one.model(one.x)
    return oracles.relative_error(other.model(one.x) - before, after - before), oracles.relative_error(after, before)


@pytest.mark.parametrize("method, options", [("kfac", {"split": "pi"}), ("kfac", {"split": "exact"}), ("unit_ng", {})])
def test_affine_invariance(method: str, options: dict[str, Any]) -> None:
    difference, moved = outputs_after(method, fisher=FisherExact(), damping=0.0, **options)
    assert difference < 1e-6 and moved > 1e-2


@pytest.mark.parametrize("method", ["gradient", "adam", "shampoo", "adagrad"])
def test_others_are_not_affine_invariant(method: str) -> None:
    assert outputs_after(method)[0] > 1e-2


def test_separate_bias_is_not_affine_invariant() -> None:
    """An offset of the inputs mixes weight and bias: it takes the joint block."""
    assert outputs_after("kfac", fisher=FisherExact(), damping=0.0, bias="separate")[0] > 1e-2


# --- natural gradient under a linear change of all parameters (property 29) -----------------------------------------------
class Reparametrised(nn.Module):
    """``theta = T phi``, ``phi`` trained; theta are the weights of a small network."""

    def __init__(self, T: Tensor, theta: Tensor) -> None:
        super().__init__()
        self.T = T
        self.phi = nn.Parameter(torch.linalg.solve(T, theta))

    def forward(self, x: Tensor) -> Tensor:
        theta = self.T @ self.phi
        y: Tensor = torch.tanh(x @ theta[:6].view(3, 2)) @ theta[6:].view(2, 2)
        return y


@pytest.mark.parametrize("method, invariant", [("full_ng", True), ("unit_ng", False), ("adam", False)])
def test_natural_gradient_reparametrisation(method: str, invariant: bool) -> None:
    theta, T = torch.randn(10), torch.randn(10, 10) + 3 * torch.eye(10)
    x, t = torch.randn(30, 3), torch.randn(30, 2)
    options = {"fisher": FisherExact(), "damping": 0.0} if method != "adam" else {}
    one = update(Case(Reparametrised(torch.eye(10), theta), x, t, F.mse_loss), method, **options)
    other = update(Case(Reparametrised(T, theta), x, t, F.mse_loss), method, **options)
    assert (oracles.relative_error(T @ other, one) < 1e-8) == invariant


# --- Shampoo --------------------------------------------------------------------------------------------------------------
def directions(method: str, gradients: list[Tensor], **options: Any) -> list[Tensor]:
    """What a maker makes of a history of gradients, put into ``.grad`` by hand."""
    model = nn.Linear(gradients[0].shape[1], gradients[0].shape[0], bias=False)
    maker = METHODS[method](model, METHODS[method].Config(**options))
    out = []
    for g in gradients:
        model.weight.grad = g.clone()
        maker.precondition()
        out.append(model.weight.grad.clone())
    return out


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 2), (4, 1)])
@pytest.mark.parametrize("root", ["eigh", "newton"])
def test_zero_history_shampoo_orthogonalises(shape: tuple[int, int], root: str) -> None:
    """``U V^T`` of ``G = U S V^T``."""
    for G in (torch.randn(shape), 1e-6 * torch.randn(shape), 1e5 * torch.randn(shape)):
        (found,) = directions("shampoo", [G], decay=0.0, damping=1e-10, grafting="none", root=root)
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        assert oracles.relative_error(found, U @ Vh) < 1e-5


def rotated(method: str, **options: Any) -> float:
    gradients = [torch.randn(4, 3) for _ in range(5)]
    Q1, Q2 = torch.linalg.qr(torch.randn(4, 4))[0], torch.linalg.qr(torch.randn(3, 3))[0]
    plain = directions(method, gradients, **options)
    turned = directions(method, [Q1 @ g @ Q2 for g in gradients], **options)
    return max(oracles.relative_error(b, Q1 @ a @ Q2) for a, b in zip(plain, turned, strict=True))


SHAMPOO: dict[str, Any] = {"damping": 1e-4, "preconditioner_interval": 1}


@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("root, tolerance", [("eigh", 1e-9), ("newton", 1e-4)])
@pytest.mark.parametrize("grafting", ["none", "keep"])
def test_shampoo_is_rotation_equivariant(decay: float | None, root: str, tolerance: float, grafting: str) -> None:
    assert rotated("shampoo", decay=decay, root=root, grafting=grafting, **SHAMPOO) < tolerance


@pytest.mark.parametrize("method, options", [("adam", {}), ("adagrad", {}), ("shampoo", {**SHAMPOO, "grafting": "adam"})])
def test_coordinates_matter_to_element_wise_lengths(method: str, options: dict[str, Any]) -> None:
    assert rotated(method, **options) > 1e-2


# --- the scale of the loss (property 8) -----------------------------------------------------------------------------------
def scaled(case: Case, factor: float) -> Case:
    return case._replace(loss=lambda y, t: factor * case.loss(y, t))


LAYERED: dict[str, Callable[[], Case]] = {
    "mlp": models.mlp,
    "convolution": models.convolution,
    "layer_norm": models.normed,
    "embedding": models.embedding_mean,
}


@pytest.mark.parametrize("name", LAYERED)
@pytest.mark.parametrize("factor", [0.25, 8.0])
@pytest.mark.parametrize("method", ["kfac", "unit_ng", "full_ng"])
@pytest.mark.parametrize("fisher", [FisherExact(), FisherEmp()])
def test_loss_scale(name: str, factor: float, method: str, fisher: Curvature) -> None:
    """``c l``: both Fishers scale with c; and so the damping, which leaves P g."""
    plain = update(LAYERED[name](), method, fisher=fisher, damping=0.03)
    other = update(scaled(LAYERED[name](), factor), method, fisher=fisher, damping=0.03 * factor)
    assert oracles.relative_error(other, plain) < 1e-10
    undamped = update(scaled(LAYERED[name](), factor), method, fisher=fisher, damping=0.03)
    assert oracles.relative_error(undamped, plain) > 1e-3  # the damping is absolute


@pytest.mark.parametrize("factor", [1e-4, 1e4])
@pytest.mark.parametrize("method, options, degree", [
    ("shampoo", {"grafting": "none"}, 0),
    ("shampoo", {"grafting": "keep"}, 1),
    ("shampoo", {"grafting": "none", "root": "newton"}, 0),
    ("adam", {"damping": 1e-30}, 0),
    ("adagrad", {"damping": 1e-30}, 0),
    ("gradient", {}, 1),
])  # fmt: skip
def test_scale_of_gradient_methods(factor: float, method: str, options: dict[str, Any], degree: int) -> None:
    """Shampoo's ridge is relative, so that its direction has no scale at all."""
    plain = update(models.mlp(), method, **options)
    other = update(scaled(models.mlp(), factor), method, **options)
    assert oracles.relative_error(other, plain * factor**degree) < 1e-8


@pytest.mark.parametrize("method, options", [
    ("kfac", {"fisher": FisherExact(), "split": "exact"}),
    ("kfac", {"fisher": FisherExact(), "split": "pi"}),
    ("unit_ng", {"fisher": FisherEmp()}),
    ("full_ng", {"fisher": FisherExact()}),
])  # fmt: skip
@pytest.mark.parametrize("make", [models.mlp, partial(models.convolution, 1), models.embedding_mean])
def test_large_damping_leaves_the_gradient(method: str, options: dict[str, Any], make: Callable[[], Case]) -> None:
    """Property 22: ``damping P g -> g``."""
    plain = update(make(), "gradient")
    assert oracles.relative_error(1e10 * update(make(), method, damping=1e10, **options), plain) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_order_of_examples(method: str) -> None:
    """Property 37, for methods that do not sample."""
    case = models.mlp()
    options = without_draws(method)
    if method == "hessian_free":  # which iterate is taken may hang on rounding, unless the last one is
        options = {"backtrack": False, "tolerance": 1e-12}
    rows = torch.randperm(len(case.x))
    shuffled = models.mlp()._replace(x=case.x[rows], t=case.t[rows])
    tolerance = 1e-6 if method == "shampoo" else 1e-10  # roots of singular statistics amplify rounding
    assert oracles.relative_error(update(shuffled, method, **options), update(case, method, **options)) < tolerance
