"""Statistics and results of gradients that are given by their rows equal those of the formed gradient, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gradmaker.curvature.evidence import Gradient
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.state import State
from gradmaker.representations import CrossDims, KronDims, KronSum, OneSided, OneWayDims, RootKronDims, TensorNormal
from gradmaker.representations.base import Fold, Frame
from gradmaker.representations.one_sided import ZeroHistory
from gradmaker.representations.roles import FoldsRows
from gradmaker.solvers import AxisMean

CPU = torch.device("cpu")
o, i = 7, 5
HELD: dict[str, Any] = {
    "shampoo": KronDims(),
    "shampoo, balanced": KronDims(exponent=1.0, balanced=True),
    "shampoo, by roots": RootKronDims(),
    "caspr": KronSum(),
    "caspr, by roots": KronSum(square_roots=True),
    "caspr, adaptive": OneWayDims(),
    "kl": CrossDims(),
    "one-sided": OneSided(),
    "newest": ZeroHistory(),
    "tensor-normal": TensorNormal(),
}
FIRST, LATER = Fold(0.0, 0.2, 0.2, first=True), Fold(0.8, 0.2, 0.2)


def batch(rows: int, seed: int, stack: int = 2) -> FactoredGradient:
    draw = torch.Generator().manual_seed(seed)
    g, a = (torch.randn(stack, rows, side, dtype=torch.float64, generator=draw) for side in (o, i))
    return FactoredGradient(g, a)


def close(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, y in expected.items():
        atol = 1e-12 * max(1.0, float(torch.linalg.vector_norm(y.double())))
        torch.testing.assert_close(found[name], y, rtol=1e-12, atol=atol, msg=name)


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("diagonal", [(), (0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("name", HELD)
def test_a_statistic_by_rows_is_that_of_the_gradient(name: str, diagonal: tuple[int, ...], rows: int) -> None:
    held = HELD[name]
    assert isinstance(held, FoldsRows)
    state = held.init(Frame(2, (o, i), frozenset(diagonal), torch.float64, CPU))
    for step in range(4):
        given, fold = batch(rows, step), FIRST if step == 0 else LATER
        before, by_rows = ({k: v.clone() for k, v in state.items()} for _ in range(2))
        held.update(state, Gradient(given.g.mT @ given.a), fold)
        held.update_rows(by_rows, given, fold)
        (squares if "by roots" in name else close)(by_rows, state)
        assert any(not torch.equal(by_rows[k], before[k]) for k in before)
        held.refresh(state)


def test_a_refresh_that_is_due_comes_after_the_rows() -> None:
    held = OneWayDims()
    state = held.init(Frame(2, (o, i), frozenset(), torch.float64, CPU))
    expected = {k: v.clone() for k, v in state.items()}
    for step in range(2):
        held.update_rows(expected, batch(9, step), FIRST)
        held.update_rows(state, batch(9, step), replace(FIRST, refresh=True))
        held.refresh(expected)
    close(state, expected)


def squares(found: State, expected: State) -> None:
    for name in found:
        X, Y = (R.mT @ R if R.ndim == 3 else R.square() for R in (found[name], expected[name]))
        torch.testing.assert_close(X, Y, rtol=1e-12, atol=1e-12)


def test_statistics_of_many_batches_have_the_units_of_one() -> None:
    """A half of the gradient in each of two micro-batches of a step: the second neither decays nor counts."""
    held = KronDims()
    state = held.init(Frame(2, (o, i), frozenset(), torch.float64, CPU))
    for seed, fold in ((1, FIRST), (2, replace(FIRST, beta=1.0, mass=0.0))):
        held.update_rows(state, batch(4, seed), fold)
    G = [x.g.mT @ x.a for x in (batch(4, 1), batch(4, 2))]
    torch.testing.assert_close(state["factor_0"], 0.2 * sum(x @ x.mT for x in G), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(held.factors(state)[1], sum(x.mT @ x for x in G), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", [1, 2, 3, None])
@pytest.mark.parametrize("diagonal", [(), (0,), (1,)], ids=str)
def test_a_mean_over_axes_of_rows(p: int | None, diagonal: tuple[int, ...]) -> None:
    held, solver = KronSum(p), AxisMean()
    state = held.init(Frame(2, (o, i), frozenset(diagonal), torch.float64, CPU))
    for step in range(9):
        held.update_rows(state, batch(4, step), FIRST if step == 0 else LATER)
    cache, given = solver.prepare(held, state, None), batch(3, 11)
    found = solver.solve_rows(held, cache, given)
    assert found.count == (held.passes(2) + 1) * 3
    torch.testing.assert_close(found.form(), solver.solve(held, cache, given.form()), rtol=1e-12, atol=1e-12)


def test_halves_of_a_moment_multiply_to_it() -> None:
    given = batch(3, 5)
    for axis, G in enumerate((given.form(), given.form().mT)):
        X, Y = given.moment_halves(axis)
        assert X.shape[-1] == Y.shape[-2] == 3
        torch.testing.assert_close(X @ Y, G @ G.mT, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(given.moment(axis), G @ G.mT, rtol=1e-12, atol=1e-12)
