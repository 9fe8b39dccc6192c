"""Newton's relatives against dense float64 algebra: every solver by its formula, and the rules that surround it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS, from_config
from gradmaker.curvature import Curvature, FisherExact, GaussNewton
from gradmaker.curvature.products import Product
from gradmaker.linalg.state import State
from gradmaker.methods.custom import CustomGradientConfig
from gradmaker.representations import Dense, Diagonal, Implicit, Representation
from gradmaker.representations.base import Fold, Frame
from gradmaker.solvers import (
    CG,
    LU,
    AbsoluteDivision,
    AbsoluteEigh,
    Cholesky,
    CurveBall,
    Krylov,
    LevenbergMarquardt,
    Neumann,
    SignedDivision,
    Solver,
    TruncatedCG,
)
from tests import models, oracles
from tests.models import CLASSES, Case
from tests.passes.test_products import MATRIX_FREE, dense, step, trainable

FAMILY = ("newton", *MATRIX_FREE)
P = 12


def direction(case: Case, curvature: Curvature, representation: Representation, solver: Solver) -> Tensor:
    config = CustomGradientConfig(curvature=curvature, representation=representation, solver=solver, decay=0.0)
    return step(METHODS["custom"](case.model, config), case)


def gradient(case: Case) -> Tensor:
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(case.run(), trainable(case), materialize_grads=True)])


# --- solvers on a matrix of which everything is known ---------------------------------------------------------------------
class Quadratic:
    """``L(theta) = theta^T C theta / 2 + b^T theta`` at ``theta``, as a solver meets it."""

    def __init__(self, C: Tensor, loss: Callable[[Tensor], Tensor] | None = None) -> None:
        self.C, self.representation = C, Implicit()
        self.state: State = self.representation.init(Frame(1, (len(C),), frozenset(), torch.float64, torch.device("cpu")))
        self.loss = loss
        self.measure()

    def measure(self) -> None:
        self.representation.release(self.state)
        product = Product(lambda v: v @ self.C, None if self.loss is None else lambda d: self.loss(d[0]))  # type: ignore[misc]
        self.representation.update(self.state, product, Fold(0.5, 0.5, 0.5))

    def solve(self, solver: Solver, g: Tensor, steps: int = 1) -> tuple[Tensor, State]:
        """After some steps with the same matrix and gradient."""
        cache: State | None = None
        for _ in range(steps):
            self.measure()
            cache = solver.prepare(self.representation, self.state, cache)
            x = solver.solve(self.representation, cache, g.unsqueeze(0))[0]
        assert cache is not None
        return x, cache


def matrix(definite: bool = True, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(P, P, generator=generator, dtype=torch.float64))[0]
    s = torch.linspace(0.05, 2.0, P, dtype=torch.float64) - (0.0 if definite else 0.8)
    return (Q * s) @ Q.mT, torch.randn(P, generator=generator, dtype=torch.float64)


def absolute(C: Tensor, damping: float) -> Tensor:
    s, Q = torch.linalg.eigh(C)
    inverse: Tensor = (Q / (s.abs() + damping)) @ Q.mT
    return inverse


PLAIN_CG = TruncatedCG(damping=0.1, tolerance=0.0, warm=0.0, preconditioner=0.0, backtrack=False, adapt=None, line_search=False)


@pytest.mark.parametrize("warm, preconditioner", [(0.0, 0.0), (0.95, 0.0), (0.0, 0.75), (0.95, 0.75), (1.0, 1.0)])
def test_truncated_cg_has_one_limit(warm: float, preconditioner: float) -> None:
    C, g = matrix()
    options: dict[str, Any] = {"warm": warm, "preconditioner": preconditioner, "iterations": 60}
    solver = TruncatedCG(damping=0.1, tolerance=0.0, backtrack=False, adapt=None, **options)
    x, _ = Quadratic(C).solve(solver, g, 3)
    assert oracles.relative_error(x, oracles.tikhonov_solve(C, 0.1, g)) < 1e-9


def test_truncated_cg_after_p_iterations() -> None:
    C, g = matrix()
    x, _ = Quadratic(C).solve(TruncatedCG(**{**vars(PLAIN_CG), "iterations": P}), g)
    assert oracles.relative_error(x, oracles.tikhonov_solve(C, 0.1, g)) < 1e-9


def test_the_model_falls_with_every_iteration() -> None:
    """``phi`` of the iterates, by the matrix, of plain, warm and preconditioned runs."""
    C, g = matrix()
    A = C + 0.1 * torch.eye(P, dtype=torch.float64)
    for options in ({}, {"warm": 0.95}, {"preconditioner": 0.75}):
        found = []
        for count in range(1, P + 1):
            x, _ = Quadratic(C).solve(TruncatedCG(**{**vars(PLAIN_CG), "iterations": count, **options}), g)
            found.append(float(x @ A @ x / 2 - x @ g))
        assert all(after < before + 1e-12 for before, after in itertools.pairwise(found)) and found[0] < 0


def test_warm_start_is_used() -> None:
    """With one iteration, the second step starts where the first has ended."""
    C, g = matrix()
    A = C + 0.1 * torch.eye(P, dtype=torch.float64)
    first, _ = Quadratic(C).solve(TruncatedCG(**{**vars(PLAIN_CG), "iterations": 1}), g)
    assert oracles.relative_error(first, g * (g @ g) / (g @ A @ g)) < 1e-12
    second, _ = Quadratic(C).solve(TruncatedCG(**{**vars(PLAIN_CG), "iterations": 1, "warm": 0.9}), g, 2)
    r = g - A @ (0.9 * first)
    assert oracles.relative_error(second, 0.9 * first + r * (r @ r) / (r @ A @ r)) < 1e-12


def test_stopping_rule() -> None:
    """A looser tolerance stops earlier; the smallest does not stop before the end."""
    C, g = matrix()
    C = torch.diag(torch.logspace(-4, 0, 60, dtype=torch.float64))
    g = torch.ones(60, dtype=torch.float64)
    counts = []
    for tolerance in (1e-2, 5e-4, 1e-6):
        problem, calls = Quadratic(C), [0]
        problem.representation.release(problem.state)

        def counted(v: Tensor, calls: list[int] = calls) -> Tensor:
            calls[0] += 1
            return v @ C

        problem.representation.update(problem.state, Product(counted), Fold(0.0, 1.0, 1.0))
        solver = TruncatedCG(**{**vars(PLAIN_CG), "damping": 1e-6, "tolerance": tolerance})
        solver.solve(problem.representation, solver.prepare(problem.representation, problem.state, None), g.unsqueeze(0))
        counts.append(calls[0])
    assert 11 <= counts[0] < counts[1] < counts[2] <= 250


def test_negative_curvature_stops() -> None:
    C, g = matrix(definite=False)
    x, cache = Quadratic(C).solve(PLAIN_CG, g)
    assert float(x @ g) > 0 and x.isfinite().all() and int(cache["failures"]) == 0
    A, p, r, ours = C + 0.1 * torch.eye(P, dtype=torch.float64), g, g, torch.zeros_like(g)
    while p @ A @ p > 0:  # the textbook's recursion
        ours, before = ours + (r @ r) / (p @ A @ p) * p, r
        r = r - (r @ r) / (p @ A @ p) * (A @ p)
        p = r + (r @ r) / (before @ before) * p
    assert oracles.relative_error(x, ours) < 1e-9
    nothing, _ = Quadratic(-torch.eye(P, dtype=torch.float64)).solve(PLAIN_CG, g)
    assert torch.equal(nothing, g)  # M^-1 g


def test_backtracking_takes_the_lowest_loss() -> None:
    """A loss that rises beyond a short step: an early iterate is taken, and the loss is evaluated at theta - x."""
    C, g = matrix()
    A = C + 0.1 * torch.eye(P, dtype=torch.float64)
    first = g * (g @ g) / (g @ A @ g)
    x, _ = Quadratic(C, lambda d: (d + first).square().sum()).solve(TruncatedCG(**{**vars(PLAIN_CG), "backtrack": True}), g)
    assert oracles.relative_error(x, first) < 1e-12
    last, _ = Quadratic(C, lambda d: -d.square().sum()).solve(TruncatedCG(**{**vars(PLAIN_CG), "backtrack": True}), g)
    assert oracles.relative_error(last, torch.linalg.solve(A, g)) < 1e-9


def test_levenberg_marquardt() -> None:
    rule, one, minus = LevenbergMarquardt(), torch.ones(1), -torch.ones(())
    for ratio, factor in ((1.0, 2 / 3), (0.76, 2 / 3), (0.74, 1.0), (0.26, 1.0), (0.24, 1.5), (-1.0, 1.5)):
        assert float(rule.adapt(one, ratio * minus, minus)) == pytest.approx(factor)
    assert float(rule.adapt(one, torch.tensor(float("nan")), minus)) == 1.5
    assert float(rule.adapt(one, minus, -minus)) == 1.5  # a model that predicts no decrease
    assert float(rule.adapt(1e-8 * one, minus, minus)) == pytest.approx(1e-8)
    assert float(rule.adapt(1e8 * one, -minus, minus)) == pytest.approx(1e8)


def test_damping_follows_the_ratio() -> None:
    """On a quadratic loss the model is right: rho is 1, and the damping falls by 2/3 a step; it is used and kept."""
    C, g = matrix()
    right = Quadratic(C, lambda d: d @ C @ d / 2 + g @ d)
    solver = TruncatedCG(**{**vars(PLAIN_CG), "damping": 1.0, "iterations": 60, "adapt": LevenbergMarquardt()})
    x, cache = right.solve(solver, g, 3)
    assert float(cache["damping"]) == pytest.approx((2 / 3) ** 3)
    assert oracles.relative_error(x, oracles.tikhonov_solve(C, (2 / 3) ** 2, g)) < 1e-9
    _, cache = Quadratic(C, lambda d: -(d @ C @ d) - g @ d).solve(solver, g, 2)
    assert float(cache["damping"]) == pytest.approx(1.5**2)


@pytest.mark.parametrize("definite", [True, False])
def test_krylov_of_all_dimensions(definite: bool) -> None:
    C, g = matrix(definite)
    x, _ = Quadratic(C).solve(Krylov(damping=0.1, dimension=P, remember=False), g)
    assert oracles.relative_error(x, absolute(C, 0.1) @ g) < 1e-9
    again, _ = Quadratic(C).solve(Krylov(damping=0.1, dimension=P, remember=True), g, 2)
    assert oracles.relative_error(again, absolute(C, 0.1) @ g) < 1e-9
    scaled, _ = Quadratic(C).solve(Krylov(damping=0.1, dimension=5), 1e-9 * g)
    assert oracles.relative_error(1e9 * scaled, Quadratic(C).solve(Krylov(damping=0.1, dimension=5), g)[0]) < 1e-9


@pytest.mark.parametrize("count", [1, 3, 6])
def test_krylov_is_cg(count: int) -> None:
    C, g = matrix()
    x, _ = Quadratic(C).solve(Krylov(damping=0.1, dimension=count), g)
    y, _ = Quadratic(C).solve(TruncatedCG(**{**vars(PLAIN_CG), "iterations": count}), g)
    assert oracles.relative_error(x, y) < 1e-9


@pytest.mark.parametrize("precondition", [False, True])
def test_krylov_minimises_over_its_space(precondition: bool) -> None:
    """In the span of the vectors by their definition, with the step before as the last of them."""
    C, g = matrix()
    other = matrix(seed=1)[1]
    solver = Krylov(damping=0.1, dimension=4, precondition=precondition)
    problem = Quadratic(C)
    cache = solver.prepare(problem.representation, problem.state, None)
    before = solver.solve(problem.representation, cache, other.unsqueeze(0))[0]
    x = solver.solve(problem.representation, solver.prepare(problem.representation, problem.state, cache), g.unsqueeze(0))[0]
    D = g.square().clamp(min=1e-4 * float(g.square().max())) if precondition else torch.ones_like(g)
    columns = [g / D]
    for _ in range(2):
        columns.append(C @ columns[-1] / D)
    V = torch.linalg.qr(torch.stack([*columns, before], 1))[0]
    A = V.mT @ C @ V + 0.1 * torch.eye(4, dtype=torch.float64)
    assert oracles.relative_error(x, V @ torch.linalg.solve(A, V.mT @ g)) < 1e-9


def test_krylov_breakdown() -> None:
    """Three distinct eigenvalues: the space ends after three vectors, and the result is exact."""
    Q = torch.linalg.qr(torch.randn(P, P, dtype=torch.float64))[0]
    C = (Q * torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).repeat(4)) @ Q.mT
    g = torch.randn(P, dtype=torch.float64)
    x, cache = Quadratic(C).solve(Krylov(damping=0.1, dimension=P), g, 2)
    assert oracles.relative_error(x, oracles.tikhonov_solve(C, 0.1, g)) < 1e-9 and int(cache["failures"]) == 0
    zero, _ = Quadratic(C).solve(Krylov(damping=0.1), torch.zeros(P, dtype=torch.float64))
    assert not zero.any()


def test_saddle() -> None:
    """Along negative curvature the step goes away from the saddle: Newton's goes to it."""
    C, g = torch.diag(torch.tensor([2.0, -0.5], dtype=torch.float64)), torch.tensor([0.4, -0.3], dtype=torch.float64)
    x, _ = Quadratic(C).solve(Krylov(damping=1e-9, dimension=2), g)
    assert oracles.relative_error(x, torch.tensor([0.2, -0.6], dtype=torch.float64)) < 1e-6


@pytest.mark.parametrize("terms", [0, 1, 7])
@pytest.mark.parametrize("definite", [True, False])
def test_neumann_is_its_sum(terms: int, definite: bool) -> None:
    C, g = matrix(definite)
    eta, A = 0.3, C + 0.1 * torch.eye(P, dtype=torch.float64)
    expected = sum(
        eta * torch.linalg.matrix_power(torch.eye(P, dtype=torch.float64) - eta * A, j) @ g for j in range(terms + 1)
    )
    solver = Neumann(damping=0.1, terms=terms, scale=1 / 0.3)
    problem = Quadratic(C)
    x, _ = problem.solve(solver, g)
    assert isinstance(expected, Tensor) and oracles.relative_error(x, expected) < 1e-12
    assert oracles.relative_error(solver.operator(problem.representation, problem.state)[0] @ g, expected) < 1e-12


def test_neumann_limit_and_divergence() -> None:
    C, g = matrix()
    x, cache = Quadratic(C).solve(Neumann(damping=0.1, terms=1000, rounds=30), g)
    assert oracles.relative_error(x, oracles.tikhonov_solve(C, 0.1, g)) < 1e-9 and int(cache["failures"]) == 0
    y, cache = Quadratic(C).solve(Neumann(damping=0.1, terms=4000, scale=0.5), g)  # eta C > 2
    assert y.isfinite().all() and int(cache["failures"]) == 1


def test_curveball_reaches_the_fixed_point() -> None:
    C, g = matrix()
    for options in ({}, {"rho": 1.0, "beta": 0.4}):
        x, _ = Quadratic(C).solve(CurveBall(damping=0.1, **options), g, 600)
        assert oracles.relative_error(x, oracles.tikhonov_solve(C, 0.1, g)) < 1e-7


def test_curveball_step() -> None:
    """The first is a gradient step; with chosen (rho, beta) the model is least in the plane of z and A z + g."""
    C, g = matrix()
    first, _ = Quadratic(C).solve(CurveBall(damping=0.0, rho=1.0, beta=0.3), g)
    assert oracles.relative_error(first, 0.3 * g) < 1e-12
    A = C + 0.1 * torch.eye(P, dtype=torch.float64)
    before, after = (-Quadratic(C).solve(CurveBall(damping=0.1), g, steps)[0] for steps in (3, 4))
    plane = torch.stack([before, A @ before + g], 1)
    model = plane.mT @ (A @ after + g)  # its gradient along the plane
    assert (
        float(model.abs().max()) < 1e-10 and oracles.relative_error(plane @ torch.linalg.lstsq(plane, after)[0], after) < 1e-9
    )


def test_curveball_without_curvature_is_momentum() -> None:
    """Heavy ball: z <- rho z - beta g."""
    g, z = matrix()[1], torch.zeros(P, dtype=torch.float64)
    for steps in range(1, 5):
        z = 0.9 * z - 0.1 * g
        x, _ = Quadratic(torch.zeros(P, P, dtype=torch.float64)).solve(CurveBall(damping=0.0, rho=0.9, beta=0.1), g, steps)
        assert oracles.relative_error(-x, z) < 1e-12


def test_curveball_damping() -> None:
    C, g = matrix()
    w = 0.999**5
    for loss, factor in ((lambda d: 3 * (d @ C @ d / 2 + g @ d), w), (lambda d: -(g @ d), 1 / w)):
        _, cache = Quadratic(C, loss).solve(CurveBall(damping=1.0), g, 11)
        assert float(cache["damping"]) == pytest.approx(factor**2)


def test_non_finite_curvature_is_counted() -> None:
    C, g = torch.full((P, P), torch.nan, dtype=torch.float64), torch.ones(P, dtype=torch.float64)
    for solver in (PLAIN_CG, Krylov(damping=0.5), Neumann(damping=0.5), CurveBall(damping=0.5)):
        x, cache = Quadratic(C).solve(solver, g, 2)
        assert x.isfinite().all() and int(cache["failures"]) >= 1, solver


# --- agreement on a network -----------------------------------------------------------------------------------------------
AGREE: dict[str, tuple[Representation, Solver]] = {
    "cg": (Implicit(), CG(damping=0.1, iterations=2000, tolerance=1e-13)),
    "hessian_free": (Implicit(), TruncatedCG(**{**vars(PLAIN_CG), "iterations": 100})),
    "krylov": (Implicit(), Krylov(damping=0.1, dimension=60)),
    "neumann": (Implicit(), Neumann(damping=0.1, terms=600)),
    "lu": (Dense(granularity="full"), LU(damping=0.1)),
    "absolute": (Dense(granularity="full"), AbsoluteEigh(damping=0.1)),
    "cholesky": (Dense(granularity="full"), Cholesky(damping=0.1)),
}


def mlp_nll() -> Case:
    """Log-probabilities, in which the loss is linear: the matrix is that of the distribution."""
    return models.mlp()._replace(loss=lambda y, t: F.nll_loss(y.log_softmax(-1), t))


def mlp_twice() -> Case:
    """Two terms on the same logits."""
    return models.mlp()._replace(loss=lambda y, t: 0.5 * F.cross_entropy(y, t) + 0.3 * F.mse_loss(y, torch.ones_like(y)))


ONE_TERM = [models.mlp, models.mlp_bernoulli, mlp_nll, partial(models.convolution, 2, groups=2)]


@pytest.mark.parametrize("make", [*ONE_TERM, mlp_twice])
def test_agreement_on_one_gauss_newton_matrix(make: Callable[[], Case]) -> None:
    expected = oracles.tikhonov_solve(dense(make(), "ggn"), 0.1, gradient(make()))
    for name, (representation, solver) in AGREE.items():
        assert oracles.relative_error(direction(make(), GaussNewton(), representation, solver), expected) < 1e-9, name
    other = direction(make(), FisherExact(), Dense(granularity="full"), Cholesky(damping=0.1))
    assert oracles.relative_error(other, expected) < 1e-9
    if "smw_gn" in METHODS:
        case = make()
        assert (
            oracles.relative_error(step(from_config(case.model, {"method": "smw_gn", "damping": 0.1}), case), expected) < 1e-9
        )


# --- Newton ---------------------------------------------------------------------------------------------------------------
def blocks_of(case: Case, names: tuple[str, ...]) -> list[Tensor]:
    slices = oracles.parameter_slices(case.model)
    return [torch.cat([torch.arange(s.start, s.stop) for k, s in slices.items() if k.startswith(n)]) for n in names]


@pytest.mark.parametrize("name", ["mlp", "batch_norm"])
@pytest.mark.parametrize("granularity", ["full", "layer"])
@pytest.mark.parametrize("absolutely", [True, False])
def test_newton_is_the_dense_solve(name: str, granularity: str, absolutely: bool) -> None:
    """Property 27: the eigenvalues are the absolute values of the Hessian's."""
    case = models.ZOO[name]()
    H, g, expected = dense(case, "hessian"), gradient(case), torch.zeros(0, dtype=torch.float64)
    expected = torch.zeros_like(g)
    groups = blocks_of(case, ("",) if granularity == "full" else ("0", "2") if name == "mlp" else ("first", "norm", "head"))
    for rows in groups:
        C = oracles.reorder(H, rows)
        P_ = absolute(C, 0.05) if absolutely else torch.linalg.inv(C + 0.05 * torch.eye(len(C), dtype=torch.float64))
        expected[rows] = P_ @ g[rows]
    config = {"method": "newton", "granularity": granularity, "absolute": absolutely, "damping": 0.05}
    assert oracles.relative_error(step(from_config(case.model, config), case), expected) < 1e-9


def test_absolute_newton_descends_and_is_newton_where_the_hessian_is_definite() -> None:
    case = models.mlp()
    s = torch.linalg.eigvalsh(dense(case, "hessian"))
    assert float(s[0]) < -1e-3  # indefinite
    found = step(from_config(case.model, {"method": "newton", "damping": 1e-4}), case)
    assert float(found @ gradient(case)) > 0
    convex = models.linear()
    both = [
        step(from_config(convex.model, {"method": "newton", "damping": 0.1, "absolute": chosen}), convex)
        for chosen in (True, False)
    ]
    assert oracles.relative_error(*both) < 1e-12


@pytest.mark.parametrize("name", ["mlp", "mlp_relu", "conv2d_groups"])
def test_diagonal_newton(name: str) -> None:
    case = models.ZOO[name]()
    d, g = dense(case, "hessian").diagonal(), gradient(case)
    maker = from_config(case.model, {"method": "newton", "granularity": "diagonal", "damping": 0.05})
    assert oracles.relative_error(step(maker, case), g / (d.abs() + 0.05)) < 1e-9
    if name == "mlp_relu":  # where the Gauss-Newton matrix has the same diagonal
        twin = models.ZOO[name]()
        found = direction(twin, GaussNewton(), Diagonal(granularity="layer"), AbsoluteDivision(damping=0.05))
        assert oracles.relative_error(found, g / (d.abs() + 0.05)) < 1e-9


def test_diagonal_newton_with_its_signs() -> None:
    """Entries below ``-damping`` ascend."""
    case = models.mlp()
    d, g = dense(case, "hessian").diagonal(), gradient(case)
    damping = float(-d.min()) / 2
    config = {"method": "newton", "granularity": "diagonal", "damping": damping, "absolute": False}
    found = step(from_config(case.model, config), case)
    assert oracles.relative_error(found, g / (d + damping)) < 1e-9
    assert bool((found * g < 0).any())


def test_a_diagonal_that_the_damping_cancels_has_failed() -> None:
    """It keeps what it had, or divides by the damping."""
    held, solver, g = Diagonal(granularity="layer"), SignedDivision(damping=0.5), torch.ones(1, 2, dtype=torch.float64)

    def refreshed(previous: Any, *d: float) -> Any:
        state = {"diagonal": torch.tensor([d], dtype=torch.float64), "mass": torch.ones(1, dtype=torch.float64)}
        return solver.prepare(held, state, previous)

    nothing = refreshed(None, -0.5, 1.5)
    assert torch.equal(solver.solve(held, nothing, g), 2 * g) and int(nothing["failing"]) == 1
    good = refreshed(nothing, 1.5, -1.0)
    assert torch.equal(solver.solve(held, good, g), torch.tensor([[0.5, -2.0]], dtype=torch.float64))
    assert torch.equal(solver.solve(held, refreshed(good, 1.5, -0.5), g), solver.solve(held, good, g))


@pytest.mark.parametrize("options", [{"absolute": False}, {"absolute": True}])
def test_newton_reaches_the_optimum_of_a_quadratic(options: dict[str, Any]) -> None:
    """Property 27, and damping too small to matter."""
    case = models.build(lambda: nn.Linear(4, 2), 20, 4, loss=F.mse_loss)
    case = case._replace(t=torch.randn(20, 2, dtype=torch.float64))
    maker = from_config(case.model, {"method": "newton", "damping": 1e-13, **options})
    before = oracles.parameter_vector(case.model)
    found = before - step(maker, case)
    with torch.no_grad():
        for k, where in oracles.parameter_slices(case.model).items():
            p = case.model.get_parameter(k)
            p.copy_(found[where].view_as(p))
    assert float(gradient(case).norm()) < 1e-8


def test_newton_averages_before_it_takes_absolute_values() -> None:
    case, other = models.mlp(), models.mlp()
    flipped = other._replace(t=other.t.roll(1))
    H = 0.25 * dense(case, "hessian") + 0.75 * dense(flipped, "hessian")
    maker = from_config(case.model, {"method": "newton", "decay": 1 / 4, "damping": 0.05})
    step(maker, case)
    g = step(maker, case._replace(t=case.t.roll(1)))
    H = (0.25 * 0.75 * dense(other, "hessian") + 0.75 * dense(flipped, "hessian")) / (0.25 * 0.75 + 0.75)
    assert oracles.relative_error(g, absolute(H, 0.05) @ gradient(flipped)) < 1e-9


def test_too_many_products_are_refused() -> None:
    maker = from_config(nn.Linear(300, 100), {"method": "newton", "granularity": "diagonal"})
    y = maker.setup_model_call(maker.model, torch.randn(2, 300))
    maker.setup_loss_call(F.mse_loss, y, torch.zeros(2, 100))
    with pytest.raises(ValueError, match=r"30100 parameters takes 30100 products.*hessian_free"):
        maker.forward_and_backward()
    with pytest.raises(ValueError, match="max_dim"):
        from_config(nn.Linear(300, 100), {"method": "newton"})


# --- as methods -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", FAMILY)
def test_attach_is_refused(method: str) -> None:
    model = nn.Linear(3, 2)
    maker = from_config(model, {"method": method})
    with pytest.raises(ValueError, match=r"attach: .* has to differentiate or repeat the loss, which attach\(\) does not see"):
        maker.attach(torch.optim.SGD(model.parameters(), 0.1), likelihood="categorical")  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", MATRIX_FREE)
def test_averages_and_intervals_have_no_meaning(method: str) -> None:
    for option, value in {"curvature_interval": 5, "preconditioner_interval": 7, "warmup_steps": 3, "decay": 0.9}.items():
        with pytest.raises(ValueError, match=rf"{option}={value} would have no effect: "):
            from_config(models.mlp().model, {"method": method, option: value})


def test_a_step_without_a_pass_says_so() -> None:
    case = models.mlp()
    maker = from_config(case.model, {"method": "ksd"})
    step(maker, case)
    with pytest.raises(RuntimeError, match="no forward pass was recorded"):
        maker.precondition()


@pytest.mark.parametrize("method", MATRIX_FREE)
def test_a_batch_without_a_term_is_a_step_of_length_zero(method: str) -> None:
    """All of its targets ignored: the sum of no losses, whose curvature is zero."""
    case = models.mlp()
    maker = from_config(case.model, {"method": method})
    for ignored in (False, True, False):
        t = torch.full_like(case.t, -100) if ignored else case.t
        g = step(maker, case._replace(t=t, loss=partial(F.cross_entropy, reduction="sum")))
        assert torch.isfinite(g).all()
        assert bool(g.any()) is not ignored or method == "curveball"  # whose z goes on


@pytest.mark.parametrize("method", MATRIX_FREE)
@pytest.mark.parametrize("at", range(1, 6))
def test_a_step_may_begin_again_after_an_exception(method: str, at: int) -> None:
    """The loss fails at one of its evaluations: all is as before, and the next step as if it had not."""
    found = []
    for fails in (True, False):
        case, calls = models.mlp(), itertools.count()
        maker = from_config(case.model, {"method": method})
        step(maker, case)
        before, state = oracles.gradient_vector(case.model), torch.get_rng_state()
        if fails:

            def loss(z: Tensor, t: Tensor) -> Tensor:
                if next(calls) == at:  # noqa: B023
                    raise ZeroDivisionError
                return F.cross_entropy(z, t)

            maker.setup_loss_call(loss, maker.setup_model_call(case.model, case.x), case.t)
            try:
                maker.forward_and_backward()
            except ZeroDivisionError:
                assert torch.equal(oracles.gradient_vector(case.model), before)
                assert torch.equal(torch.get_rng_state(), state)
            else:
                return  # it is not evaluated as often
        found.append(step(maker, case))
    assert oracles.relative_error(found[0], found[1]) < 1e-12


def small_net() -> Case:
    make = lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(16, CLASSES))  # noqa: E731
    return models.build(make, 24, 1, 8, 8)


@pytest.mark.parametrize("method", FAMILY)
def test_conv_net_learns(method: str) -> None:
    """The multilayer perceptron is trained by test_methods."""
    final = []
    for lr in (0.1, 0.5, 1.0):
        case = small_net()
        maker, first = from_config(case.model, {"method": method}), case.run().item()
        optimizer = torch.optim.SGD(case.model.parameters(), lr)
        for _ in range(30):
            step(maker, case)
            optimizer.step()
        final.append(case.run().item())
    assert min(final) < 0.7 * first


def test_bad_options_are_refused() -> None:
    for method, options, words in (
        ("newton", {"granularity": "unit"}, "granularity"),
        ("hessian_free", {"warm": 2.0}, "warm"),
        ("hessian_free", {"curvature": "FisherMC"}, "Implicit is built from Product"),
        ("ksd", {"dimension": 0}, "dimension"),
        ("lissa", {"scale": -1.0}, "scale"),
        ("curveball", {"rho": 0.9}, "both"),
        ("curveball", {"curvature": "Hessian"}, "positive semidefinite"),
    ):
        with pytest.raises(ValueError, match=words):
            from_config(nn.Linear(2, 2), {"method": method, **options})
