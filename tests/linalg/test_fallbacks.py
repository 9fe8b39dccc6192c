"""What happens to a block that cannot be factorised, and that it happens to no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gradmaker.linalg.state import State
from gradmaker.representations.dense import Dense
from gradmaker.representations.diagonal import Diagonal
from gradmaker.representations.kronecker import Kron
from gradmaker.solvers.base import Solver
from gradmaker.solvers.cholesky import Cholesky
from gradmaker.solvers.conjugate_gradient import CG
from gradmaker.solvers.division import Division
from gradmaker.solvers.eigh import Eigh
from gradmaker.solvers.newton_root import NewtonRoot

B, o, i = 4, 6, 9
FACTORED: list[Solver] = [
    Cholesky(),
    Cholesky(split="each"),
    Eigh(),
    Eigh(split="pi"),
    Eigh(split="each", mode="largest", power=-0.5),
    NewtonRoot(),
]


def covariance(stack: int, d: int) -> Tensor:
    x = torch.randn(stack, d, 4 * d)
    return x @ x.mT / (4 * d)


def healthy(diagonal: bool = False) -> State:
    right = torch.rand(B, i) + 0.1 if diagonal else covariance(B, i)
    return {"left": covariance(B, o), "right": right, "left_mass": torch.ones(B), "right_mass": torch.ones(B)}


def indefinite(d: int, smallest: float) -> Tensor:
    s = torch.linspace(0.1, 1, d)
    s[0] = smallest
    Q, _ = torch.linalg.qr(torch.randn(d, d))
    return Q @ torch.diag(s) @ Q.T


BAD: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda F: torch.full_like(F, torch.nan),
    "one nan": lambda F: F.index_fill(0, torch.tensor([0]), torch.nan),
    "inf": lambda F: torch.full_like(F, torch.inf),
    "indefinite": lambda F: indefinite(len(F), -0.2) if F.ndim == 2 else F - 0.9 * F.max(),
}


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("solver", FACTORED, ids=str)
def test_one_bad_member_keeps_its_past_and_is_counted(solver, bad, diagonal):
    old, new = healthy(diagonal), healthy(diagonal)
    g = torch.randn(B, o, i)
    past = solver.prepare(Kron(), old, None)
    good = solver.prepare(Kron(), new, past)
    side = "right" if diagonal else "left"
    new[side][2] = BAD[bad](new[side][2])
    before = {name: x.clone() for name, x in new.items()}
    cache = solver.prepare(Kron(), new, past)
    others = [0, 1, 3]
    for name in cache:
        assert torch.equal(cache[name][others], good[name][others]), name
    assert cache["failures"].tolist() == [0, 0, 1, 0]
    assert torch.equal(solver.solve(Kron(), cache, g)[2], solver.solve(Kron(), past, g)[2])
    assert torch.equal(solver.solve(Kron(), cache, g)[others], solver.solve(Kron(), good, g)[others])
    again = solver.prepare(Kron(), new, cache)
    assert again["failures"].tolist() == [0, 0, 2, 0]
    assert all(torch.equal(x.nan_to_num(7), before[name].nan_to_num(7)) for name, x in new.items())
    back = solver.prepare(Kron(), old, again)
    assert back["failures"].tolist() == [0, 0, 2, 0]
    torch.testing.assert_close(back["failures"], again["failures"])
    assert torch.equal(solver.solve(Kron(), back, g), solver.solve(Kron(), past, g))


@pytest.mark.parametrize("solver", FACTORED, ids=str)
def test_without_a_past_a_bad_member_acts_as_zero_curvature(solver):
    state, g = healthy(), torch.randn(B, o, i)
    state["right"][1] = torch.nan
    cache = solver.prepare(Kron(), state, None)
    relative = getattr(solver, "mode", "absolute") != "absolute"
    gain = 1.0 if relative else solver.damping**solver.exponent
    torch.testing.assert_close(solver.solve(Kron(), cache, g)[1], gain * g[1])
    assert cache["failures"].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("solver", [Division(), CG()], ids=str)
def test_division_and_cg_keep_the_past(solver):
    state = {"diagonal": torch.rand(B, o) + 0.1, "mass": torch.ones(B)}
    g = torch.randn(B, o)
    past = solver.prepare(Diagonal(), state, None)
    expected = solver.solve(Diagonal(), past, g)
    state = {k: v.clone() for k, v in state.items()}
    state["diagonal"][2] = torch.nan
    cache = solver.prepare(Diagonal(), state, past)
    assert cache["failures"].tolist() == [0, 0, 1, 0]
    assert torch.equal(solver.solve(Diagonal(), cache, g), expected)
    fresh = solver.solve(Diagonal(), solver.prepare(Diagonal(), state, None), g)
    torch.testing.assert_close(fresh[2], g[2] / solver.damping)


@pytest.mark.parametrize("solver", [NewtonRoot(), Eigh(split="each", mode="largest")], ids=str)
def test_a_zero_matrix_has_no_scale(solver):
    state, g = healthy(), torch.randn(B, o, i)
    past = solver.prepare(Kron(), state, None)
    state["left"][3] = 0
    cache = solver.prepare(Kron(), state, past)
    assert cache["failures"].tolist() == [0, 0, 0, 1]
    assert torch.equal(solver.solve(Kron(), cache, g)[3], solver.solve(Kron(), past, g)[3])


# ------------------------------------------------------------------ the fallbacks
def dense(matrix: Tensor) -> State:
    return {"matrix": matrix.unsqueeze(0), "mass": matrix.new_ones(1)}


@pytest.mark.parametrize(("smallest", "retries"), [(-3e-7, 0), (-3e-6, 1), (-3e-4, 3), (-3e-2, 5)])
@pytest.mark.parametrize("solver", [NewtonRoot(power=-0.25), Cholesky(damping=1e-6)], ids=str)
def test_the_first_ridge_that_repairs_is_taken(solver, smallest, retries):
    A = indefinite(32, smallest)  # lambda_max is one
    cache = solver.prepare(Dense(), dense(A), None)
    assert cache["failures"].tolist() == [0]
    s, Q = torch.linalg.eigh(A.double())
    errors = {}
    for k in range(6):
        damped = s + 1e-6 * 10**k
        if damped.min() > 0:
            expected = Q @ torch.diag(damped**solver.exponent) @ Q.T
            errors[k] = float((cache["root_0"][0] - expected).norm() / expected.norm())
    assert min(errors, key=errors.__getitem__) == retries


@pytest.mark.parametrize("solver", [NewtonRoot(power=-0.25), NewtonRoot(), Cholesky(damping=1e-3)], ids=str)
def test_one_negative_direction_among_many_is_rejected(solver):
    """Its share of the largest entry of the residual is about ``1/d``."""
    cache = solver.prepare(Dense(), dense(indefinite(300, -0.2)), None)
    assert cache["failures"].tolist() == [1]


@pytest.mark.parametrize("power", [-1.0, -0.5, -0.25])
@pytest.mark.parametrize("d", [64, 300])
def test_a_rank_deficient_statistic_needs_no_larger_ridge(d, power):
    """The normal case: fewer examples than features. Everything then depends on the ridge, so a retry would be visible."""
    for _ in range(4):
        x, g = torch.randn(d // 4, d), torch.randn(1, d)
        solver, state = NewtonRoot(power=power), dense(x.T @ x)
        out = solver.solve(Dense(), solver.prepare(Dense(), state, None), g)
        double = {name: value.double() for name, value in state.items()}
        expected = solver.solve(Dense(), solver.prepare(Dense(), double, None), g.double())
        assert float((out - expected).norm() / expected.norm()) < 0.2  # ten times the ridge: 0.9


def counting(
    monkeypatch: pytest.MonkeyPatch, name: str, wrapper: Callable[[Callable[..., Any], Tensor], Any]
) -> list[torch.dtype]:
    """Replace a torch.linalg function; returns the dtypes that it was called with."""
    original, called = getattr(torch.linalg, name), []

    def replacement(A: Tensor) -> Any:
        called.append(A.dtype)
        return wrapper(original, A)

    monkeypatch.setattr(torch.linalg, name, replacement)
    return called


def raising(original: Callable[..., Any], A: Tensor) -> Any:
    if A.dtype == torch.float32:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")
    return original(A)


@pytest.mark.parametrize("split", ["exact", "pi", "each"])
def test_eigh_that_raises_is_repeated_in_float64(monkeypatch, split):
    solver, state, g = Eigh(split=split, damping=1e-2), healthy(), torch.randn(B, o, i)
    oracle = solver.prepare(Kron(), {name: x.double() for name, x in state.items()}, None)
    called = counting(monkeypatch, "eigh", raising)
    cache = solver.prepare(Kron(), state, None)
    assert torch.float64 in called
    assert not cache["failures"].any()
    out, expected = solver.solve(Kron(), cache, g), solver.solve(Kron(), oracle, g.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    assert all(x.dtype == torch.float32 for name, x in cache.items() if name not in ("failures", "failing"))


def test_eigh_that_raises_for_one_member_spares_the_others(monkeypatch):
    solver, state = Eigh(), healthy()
    good = solver.prepare(Kron(), state, None)
    culprit = state["left"][1].clone()

    def raises_for_one(original: Callable[..., Any], A: Tensor) -> Any:
        if A.shape[-1] == o and (A.float() - culprit).abs().amax((-2, -1)).min() < 1e-6:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return original(A)

    counting(monkeypatch, "eigh", raises_for_one)
    cache = solver.prepare(Kron(), state, good)
    assert cache["failures"].tolist() == [0, 1, 0, 0]
    for name in ("scale", "basis_0", "basis_1"):
        assert torch.equal(cache[name], good[name])


@pytest.mark.parametrize("which", ["values", "vectors"])
def test_a_silently_wrong_eigh_is_noticed(monkeypatch, which):
    def wrong(original: Callable[..., Any], A: Tensor) -> Any:
        s, Q = original(A)
        factors = (2, 1) if which == "values" else (1, 2)
        return (factors[0] * s, factors[1] * Q) if A.dtype == torch.float32 else (s, Q)

    solver, state, g = Eigh(), healthy(), torch.randn(B, o, i)
    expected = solver.solve(Kron(), solver.prepare(Kron(), state, None), g)
    called = counting(monkeypatch, "eigh", wrong)
    cache = solver.prepare(Kron(), state, None)
    assert torch.float64 in called
    torch.testing.assert_close(solver.solve(Kron(), cache, g), expected, rtol=1e-3, atol=1e-3)


def test_a_cholesky_that_always_fails_ends_at_eigh(monkeypatch):
    solver, state, g = Cholesky(), healthy(), torch.randn(B, o, i)
    expected = solver.solve(Kron(), solver.prepare(Kron(), state, None), g)
    dtypes = counting(monkeypatch, "cholesky_ex", lambda original, A: (original(A)[0] * torch.nan, original(A)[1] + 1))
    eighs = counting(monkeypatch, "eigh", lambda original, A: original(A))
    cache = solver.prepare(Kron(), state, None)
    per_factor = [torch.float32] * 7 + [torch.float64]  # by certificate, by residual, five larger ridges, float64
    assert sorted(map(str, dtypes)) == sorted(map(str, per_factor * 2))
    assert eighs == [torch.float64] * 2
    assert not cache["failures"].any()
    torch.testing.assert_close(solver.solve(Kron(), cache, g), expected, rtol=1e-3, atol=1e-3)


def test_only_failed_members_are_tried_again(monkeypatch):
    sizes = []
    state = healthy()
    state["left"][1] = indefinite(o, -0.2)
    solver = Cholesky()
    past = solver.prepare(Kron(), healthy(), None)
    original = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda A: (sizes.append(tuple(A.shape)), original(A))[1])
    solver.prepare(Kron(), state, past)
    assert sizes[:2] == [(B, o, o), (B, i, i)]
    assert set(sizes[2:]) == {(1, o, o)}


def global_settings() -> tuple[object, ...]:
    return torch.get_default_dtype(), torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()


def test_nothing_global_is_touched():
    state = healthy() | {"left": torch.full((B, o, o), torch.nan)}
    before, random = global_settings(), torch.get_rng_state()
    for solver in FACTORED:
        solver.prepare(Kron(), state, None)
    assert global_settings() == before
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("solver", [*FACTORED, CG()], ids=str)
def test_one_host_read_in_prepare_and_none_in_solve(monkeypatch, solver):
    """A tensor on the device ``meta`` has no values: reading one raises, and the paths are those of a GPU."""
    reads = []
    monkeypatch.setattr(Tensor, "tolist", lambda self: (reads.append(self.shape), [[True] * B] * 2)[1])
    state = {name: x.to("meta") for name, x in healthy().items()}
    cache = solver.prepare(Kron(), state, None)
    cache = solver.prepare(Kron(), state, cache)
    assert reads == ([] if isinstance(solver, CG) else [(2, B)] * 2)  # one flag a factor and member, in one read
    assert solver.solve(Kron(), cache, torch.empty(B, o, i, device="meta")).shape == (B, o, i)
    assert len(reads) == (0 if isinstance(solver, CG) else 2)
    with pytest.raises(RuntimeError):
        bool(state["left"].any())


def test_a_silently_wrong_inverse_is_noticed(monkeypatch):
    state, g, solver = healthy(), torch.randn(B, o, i), Cholesky()
    expected = solver.solve(Kron(), solver.prepare(Kron(), state, None), g)
    original = torch.cholesky_inverse
    monkeypatch.setattr(torch, "cholesky_inverse", lambda L: original(L) * (2 if L.dtype == torch.float32 else 1))
    cache = solver.prepare(Kron(), state, None)
    assert not cache["failures"].any()
    torch.testing.assert_close(solver.solve(Kron(), cache, g), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("power", [-1.0, -0.5, -0.25])
def test_newton_notices_one_negative_direction_of_an_ill_conditioned_matrix(power):
    """Its share of the entries is ``1/d``, and the tolerance is wide where the matrix is ill-conditioned."""
    d = 300
    Q, _ = torch.linalg.qr(torch.cat([torch.ones(d, 1), torch.randn(d, d - 1)], 1))
    s = torch.logspace(-4, 0, d)
    s[0] = -0.2
    A = Q @ torch.diag(s) @ Q.T
    assert NewtonRoot(power=power).prepare(Dense(), dense(A), None)["failures"].tolist() == [1]
