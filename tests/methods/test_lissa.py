"""LiSSA as published: a fresh sample for every term of the series, several series, and what happens when one grows."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmaker import from_config
from gradmaker.curvature import GaussNewton
from gradmaker.curvature.products import Product
from gradmaker.linalg.state import State
from gradmaker.representations import Implicit
from gradmaker.representations.base import Fold, Frame
from gradmaker.solvers import CG, CurveBall, Krylov, Neumann, TruncatedCG
from gradmaker.triple import Triple, TripleError
from tests import models, oracles
from tests.passes.test_batches import cut
from tests.passes.test_products import dense, step
from tests.solvers.test_matrix_free import P, gradient, matrix

eye = torch.eye(P, dtype=torch.float64)


def solve(solver: Neumann, matrices: list[Tensor], g: Tensor) -> tuple[Tensor, State]:
    """Every product is with the next of the matrices; afterwards none is left over."""
    representation, left = Implicit(), list(matrices)
    state = representation.init(Frame(1, (P,), frozenset(), torch.float64, torch.device("cpu")))
    representation.update(state, Product(lambda v: v @ left.pop(0)), Fold(0.5, 0.5, 0.5))
    cache = solver.prepare(representation, state, None)
    found = solver.solve(representation, cache, g.unsqueeze(0))[0]
    assert not left
    return found, cache


@pytest.mark.parametrize("terms", [1, 2, 4])
def test_two_point_expectation_is_the_series_of_the_mean(terms: int) -> None:
    """Over all sequences of two matrices: unbiased, exactly, because every term has a sample of its own."""
    (A, g), (B, _) = matrix(seed=0), matrix(seed=1)
    solver = Neumann(damping=0.1, terms=terms, scale=4.0)
    found = [solve(solver, list(draws), g)[0] for draws in product((A, B), repeat=terms)]
    M = eye - (0.5 * (A + B) + 0.1 * eye) / 4
    expected = sum((torch.linalg.matrix_power(M, j) @ g for j in range(terms + 1)), torch.zeros_like(g)) / 4
    assert oracles.relative_error(torch.stack(found).mean(0), expected) < 1e-12
    reused = torch.stack([solve(solver, [C] * terms, g)[0] for C in (A, B)]).mean(0)
    assert (oracles.relative_error(reused, expected) > 1e-4) == (terms > 1)  # one sample for all terms would be biased


def test_repeats_are_averaged() -> None:
    (A, g), (B, _) = matrix(seed=0), matrix(seed=1)
    one = [solve(Neumann(damping=0.1, terms=2, scale=4.0), draws, g)[0] for draws in ([A, B], [B, B], [B, A])]
    found, _ = solve(Neumann(damping=0.1, terms=2, scale=4.0, repeats=3), [A, B, B, B, B, A], g)
    assert oracles.relative_error(found, torch.stack(one).mean(0)) < 1e-12


def test_a_series_that_grows_is_cut_and_counted() -> None:
    """One of three repeats meets a matrix far beyond the scale: it ends there, the others are as ever."""
    A, g = matrix()
    found, cache = solve(Neumann(damping=0.1, terms=3, scale=3.0, repeats=3), [A, A, A, 1e9 * A, A, A, A], g)
    assert int(cache["failures"]) == 1 and found.isfinite().all()
    whole, _ = solve(Neumann(damping=0.1, terms=3, scale=3.0), [A, A, A], g)
    assert oracles.relative_error(found, (2 * whole + g / 3) / 3) < 1e-12


def test_scale_is_the_largest_image() -> None:
    """Of ten products; the largest among them may be any."""
    A, g = matrix()
    g = g / g.norm()
    draws = [A] * 3 + [5 * A] + [A] * 6
    v, sizes = g, []
    for C in draws:
        v = C @ (v / v.norm())
        sizes.append(float(v.norm()))
    found, _ = solve(Neumann(damping=0.1, terms=0), draws, g)
    assert sizes.index(max(sizes)) == 3 and oracles.relative_error(found, g / (1.1 * max(sizes) + 0.1)) < 1e-12


# --- as a method ------------------------------------------------------------------------------------------------------------
def matrices() -> dict[tuple[int, ...], Tensor]:
    """Of every pair of the six examples."""
    return {rows: dense(cut(models.mlp, list(rows)), "ggn") for rows in combinations(range(6), 2)}


def test_every_term_draws_anew() -> None:
    """Two terms: one pair of samples explains the step, and the two of a pair are different ones but for chance."""
    case, known, scale = models.mlp(), matrices(), 30.0
    g, unit = gradient(case), torch.eye(len(gradient(case)), dtype=torch.float64)
    shrunk = {rows: unit - (C + 0.05 * unit) / scale for rows, C in known.items()}
    options = {"method": "lissa", "curvature_examples": 2, "terms": 2, "scale": scale, "damping": 0.05}
    maker, seen = from_config(case.model, options), []
    for _ in range(4):
        found = step(maker, case)
        series = {(a, b): (g + shrunk[b] @ (g + shrunk[a] @ g)) / scale for a in known for b in known}
        (drawn,) = [pair for pair, x in series.items() if oracles.relative_error(found, x) < 1e-10]
        seen.append(drawn)
    assert sum(a != b for a, b in seen) >= 3 and len(set(seen)) >= 3


def test_without_samples_it_is_the_series_of_the_batch() -> None:
    case = models.mlp()
    G, g = dense(models.mlp(), "ggn"), gradient(case)
    A = G + 0.05 * torch.eye(len(g), dtype=torch.float64)
    M = torch.eye(len(g), dtype=torch.float64) - A / 9
    expected = sum((torch.linalg.matrix_power(M, j) @ g for j in range(8)), torch.zeros_like(g)) / 9
    found = step(from_config(case.model, {"method": "lissa", "terms": 7, "scale": 9.0, "damping": 0.05}), case)
    assert oracles.relative_error(found, expected) < 1e-10


def test_many_repeats_approach_it() -> None:
    """Five sigma of the mean of 400 estimates."""
    options: dict[str, Any] = {"method": "lissa", "terms": 3, "scale": 20.0, "damping": 0.05}
    case = models.mlp()
    expected = step(from_config(case.model, options), case)
    one = from_config(case.model, {**options, "curvature_examples": 2})
    draws = torch.stack([step(one, case) for _ in range(60)])
    found = step(from_config(case.model, {**options, "curvature_examples": 2, "repeats": 400}), case)
    sigma = draws.std(0) / 400**0.5
    assert ((found - expected).abs() <= 5 * sigma + 1e-12).all() and float(sigma.max()) > 1e-5


def test_scale_of_a_whole_batch_may_be_too_small_for_its_samples() -> None:
    """Counted, and finite in every step."""
    case = models.mlp()
    maker: Any = from_config(case.model, {"method": "lissa", "curvature_examples": 1, "terms": 400, "scale": 0.1})
    assert step(maker, case).isfinite().all()
    assert int(maker.plan.blocks[0].cache["failures"]) == 1


@pytest.mark.parametrize("solver", [CG(), TruncatedCG(), Krylov(), CurveBall()], ids=lambda s: type(s).__name__)
def test_other_solvers_refuse_a_matrix_that_changes(solver: Any) -> None:
    with pytest.raises(TripleError, match=r"one and the same matrix .* Solvers that fit GaussNewton in Implicit: Neumann$"):
        Triple(GaussNewton(examples=2, fresh=True), Implicit(), solver)
    Triple(GaussNewton(examples=2), Implicit(), solver)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="examples="):
        GaussNewton(fresh=True)
    for bad in ({"repeats": 0, "curvature_examples": 2}, {"terms": -1}, {"repeats": 3}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            from_config(nn.Linear(2, 2), {"method": "lissa", **bad})
