"""Krylov subspace descent as published: the preconditioned space, floors, the search by BFGS, three batches."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from gradmaker import from_config
from gradmaker.solvers import Krylov, krylov
from gradmaker.solvers.quasi_newton import minimise_bfgs
from tests import models, oracles
from tests.methods.test_hessian_free import mean_of_squares
from tests.models import Case
from tests.passes.test_batches import part
from tests.passes.test_products import dense, step
from tests.solvers.test_matrix_free import P, Quadratic, gradient, matrix

eye = torch.eye(P, dtype=torch.float64)


# --- BFGS in a few dimensions -------------------------------------------------------------------------------------------------
def counted(f: Callable[[Tensor], Tensor]) -> tuple[Callable[[Tensor], tuple[float, Tensor]], list[Tensor]]:
    """Value and gradient by autograd, and the points that were asked for."""
    seen: list[Tensor] = []

    def slope(x: Tensor) -> tuple[float, Tensor]:
        seen.append(x.clone())
        leaf = x.detach().requires_grad_()
        value = f(leaf)
        return value.item(), torch.autograd.grad(value, leaf)[0]

    return slope, seen


def test_quadratic_with_the_true_inverse_takes_one_step() -> None:
    C, g = matrix()
    slope, seen = counted(lambda x: x @ C @ x / 2 + g @ x)
    found = minimise_bfgs(slope, torch.linalg.inv(C), 2 * P)
    assert oracles.relative_error(found, -torch.linalg.solve(C, g)) < 1e-9 and len(seen) <= 4


def test_quadratic_from_the_identity() -> None:
    C, g = matrix()
    slope, _ = counted(lambda x: x @ C @ x / 2 + g @ x)
    assert oracles.relative_error(minimise_bfgs(slope, eye, 4 * P), -torch.linalg.solve(C, g)) < 1e-6


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1].square()).square() + (1 - x[:-1]).square()).sum()


def test_rosenbrocks_valley() -> None:
    slope, _ = counted(rosenbrock)
    assert oracles.relative_error(minimise_bfgs(slope, torch.eye(2, dtype=torch.float64), 60), torch.ones(2).double()) < 1e-8


def test_first_steps_are_the_textbooks() -> None:
    """Where the first trial is accepted, two iterations are d = -H g and the product form of the update."""
    C, g = matrix()
    C = 0.9 * C / torch.linalg.eigvalsh(C)[-1] + 0.6 * eye
    slope, seen = counted(lambda x: x @ C @ x / 2 + g @ x)
    found = minimise_bfgs(slope, eye, 2)
    assert len(seen) == 3
    s, y = -g, -(C @ g)
    r = 1 / (s @ y)
    H = (eye - r * torch.outer(s, y)) @ (eye - r * torch.outer(y, s)) + r * torch.outer(s, s)
    assert oracles.relative_error(found, s - H @ (g + y)) < 1e-12


@pytest.mark.parametrize("iterations", [0, 1, 3, 7])
def test_wolfes_conditions_hold_at_every_iterate(iterations: int) -> None:
    """Value and slope at the end of the last step, with the point before it found by one iteration less."""
    slope, _ = counted(rosenbrock)
    H = torch.eye(3, dtype=torch.float64)
    ends = [minimise_bfgs(slope, H, k) for k in range(iterations + 1)]
    assert not ends[0].any()
    for before, after in pairwise(ends):
        (f, g), (value, new) = slope(before), slope(after)
        s = after - before
        assert value <= f + 1e-4 * float(g @ s) and float(new @ s) >= 0.9 * float(g @ s)


def test_walls_and_kinks_do_not_raise_the_value() -> None:
    for f in (
        lambda x: torch.where(x.norm() < 0.3, x.sum() + x.square().sum(), torch.nan),
        lambda x: x.abs().sum() + (x[0] - 1).square(),
        lambda x: torch.where(x.sum() > -1e-3, x.sum(), 100.0),
        lambda x: 5.0 + 0 * x.sum(),
    ):
        slope, seen = counted(f)
        found = minimise_bfgs(slope, torch.eye(3, dtype=torch.float64), 20)
        assert f(found) <= f(torch.zeros(3).double()) and len(seen) < 20 * 25
    slope, _ = counted(lambda x: x.sum() * torch.nan)
    assert not minimise_bfgs(slope, torch.eye(3, dtype=torch.float64), 20).any()


# --- as a solver ------------------------------------------------------------------------------------------------------------
def space(C: Tensor, g: Tensor, D: Tensor, dimension: int) -> Tensor:
    """Orthonormal columns of the span of D^-1 g, D^-1 C D^-1 g, ..., by QR of the vectors themselves."""
    columns = [g / D]
    for _ in range(dimension - 1):
        columns.append(C @ columns[-1] / D)
        columns[-1] = columns[-1] / columns[-1].norm()
    return torch.linalg.qr(torch.stack(columns, 1))[0]


def floored(D: Tensor) -> Tensor:
    return D.clamp(min=1e-4 * float(D.max()))


class Searched(Quadratic):
    """With a loss whose gradient is given by autograd."""

    def measure(self) -> None:
        super().measure()
        (_, product), loss = self.state.products[0], self.loss  # type: ignore[attr-defined]

        def loss_and_gradient_at(d: Tensor) -> tuple[Tensor, Tensor]:
            assert loss is not None
            leaf = d[0].detach().requires_grad_()
            with torch.enable_grad():
                value = loss(leaf)
            return value.detach(), torch.autograd.grad(value, leaf)[0].unsqueeze(0)

        object.__setattr__(product, "loss_and_gradient_at", loss_and_gradient_at)


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("precondition", [False, True])
def test_on_a_quadratic_the_search_is_the_model(damping: float, precondition: bool) -> None:
    """Two steps, so that the last direction is among the vectors."""
    C, g = matrix()
    found = []
    for search in ("model", "bfgs"):
        solver = Krylov(damping=damping, dimension=5, precondition=precondition, floor=1e-9, search=search)  # type: ignore[arg-type]
        found.append(Searched(C, lambda d: d @ C @ d / 2 + g @ d).solve(solver, g, 2)[0])
    assert oracles.relative_error(*found) < 1e-6


def quartic(C: Tensor, g: Tensor, d: Tensor) -> Tensor:
    return d @ C @ d / 2 + g @ d + 0.05 * d.square().sum().square()


def least(f: Callable[[Tensor], Tensor], V: Tensor, damping: float) -> Tensor:
    """Newton's method in the span, to the end."""
    a = torch.zeros(V.shape[1], dtype=torch.float64)
    whole = lambda a: f(V @ a) + damping * a @ a / 2  # noqa: E731
    for _ in range(100):
        a = a - torch.linalg.solve(torch.func.hessian(whole)(a), torch.func.grad(whole)(a))
    return V @ a


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_search_finds_the_least_loss_of_the_span(damping: float) -> None:
    """Not that of the model, from which it starts."""
    C, g = matrix()
    solver = Krylov(damping=damping, dimension=5, remember=False, floor=1e-4, search="bfgs", precondition=True)
    found, _ = Searched(C, lambda d: quartic(C, g, d)).solve(solver, g)
    V = space(C, g, floored(g.square()), 5)
    assert oracles.relative_error(-found, least(lambda d: quartic(C, g, d), V, damping)) < 1e-3  # ten iterations
    model, _ = Searched(C).solve(Krylov(damping=max(damping, 1e-9), dimension=5, remember=False, precondition=True), g)
    assert oracles.relative_error(found, model) > 0.1


def test_search_is_no_longer_than_twice_the_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    C, g = matrix()
    asked: list[tuple[int, int]] = []

    def watched(slope: Any, H: Tensor, iterations: int) -> Tensor:
        asked.append((len(H), iterations))
        return minimise_bfgs(slope, H, iterations)

    monkeypatch.setattr(krylov, "minimise_bfgs", watched)
    Searched(C, lambda d: quartic(C, g, d)).solve(Krylov(dimension=3, search="bfgs"), g, 2)
    assert asked == [(3, 6), (3, 6)]


def test_small_eigenvalues_are_raised() -> None:
    C = torch.diag(torch.logspace(-7, 0, P, dtype=torch.float64))
    g = torch.ones(P, dtype=torch.float64)
    solver = Krylov(damping=0.0, dimension=P, remember=False, floor=1e-4)
    found, _ = Quadratic(C).solve(solver, g)
    V = space(C, g, torch.ones(P).double(), P)
    s, Q = torch.linalg.eigh(V.mT @ C @ V)
    W = V @ Q
    assert oracles.relative_error(found, W @ ((W.mT @ g) / s.clamp(min=1e-4 * float(s[-1])))) < 1e-4  # a basis of powers
    assert float(found.max()) < 1.1e4


def test_a_search_needs_a_loss() -> None:
    C, g = matrix()
    with pytest.raises(RuntimeError, match="needs the loss at displaced weights"):
        Quadratic(C).solve(Krylov(search="bfgs"), g)


def test_options() -> None:
    for bad in ({"search": "newton"}, {"floor": 1.5}, {"damping": 0.0}, {"damping": -1.0, "floor": 1e-4}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Krylov(**bad)  # type: ignore[arg-type]
    assert Krylov(damping=0.0, floor=1e-4).damping == 0
    with pytest.raises(ValueError, match="squares"):
        from_config(models.mlp().model, {"method": "ksd", "squares": "none"})
    with pytest.raises(ValueError, match="squares"):
        from_config(models.mlp().model, {"method": "ksd", "squares": "batch", "precondition": False})


# --- as a method ------------------------------------------------------------------------------------------------------------
KSD: dict[str, Any] = {"method": "ksd", "dimension": 4, "damping": 0.05}


def loss_along(case: Case, d: Tensor) -> Tensor:
    """At displaced weights, differentiably."""
    named, start = {}, 0
    for name, p in case.model.named_parameters():
        named[name] = p.detach() + d[start : start + p.numel()].view_as(p)
        start += p.numel()
    return case.loss(torch.func.functional_call(case.model, named, (case.x,)), case.t)


@pytest.mark.parametrize("squares", ["examples", "batch"])
def test_method_is_the_papers(squares: str) -> None:
    """The space with the squares of the gradients of examples, searched on the batch of the step."""
    case = models.mlp()
    g, C = gradient(case), dense(case, "ggn")
    D = floored(mean_of_squares(case, "mean") if squares == "examples" else g.square())
    V = space(C, g, D, 4)
    found = step(from_config(case.model, {**KSD, "squares": squares}), case)
    assert float((found - V @ (V.mT @ found)).norm()) < 1e-8 * float(found.norm())
    at = V.mT @ -found
    slope = torch.func.grad(lambda a: loss_along(case, V @ a) + 0.05 * a @ a / 2)(at)
    first = torch.func.grad(lambda a: loss_along(case, V @ a))(0 * at)
    assert float(slope.norm()) < 1e-3 * float(first.norm())  # 2 K iterations from the model's minimum


@pytest.mark.parametrize("declared", ["search", "curvature", "both"])
def test_three_batches(declared: str) -> None:
    """The gradient's, the products', and the one that is searched."""
    case = models.mlp()
    products, searched = part(case, slice(0, 4)), part(case, slice(2, 6))
    maker: Any = from_config(case.model, KSD)
    maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
    if declared != "search":
        maker.setup_loss_call(case.loss, maker.setup_curvature_call(case.model, products.x), products.t)
    if declared != "curvature":
        maker.setup_loss_call(case.loss, maker.setup_search_call(case.model, searched.x), searched.t)
    maker.forward_and_backward()
    found = oracles.gradient_vector(case.model)
    C = dense(case if declared == "search" else products, "ggn")
    V = space(C, gradient(case), floored(mean_of_squares(case, "mean")), 4)
    assert float((found - V @ (V.mT @ found)).norm()) < 1e-8 * float(found.norm())
    at = V.mT @ -found
    left = {}
    for name, data in (("own", case), ("searched", searched)):
        slope = torch.func.grad(lambda a, data=data: loss_along(data, V @ a) + 0.05 * a @ a / 2)
        left[name] = float(slope(at).norm() / slope(0 * at).norm())
    assert left.pop("own" if declared == "curvature" else "searched") < 1e-2
    assert min(left.values()) > 0.05


def test_scale_of_the_gradient_does_not_move_the_space() -> None:
    """The batch's square scales with the loss, and so does D: the space is the same, the step of the model as well."""
    found = []
    for c in (1.0, 1e-3):
        case = models.mlp()
        scaled = case._replace(loss=lambda y, t, c=c: c * models.mlp().loss(y, t))
        options = {**KSD, "search": "model", "damping": 0.0, "squares": "batch"}
        found.append(step(from_config(case.model, options), scaled))
    assert oracles.relative_error(found[1], found[0]) < 1e-8


@pytest.mark.parametrize("search", ["bfgs", "model"])
def test_every_step_lowers_the_loss(search: str) -> None:
    case = models.mlp()
    maker = from_config(case.model, {**KSD, "search": search})
    optimizer = torch.optim.SGD(case.model.parameters(), 1.0)
    losses = [case.run().item()]
    for _ in range(8):
        step(maker, case)
        optimizer.step()
        losses.append(case.run().item())
    assert losses[-1] < 0.5 * losses[0]
    assert search == "model" or all(b < a for a, b in pairwise(losses))
