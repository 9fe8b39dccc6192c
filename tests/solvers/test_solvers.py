"""Every legal (representation, solver) pair against a dense judge in float64, and what all of them must satisfy."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch import Tensor

from gradmaker.linalg.damping import pi_ridges
from gradmaker.linalg.state import State
from gradmaker.representations.base import Representation
from gradmaker.representations.capabilities import Elementwise, Factored, Multiplies
from gradmaker.representations.dense import Dense
from gradmaker.representations.diagonal import Diagonal
from gradmaker.representations.kronecker import Kron, KronDims
from gradmaker.representations.roles import duplicate
from gradmaker.solvers.base import Solver
from gradmaker.solvers.cholesky import Cholesky
from gradmaker.solvers.conjugate_gradient import CG
from gradmaker.solvers.division import Division
from gradmaker.solvers.eigh import Eigh
from gradmaker.solvers.newton_root import NewtonRoot

B, MASS = 3, 0.25
pytestmark = pytest.mark.usefixtures("double")


def covariance(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A well-conditioned statistic with mass `MASS`."""
    *batch, d, _ = shape
    x = torch.randn(*batch, d, 3 * d, dtype=torch.float64)
    return (MASS * (x @ x.mT / (3 * d) + 0.1 * torch.eye(d))).to(dtype)


def masses(*names: str) -> State:
    return {name: torch.full((B,), MASS) for name in names}


def kron(left: Tensor, right: Tensor) -> State:
    return {"left": left, "right": right, **masses("left_mass", "right_mass")}


def dims(*factors: Tensor) -> State:
    return {**{f"factor_{axis}": F for axis, F in enumerate(factors)}, **masses("mass")}


def positive(*shape: int) -> Tensor:
    return MASS * (torch.rand(*shape) + 0.1)


CASES = {
    "dense layer": lambda: (Dense(), {"matrix": covariance(B, 6, 6), **masses("mass")}, (3, 2)),
    "dense unit": lambda: (Dense(granularity="unit"), {"matrix": covariance(B, 4, 4), **masses("mass")}, (4,)),
    "dense scalar": lambda: (Dense(), {"matrix": covariance(B, 1, 1), **masses("mass")}, ()),
    "diagonal": lambda: (Diagonal(), {"diagonal": positive(B, 3, 2), **masses("mass")}, (3, 2)),
    "kron": lambda: (Kron(), kron(covariance(B, 3, 3), covariance(B, 5, 5)), (3, 5)),
    "kron one output": lambda: (Kron(), kron(covariance(B, 1, 1), covariance(B, 5, 5)), (1, 5)),
    "kron diagonal right": lambda: (Kron(), kron(covariance(B, 3, 3), positive(B, 5)), (3, 5)),
    "kron diagonal": lambda: (Kron(), kron(positive(B, 3), positive(B, 5)), (3, 5)),
    "dims 0": lambda: (KronDims(), dims(covariance(B, 1, 1)), ()),
    "dims 1": lambda: (KronDims(), dims(covariance(B, 4, 4)), (4,)),
    "dims 2": lambda: (KronDims(), dims(covariance(B, 3, 3), positive(B, 4)), (3, 4)),
    "dims 3": lambda: (KronDims(), dims(covariance(B, 3, 3), covariance(B, 2, 2), covariance(B, 4, 4)), (3, 2, 4)),
}
SOLVERS: list[Solver] = [
    Cholesky(damping=0.3),
    Cholesky(damping=0.3, split="each"),
    *(
        Eigh(damping=0.3, split=s, mode=mode, power=p)
        for s in ("exact", "pi", "each")
        for mode in ("absolute", "largest", "trace", "clamp", "pseudo")
        for p in (-1.0, -0.3)
        if s != "pi" or mode in ("absolute", "largest", "trace")
    ),
    *(NewtonRoot(damping=1e-2, tolerance=1e-12, mode=mode) for mode in ("absolute", "trace")),
    NewtonRoot(damping=1e-2, tolerance=1e-12),
    NewtonRoot(power=-1.0, damping=1e-3, tolerance=1e-12),
    Division(damping=0.3),
    Division(power=-0.5),
    CG(damping=0.3),
]


def is_legal(representation: Representation, solver: Solver, shape: tuple[int, ...]) -> bool:
    inverts_a_root = isinstance(solver, Cholesky) and isinstance(representation, KronDims) and len(shape) > 1
    return isinstance(representation, solver.needs) and not inverts_a_root


def legal_pairs() -> list[object]:
    pairs = []
    for name, make in CASES.items():
        representation, _, shape = make()
        pairs += [pytest.param(name, s, id=f"{name}-{s}") for s in SOLVERS if is_legal(representation, s, shape)]
    return pairs


# ------------------------------------------------------------------ the judge: dense matrices, one member at a time
def power(A: Tensor, exponent: float) -> Tensor:
    s, Q = torch.linalg.eigh(A)
    return Q @ torch.diag(s**exponent) @ Q.T


def judge(representation: Representation, state: State, solver: Solver, b: int) -> Tensor:
    """``P`` of member ``b``, formed."""
    C = representation.to_dense(state)[b]
    if isinstance(solver, Division):
        return torch.diag(1 / (C.diagonal() ** abs(solver.power) + solver.damping))
    if isinstance(solver, CG) or (isinstance(solver, Eigh) and solver.split == "exact"):
        return damped_power(C, solver.damping, getattr(solver, "mode", "absolute"), solver.exponent)
    return judge_factored(representation, state, solver, b)


def damped_power(A: Tensor, damping: float, mode: str, exponent: float) -> Tensor:
    """Eigenvalue by eigenvalue, in Python numbers."""
    s, Q = torch.linalg.eigh(A)
    values, top = s.tolist(), float(s.max())
    mean = sum(values) / len(values)
    rules = {
        "absolute": lambda x: (x + damping) ** exponent,
        "largest": lambda x: (x + damping * top) ** exponent,
        "trace": lambda x: (x + damping * mean) ** exponent,
        "clamp": lambda x: max(x, damping * top) ** exponent,
        "pseudo": lambda x: x**exponent if x > damping * top else 0.0,
    }
    return Q @ torch.diag(torch.tensor([rules[mode](x) for x in values])) @ Q.T


def judge_factored(representation: Factored, state: State, solver: Solver, b: int) -> Tensor:
    factors = [F[b] if F.ndim == 3 else torch.diag(F[b]) for F in representation.factors(state)]
    m, order = len(factors), representation.order(len(factors))
    out = torch.ones(1, 1)
    mode = getattr(solver, "mode", "absolute")
    if isinstance(solver, NewtonRoot) or solver.split == "each":
        for F in factors:
            out = torch.kron(out, damped_power(F, solver.damping, mode, solver.exponent / order))
        return out
    for F, ridge in zip(factors, ridges_of(factors, solver, order, m, mode), strict=True):
        out = torch.kron(out, power(F + ridge * torch.eye(len(F)), solver.exponent / order))
    return out


def ridges_of(factors: list[Tensor], solver: Solver, order: int, m: int, mode: str) -> list[Tensor | float]:
    tops = [torch.linalg.eigvalsh(F).max() for F in factors]
    t = [torch.trace(F) / len(F) for F in factors]
    damping = solver.damping * {"absolute": 1, "largest": prod(tops), "trace": prod(t)}[mode] ** (1 / order)
    return [damping ** (order / m) * x / prod(t) ** (1 / m) for x in t]


@pytest.mark.parametrize(("name", "solver"), legal_pairs())
def test_solve_is_the_dense_power(name, solver):
    representation, state, shape = CASES[name]()
    before = {key: x.clone() for key, x in state.items()}
    g = torch.randn(B, *shape)
    cache = solver.prepare(representation, state, None)
    out = solver.solve(representation, cache, g)
    assert out.shape == g.shape
    for b in range(B):
        expected = (judge(representation, state, solver, b) @ g[b].reshape(-1)).reshape(shape)
        torch.testing.assert_close(out[b], expected, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(x, before[key]) for key, x in state.items())
    assert all(x.shape[0] == B for x in cache.values())
    assert torch.equal(cache["failures"], torch.zeros(B, dtype=torch.int64))
    check_members_are_independent(representation, state, solver, g, out)
    check_positive_and_symmetric(representation, cache, solver, shape)


def check_members_are_independent(representation: Representation, state: State, solver: Solver, g: Tensor, out: Tensor) -> None:
    for b in range(B):
        alone = {key: x[b : b + 1] for key, x in state.items()}
        single = solver.solve(representation, solver.prepare(representation, alone, None), g[b : b + 1])
        torch.testing.assert_close(single, out[b : b + 1], rtol=1e-12, atol=1e-12)


def check_positive_and_symmetric(representation: Representation, cache: State, solver: Solver, shape: tuple[int, ...]) -> None:
    P = prod(shape)
    columns = [solver.solve(representation, cache, e.expand(B, P).reshape(B, *shape)).reshape(B, P) for e in torch.eye(P)]
    matrix = torch.stack(columns, -1)
    torch.testing.assert_close(matrix, matrix.mT, rtol=1e-8, atol=1e-8)
    singular = getattr(solver, "mode", "") == "pseudo"
    assert torch.linalg.eigvalsh(matrix).min() > (-1e-12 if singular else 0)


def test_every_capability_has_a_solver():
    assert {solver.needs for solver in SOLVERS} == {Factored, Elementwise, Multiplies}
    assert all("definite" in solver.asks for solver in SOLVERS)
    assert not isinstance(Diagonal(), Factored)
    assert not isinstance(Kron(), Elementwise)


def test_solvers_agree():
    representation, state, shape = CASES["dense layer"]()
    g = torch.randn(B, *shape)
    top = torch.linalg.eigvalsh(representation.to_dense(state)).max()
    state["matrix"] /= top  # the relative ridge of the largest member is then the absolute one
    single = {key: x[[int(torch.linalg.eigvalsh(state["matrix"]).amax(-1).argmax())]] for key, x in state.items()}
    solvers = [
        Cholesky(damping=1e-2),
        Eigh(damping=1e-2),
        CG(damping=1e-2),
        NewtonRoot(power=-1.0, damping=1e-2, tolerance=1e-12),
    ]
    results = [s.solve(representation, s.prepare(representation, single, None), g[:1]) for s in solvers]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", [Cholesky, Eigh, CG])
@pytest.mark.parametrize("name", ["dense layer", "kron", "dims 1"])
def test_limits_of_the_damping(solver, name):
    representation, state, shape = CASES[name]()
    g = torch.randn(B, *shape)
    large = solver(damping=1e10)
    torch.testing.assert_close(
        1e10 * large.solve(representation, large.prepare(representation, state, None), g), g, rtol=1e-4, atol=1e-4
    )
    small = solver(damping=1e-14)
    exact = torch.linalg.solve(representation.to_dense(state), g.reshape(B, -1, 1)).reshape(g.shape)
    torch.testing.assert_close(
        small.solve(representation, small.prepare(representation, state, None), g), exact, rtol=1e-4, atol=1e-4
    )


def test_pi_is_one_for_equal_factors_and_balances_scales():
    A, C = covariance(B, 4, 4), covariance(B, 3, 3)
    for ridge in pi_ridges([A, A], 0.3):
        torch.testing.assert_close(ridge, torch.full((B,), 0.3), rtol=1e-12, atol=0)
    solver, g = Cholesky(damping=1e-2), torch.randn(B, 4, 3)
    plain = solver.solve(Kron(), solver.prepare(Kron(), kron(A, C), None), g)
    scaled = solver.solve(Kron(), solver.prepare(Kron(), kron(1e3 * A, C / 1e3), None), g)
    torch.testing.assert_close(scaled, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_pi_is_one_without_a_scale(bad):
    A = covariance(B, 4, 4)
    A[1] = bad
    left, right = pi_ridges([A, covariance(B, 3, 3)], 0.3)
    assert left[1] == right[1] == 0.3
    assert (left[[0, 2]] != 0.3).all()


@pytest.mark.parametrize(
    "solver", [Cholesky(damping=0.1, split="each"), Eigh(damping=0.1), Eigh(damping=0.1, split="pi"), CG(damping=0.1)]
)
def test_zero_curvature_divides_by_the_damping(solver):
    state = {"matrix": torch.zeros(B, 6, 6), "mass": torch.zeros(B)}
    g = torch.randn(B, 3, 2)
    cache = solver.prepare(Dense(), state, None)
    torch.testing.assert_close(solver.solve(Dense(), cache, g), g / 0.1)
    assert not cache["failures"].any()


def test_cg_stops_each_member_by_itself():
    representation, state, shape = CASES["dense layer"]()
    state["matrix"][1] = MASS * torch.eye(6)  # converges in one step
    g = torch.randn(B, *shape)
    g[2] = 0
    g[0] *= 1e-200  # squares underflow
    solver = CG(damping=0.5)
    out = solver.solve(representation, solver.prepare(representation, state, None), g)
    torch.testing.assert_close(out[1], g[1] / 1.5, rtol=1e-14, atol=0)
    assert not out[2].any()
    expected = judge(representation, state, solver, 0) @ (g[0].reshape(-1) * 1e200)
    torch.testing.assert_close(out[0].reshape(-1) * 1e200, expected, rtol=1e-9, atol=1e-9)
    first = CG(damping=0.5, iterations=1)
    assert not torch.allclose(
        first.solve(representation, first.prepare(representation, state, None), g)[0] * 1e200, out[0] * 1e200
    )


def test_cg_holds_the_statistic_of_its_refresh():
    """By reference: what comes later goes into a copy."""
    representation, state, shape = CASES["kron"]()
    solver, g = CG(), torch.randn(B, 3, 5)
    cache = solver.prepare(representation, state, None)
    assert all(cache[k].data_ptr() == x.data_ptr() for k, x in state.items())
    before = solver.solve(representation, cache, g)
    duplicate(representation, state)["left"].zero_()
    assert torch.equal(solver.solve(representation, cache, g), before)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_a_statistic_survives_a_hundred_prepares(solver):
    representation, state, _ = CASES["diagonal" if isinstance(solver, Division) else "kron"]()
    before = {key: x.clone() for key, x in state.items()}
    cache = None
    for _ in range(100):
        cache = solver.prepare(representation, state, cache)
    assert all(torch.equal(x, before[key]) for key, x in state.items())


def test_shampoo_of_one_axis_is_full_matrix_adagrad():
    gradients = torch.randn(12, 5)
    state = {"factor_0": (gradients.T @ gradients).unsqueeze(0), "mass": torch.ones(1)}
    g = torch.randn(1, 5)
    expected = power(gradients.T @ gradients + 1e-3 * torch.eye(5), -0.5) @ g[0]
    solver = Eigh(power=-0.5, damping=1e-3, split="each")
    # One axis: C is the factor itself, so that the ridge of "each" is that of full-matrix AdaGrad.
    torch.testing.assert_close(solver.solve(KronDims(), solver.prepare(KronDims(), state, None), g)[0], expected)


def test_shampoo_without_history_is_the_polar_factor():
    G = torch.randn(1, 4, 4)
    state = {"factor_0": G @ G.mT, "factor_1": G.mT @ G, "mass": torch.ones(1)}
    U, _, Vh = torch.linalg.svd(G)
    for solver in (Eigh(power=-0.5, damping=0.0, split="each"), NewtonRoot(damping=0.0, tolerance=1e-10)):
        out = solver.solve(KronDims(), solver.prepare(KronDims(), state, None), G)
        torch.testing.assert_close(out, U @ Vh, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cholesky(damping=-1.0), r"damping=-1.0: expected 0 <= damping < inf"),
        (lambda: Cholesky(split="exact"), "split='exact': expected pi, each"),
        (lambda: Eigh(split="both"), "split='both': expected exact, pi, each"),
        (lambda: Eigh(power=0.5), "power=0.5: expected -inf < power < 0"),
        (lambda: Eigh(damping=float("nan")), "damping=nan"),
        (lambda: NewtonRoot(iterations=0), "iterations=0: expected 1 <= iterations < inf"),
        (lambda: NewtonRoot(tolerance=0.1), "tolerance=0.1: expected 0 < tolerance < 0.0001"),
        (lambda: Division(damping=0.0), "damping=0.0: expected 0 < damping < inf"),
        (lambda: CG(tolerance=1.0), "tolerance=1.0: expected 0 < tolerance < 1"),
    ],
)
def test_illegal_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_roots_that_a_solver_cannot_take_are_refused():
    representation, state, _ = CASES["dims 2"]()
    with pytest.raises(ValueError, match="use NewtonRoot or Eigh"):
        Cholesky().prepare(representation, state, None)
    with pytest.raises(ValueError, match="expected a whole p; use Eigh"):
        NewtonRoot(power=-0.3).prepare(representation, state, None)
    assert "use NewtonRoot or Eigh" in str(Cholesky().refuse(KronDims()))
    assert "use Eigh" in str(NewtonRoot(power=-0.3).refuse(KronDims()))
    assert all(solver.refuse(Kron()) is None for solver in (Cholesky(), NewtonRoot(), Eigh(), CG()))
    assert all(NewtonRoot(power=power).refuse(KronDims()) is None for power in (-0.5, -1.0, -1 / 3))
