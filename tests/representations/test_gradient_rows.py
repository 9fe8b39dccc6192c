"""Held inverses and fitted preconditioners by the rows of a gradient: what the formed gradient gives, to rounding."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from gradmaker.curvature.evidence import Gradient, Pair
from gradmaker.linalg.factored_gradient import FactoredGradient, ProbedRows
from gradmaker.representations import InverseDims, KronPairs, KronQ
from gradmaker.representations.base import Fold, Frame
from gradmaker.representations.geometries import GEOMETRIES
from gradmaker.representations.inverse_dims import Denominator
from gradmaker.solvers import Apply, PositiveRoot
from tests import oracles

STEPS = 6
SHAPES = [(30, 24, 5), (24, 30, 11), (6, 5, 9), (1, 20, 3)]
"""Sides of a matrix and rows of a batch: few rows for both sides, for one, more than both, a single output."""


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def frame(o: int, i: int, diagonal: tuple[int, ...] = (), stack: int = 2) -> Frame:
    return Frame(stack, (o, i), frozenset(diagonal), torch.float64, torch.device("cpu"))


def rows_of(o: int, i: int, R: int, seed: int) -> FactoredGradient:
    return FactoredGradient(randn(2, R, o, seed=seed), randn(2, R, i, seed=seed + 100))


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in state.items()}


@pytest.mark.parametrize("o, i, R", SHAPES)
@pytest.mark.parametrize("diagonal", [(), (1,)])
@pytest.mark.parametrize("denominator", get_args(Denominator))
@pytest.mark.parametrize("beta", [1.0, 0.9, 0.0])
def test_an_inverse_follows_the_rows(o: int, i: int, R: int, diagonal: tuple[int, ...], denominator: Any, beta: float) -> None:
    held = InverseDims(denominator, ridge=1e-3)
    formed, by_rows = (held.init(frame(o, i, diagonal)) for _ in range(2))
    H: dict[int, Tensor] = {}
    for t in range(STEPS):
        rows, fold = rows_of(o, i, R, t), Fold(beta, 1 - beta or 1.0, 1.0, first=t == 0)
        held.update(formed, Gradient(rows.form()), fold)
        held.update_rows(by_rows, rows, fold)
        for axis in (0, 1):
            S = rows.moment(axis) * fold.alpha
            d = S.shape[-1]
            if t == 0 or beta == 0:
                mean = rows.squared_norm() / d
                H[axis] = 1e-3 * mean[:, None, None] * torch.eye(d, dtype=torch.float64)
            H[axis] = (H[axis] * (beta or 1.0)) + S
    estimated = denominator == "op"  # an eigenvalue of the smaller Gram matrix, from below
    for (s, Q), (s_rows, Q_rows) in zip(held.spectra(formed), held.spectra(by_rows), strict=True):
        full, own = (x if U is None else (U * x.unsqueeze(-2)) @ U.mT for x, U in ((s, Q), (s_rows, Q_rows)))
        assert oracles.relative_error(own, full) < (1e-4 if estimated else 4e-13)
    if denominator == "exact":
        for axis, (s, Q) in enumerate(held.spectra(by_rows)):
            if Q is not None:
                expected = torch.linalg.inv(H[axis])
                assert oracles.relative_error((Q * s.unsqueeze(-2)) @ Q.mT, expected) < 1e-10
    rows = rows_of(o, i, R, 99)
    solver = PositiveRoot()
    cache = solver.prepare(held, by_rows, None)
    found = solver.solve_rows(held, cache, rows)
    assert oracles.relative_error(found.form(), solver.solve(held, cache, rows.form())) < 1e-12


@pytest.mark.parametrize("o, i, R", SHAPES)
@pytest.mark.parametrize("diagonal", [(), (1,), (0, 1)])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_fit_follows_the_rows(o: int, i: int, R: int, diagonal: tuple[int, ...], geometry: str) -> None:
    held = KronQ(granularity="tensor", geometry=geometry)
    formed, by_rows = (held.init(frame(o, i, diagonal)) for _ in range(2))
    for t in range(STEPS):
        rows, noise = rows_of(o, i, R, t), randn(2, o, i, seed=t + 500)
        fold = Fold(0.0, 1.0, 1.0, first=t == 0)
        held.update(formed, Pair(noise, rows.form(), "noise_and_gradient"), fold)
        held.update_rows(by_rows, ProbedRows(rows.g, rows.a, noise), fold)
        for name, x in formed.items():
            assert oracles.relative_error(by_rows[name].double(), x.double()) < 1e-12, (t, name)
    rows = rows_of(o, i, R, 99)
    assert Apply().by_rows(held)
    found = Apply().solve_rows(held, by_rows, rows)
    assert isinstance(found, FactoredGradient)
    assert oracles.relative_error(found.form(), Apply().solve(held, by_rows, rows.form())) < 1e-12


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_rows_that_say_nothing_change_nothing(geometry: str) -> None:
    """Zeros, and what is not finite: the member keeps its fit, the other one moves."""
    held = KronQ(granularity="tensor", geometry=geometry)
    state = held.init(frame(8, 7))
    for t, value in enumerate((0.0, torch.nan, torch.inf)):
        rows, noise = rows_of(8, 7, 2, t), randn(2, 8, 7, seed=t)
        rows.g[0] = value
        before = copied(state)
        held.update_rows(state, ProbedRows(rows.g, rows.a, noise), Fold(0.0, 1.0, 1.0))
        assert all(torch.equal(state[name][0], x[0]) for name, x in before.items())
        assert all(not torch.equal(state[name][1], x[1]) for name, x in before.items() if "bound" not in name)


@pytest.mark.parametrize("pairs, limited", [(None, "outputs"), (3, "outputs"), (3, "both")])
def test_bfgs_matrices_multiply_rows(pairs: int | None, limited: Any) -> None:
    held = KronPairs(pairs=pairs, limited=limited)
    state = held.init(frame(8, 7))
    for t in range(5):
        v, y = randn(2, 8, seed=t), randn(2, 8, seed=t + 50)
        held.update(state, Pair(v, y + 2 * v, "output_secant"), Fold(0.9, 0.1, 0.1))
    rows = rows_of(8, 7, 3, 9)
    cache = Apply().prepare(held, state, None)
    assert Apply().by_rows(held)
    found = Apply().solve_rows(held, cache, rows)
    assert isinstance(found, FactoredGradient)
    assert not torch.allclose(found.form(), rows.form())
    assert oracles.relative_error(found.form(), Apply().solve(held, cache, rows.form())) < 1e-12


def test_digits_of_rows_in_float32() -> None:
    """Eigenvalues of the inverse over eight orders of magnitude, by rows in float32 against the formed array in float64."""
    held = InverseDims(ridge=1e-7)
    scales = torch.logspace(0, -1, 40, dtype=torch.float64)
    made = (Frame(1, (40, 36), frozenset(), dtype, torch.device("cpu")) for dtype in (torch.float32, torch.float64))
    states = [held.init(each) for each in made]
    for t in range(4):
        g, a = (randn(1, 6, 40, seed=t) * scales).float(), randn(1, 6, 36, seed=t + 99).float()
        fold = Fold(1.0, 1.0, 1.0, summed=True, first=t == 0)
        held.update_rows(states[0], FactoredGradient(g, a), fold)
        held.update(states[1], Gradient(FactoredGradient(g.double(), a.double()).form()), fold)
    (s, Q), (exact, U) = (held.spectra(state)[0] for state in states)
    assert Q is not None and U is not None
    assert float(exact.max() / exact.min()) > 1e8
    P, P_exact = ((W.double() * x.double().unsqueeze(-2) ** 0.25) @ W.double().mT for x, W in ((s, Q), (exact, U)))
    assert oracles.relative_error(P, P_exact) < 1e-3
    assert oracles.relative_error(P @ U, P_exact @ U) < 1e-3
    steep = ((P - P_exact) @ U).norm(dim=-2) / (P_exact @ U).norm(dim=-2)
    assert float(steep.max()) < 1e-2  # in the direction of every eigenvector
