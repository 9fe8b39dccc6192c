"""Triangular factors in place of inverses: when, that they are the same preconditioner, and what happens if they fail."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import from_config
from gradmaker.linalg.eigen import add_ridge
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.state import State
from gradmaker.linalg.triangles import factor, holds_triangle, triangle_of_inverse
from gradmaker.representations import Dense, Kron
from gradmaker.solvers import Cholesky

CPU = torch.device("cpu")
o, i = 66, 80


def covariance(stack: int, d: int) -> Tensor:
    x = torch.randn(stack, d, 2 * d, dtype=torch.float64)
    return x @ x.mT / (2 * d)


def kron(stack: int = 3) -> State:
    left, right = covariance(stack, o), covariance(stack, i)
    mass = torch.ones(stack, dtype=torch.float64)
    return {"left": left, "right": right, "left_mass": mass, "right_mass": mass}


# --- when -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("interval", "side", "rows", "triangle"),
    [
        (1, 785, 512, True),
        (3, 785, 512, True),
        (4, 785, 512, False),
        (10, 785, 128, True),
        (10, 512, 128, False),
        (100, 513, 10, True),
        (1, 10, 1, False),
        (1, 63, 1, False),
        (None, 785, 1, False),
    ],
)
def test_the_form_by_time(interval: int | None, side: int, rows: int, triangle: bool) -> None:
    assert holds_triangle(interval, side, rows, CPU) is triangle
    assert not holds_triangle(interval, side, rows, torch.device("meta"))  # elsewhere products are faster than solves


def test_methods_tell_the_solver_their_interval() -> None:
    model = nn.Linear(70, 66)
    for interval, name in ((1, "triangle"), (50, "root")):
        for method in ("kfac", "kflr", "kfra"):
            maker: Any = from_config(model, {"method": method, "preconditioner_interval": interval})
            assert maker.plan.blocks[0].triple.solver.interval == interval
            assert {k.split("_")[0] for k in maker.plan.blocks[0].empty_cache()} >= {name}
    with pytest.raises(ValueError, match="interval=0"):
        Cholesky(interval=0)


# --- the same preconditioner ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("split", ["pi", "each"])
def test_both_forms_are_one_preconditioner(split: Any) -> None:
    state, g = kron(), torch.randn(3, o, i, dtype=torch.float64)
    short, long = Cholesky(damping=1e-3, split=split, interval=1), Cholesky(damping=1e-3, split=split)
    a, b = short.prepare(Kron(), state, None), long.prepare(Kron(), state, None)
    assert {"triangle_0", "triangle_1"} <= set(a) and {"root_0", "root_1"} <= set(b)
    expected = long.solve(Kron(), b, g)
    scale = float(expected.abs().max())
    torch.testing.assert_close(short.solve(Kron(), a, g), expected, rtol=0, atol=1e-12 * scale)
    rows = FactoredGradient(torch.randn(3, 7, o, dtype=torch.float64), torch.randn(3, 7, i, dtype=torch.float64))
    for solver, cache in ((short, a), (long, b)):
        formed, by_rows = solver.solve(Kron(), cache, rows.form()), solver.solve_rows(Kron(), cache, rows).form()
        torch.testing.assert_close(by_rows, formed, rtol=0, atol=1e-12 * float(formed.abs().max()))
    dense = {"matrix": covariance(2, o), "mass": torch.ones(2, dtype=torch.float64)}
    v = torch.randn(2, o, dtype=torch.float64)
    found, other = (s.solve(Dense(), s.prepare(Dense(), dense, None), v) for s in (short, long))
    torch.testing.assert_close(found, other, rtol=1e-11, atol=1e-11)


def test_a_diagonal_side_is_held_as_it_was() -> None:
    state = kron() | {"right": torch.rand(3, i, dtype=torch.float64) + 0.1}
    solver = Cholesky(interval=1)
    cache = solver.prepare(Kron(), state, None)
    assert {"triangle_0", "root_1"} <= set(cache)
    g = torch.randn(3, o, i, dtype=torch.float64)
    expected = Cholesky().solve(Kron(), Cholesky().prepare(Kron(), state, None), g)
    torch.testing.assert_close(solver.solve(Kron(), cache, g), expected, rtol=1e-11, atol=1e-11)


def test_padded_sides_are_factored_alike() -> None:
    A = covariance(2, 256)
    U, info = factor(A)
    assert info.tolist() == [0, 0] and U.shape == A.shape and U.is_contiguous()
    torch.testing.assert_close(U.mT, torch.linalg.cholesky(A), rtol=1e-12, atol=1e-12)
    bad = A.clone()
    bad[1, -1, -1] = -1.0
    assert [bool(x) for x in factor(bad)[1]] == [False, True]


# --- failures -------------------------------------------------------------------------------------------------------------
def spoilt(A: Tensor, how: str) -> Tensor:
    if how == "indefinite":
        s, Q = torch.linalg.eigh(A)
        return Q @ torch.diag(torch.cat([-0.2 * s[-1:], s[1:]])) @ Q.T
    bad = A.clone()
    bad[{"nan above": (1, 60), "nan below": (60, 1), "inf": (5, 5)}[how]] = torch.inf if how == "inf" else torch.nan
    return bad


@pytest.mark.parametrize("how", ["indefinite", "nan above", "nan below", "inf"])
@pytest.mark.parametrize("interval", [1, None])
def test_one_bad_member_keeps_its_past(how: str, interval: int | None) -> None:
    solver, old, new = Cholesky(interval=interval), kron(), kron()
    past = solver.prepare(Kron(), old, None)
    good = solver.prepare(Kron(), new, past)
    new["left"][1] = spoilt(new["left"][1], how)
    cache = solver.prepare(Kron(), new, past)
    assert cache["failures"].tolist() == [0, 1, 0] and cache["failing"].tolist() == [0, 1, 0]
    for name in cache:
        assert torch.equal(cache[name][[0, 2]], good[name][[0, 2]]), name
        if name not in ("failures", "failing"):
            assert torch.equal(cache[name][1], past[name][1]), name
    g = torch.randn(3, o, i, dtype=torch.float64)
    first = solver.prepare(Kron(), new, None)
    torch.testing.assert_close(solver.solve(Kron(), first, g)[1], g[1] / solver.damping)


def test_a_ridge_that_repairs_gives_both_forms_the_same() -> None:
    A = spoilt(covariance(1, o)[0], "indefinite").unsqueeze(0)
    A = A + 0.199 * torch.linalg.eigvalsh(A)[:, -1:, None] * torch.eye(o, dtype=torch.float64)
    state, g = {"matrix": A, "mass": torch.ones(1, dtype=torch.float64)}, torch.randn(1, o, dtype=torch.float64)
    found = []
    for solver in (Cholesky(damping=1e-6, interval=1), Cholesky(damping=1e-6)):
        cache = solver.prepare(Dense(), state, None)
        assert cache["failures"].tolist() == [0] and cache["diagnosis"][0, 0, 4] > 0
        found.append(solver.solve(Dense(), cache, g))
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("interval", [1, None])
@pytest.mark.parametrize("entry", [(3, 1), (40, 40), (65, 0)])
def test_a_silently_wrong_entry_is_noticed_and_repaired(
    monkeypatch: pytest.MonkeyPatch, interval: int | None, entry: tuple[int, int]
) -> None:
    state, solver = {k: x.float() for k, x in kron(1).items()}, Cholesky(interval=interval)
    g = torch.randn(1, o, i)
    expected = solver.solve(Kron(), solver.prepare(Kron(), state, None), g)
    original, calls = torch.linalg.cholesky_ex, []

    def wrong(A: Tensor) -> Any:
        L, info = original(A)
        calls.append(A.dtype)
        if len(calls) <= 2:  # the first attempts at both factors
            L[(0, *entry)] += 1e-2
        return L, info

    monkeypatch.setattr(torch.linalg, "cholesky_ex", wrong)
    cache = solver.prepare(Kron(), state, None)
    assert len(calls) == 4 and not cache["failures"].any() and not cache["diagnosis"][..., 4].any()
    torch.testing.assert_close(solver.solve(Kron(), cache, g), expected, rtol=1e-4, atol=1e-4)


def test_triangles_that_always_fail_end_at_eigh(monkeypatch: pytest.MonkeyPatch) -> None:
    state, g, solver = kron(1), torch.randn(1, o, i, dtype=torch.float64), Cholesky(interval=1)
    expected = solver.solve(Kron(), solver.prepare(Kron(), state, None), g)
    original = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda A: (original(A)[0] * torch.nan, original(A)[1] + 1))
    cache = solver.prepare(Kron(), state, None)
    assert not cache["failures"].any() and (cache["diagnosis"][..., 4] > 0).all()
    torch.testing.assert_close(solver.solve(Kron(), cache, g), expected, rtol=1e-9, atol=1e-9)


# --- saved ----------------------------------------------------------------------------------------------------------------
def run(maker: Any, model: nn.Module, steps: int) -> list[Tensor]:
    torch.manual_seed(5)
    for _ in range(steps):
        x, t = torch.randn(12, 70, dtype=torch.float64), torch.randint(0, 66, (12,))
        model.zero_grad()
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), t)
        maker.forward_and_backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(("saved", "loaded"), [(1, 1000), (1000, 1)])
def test_a_state_is_loaded_under_another_interval(saved: int, loaded: int) -> None:
    """Its next solve applies what was saved, in the other form."""
    torch.manual_seed(0)
    model = nn.Linear(70, 66).double()
    common = {"method": "kfac", "damping": 1e-2, "warmup_steps": 2, "curvature_interval": 1000, "stagger": False}
    first: Any = from_config(model, common | {"preconditioner_interval": saved})
    run(first, model, 2)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    other: Any = from_config(model, common | {"preconditioner_interval": loaded})
    other.load_state_dict(torch.load(file, weights_only=True))
    block, held = first.plan.blocks[0], other.plan.blocks[0]
    assert ("triangle_0" in held.cache) == (loaded == 1) and ("triangle_0" in block.cache) == (saved == 1)
    g = torch.randn(1, 66, 71, dtype=torch.float64)
    torch.testing.assert_close(held.applied(held.cache, g), block.applied(block.cache, g), rtol=1e-9, atol=1e-9)
    assert run(other, model, 1)[0].isfinite().all()


def test_a_triangle_of_an_inverse_in_float32() -> None:
    A = add_ridge(covariance(2, 64), torch.full((2,), 0.1, dtype=torch.float64)).float()
    U = triangle_of_inverse(torch.linalg.inv(A))
    torch.testing.assert_close(U.mT @ U, A, rtol=1e-4, atol=1e-5)
    assert not triangle_of_inverse(torch.zeros(1, 3, 3)).any()
