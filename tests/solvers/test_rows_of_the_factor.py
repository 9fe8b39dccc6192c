"""`FactorWoodbury` on the rows of the factor itself, against the inverse of the formed factor."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.state import State
from gradmaker.representations import KronRows
from gradmaker.solvers import FactorWoodbury
from tests import oracles

ROWS, OUT, IN = 6, 20, 30
SOLVER, HELD = FactorWoodbury(damping=1e-2), KronRows()


def rows(seed: int, side: int) -> Tensor:
    return torch.randn(1, ROWS, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def state(g: Tensor, a: Tensor) -> State:
    mass = torch.full((1,), 3.0, dtype=torch.float64)
    return {"left_rows": g, "right_rows": a, "left_mass": mass, "right_mass": 2 * mass}


def expected(held: State, G: Tensor) -> Tensor:
    B, A = (held[f"{s}_rows"][0].mT @ held[f"{s}_rows"][0] / held[f"{s}_mass"] for s in ("left", "right"))
    pi = ((A.trace() / IN) / (B.trace() / OUT)) ** 0.5
    ridge = SOLVER.damping**0.5
    eye_o, eye_i = torch.eye(OUT, dtype=torch.float64), torch.eye(IN, dtype=torch.float64)
    return torch.linalg.inv(B + ridge / pi * eye_o) @ G[0] @ torch.linalg.inv(A + pi * ridge * eye_i)


def test_the_rows_of_the_factor_are_pushed_through_its_inverse() -> None:
    held = state(rows(0, OUT), rows(1, IN))
    cache = SOLVER.prepare(HELD, held, None)
    for g, a in ((rows(0, OUT), rows(1, IN)), (rows(2, OUT), rows(1, IN)), (rows(2, OUT), rows(3, IN))):
        found = SOLVER.solve_rows(HELD, cache, FactoredGradient(g, a)).form()
        assert oracles.relative_error(found[0], expected(held, g.mT @ a)) < 1e-11


def test_rows_that_differ_in_one_entry_are_not_taken_for_those_of_the_factor() -> None:
    held = state(rows(0, OUT), rows(1, IN))
    cache = SOLVER.prepare(HELD, held, None)
    a = rows(1, IN)
    a[0, -1, -1] += 100.0
    found = SOLVER.solve_rows(HELD, cache, FactoredGradient(rows(0, OUT), a)).form()
    assert oracles.relative_error(found[0], expected(held, rows(0, OUT).mT @ a)) < 1e-11


def test_a_refresh_that_fails_gives_zero_curvature_to_its_own_rows() -> None:
    a = rows(1, IN)
    a[0, 0, 0] = torch.nan
    held = state(rows(0, OUT), a)
    cache = SOLVER.prepare(HELD, held, None)
    found = SOLVER.solve_rows(HELD, cache, FactoredGradient(rows(0, OUT), rows(1, IN))).form()
    assert oracles.relative_error(found, rows(0, OUT).mT @ rows(1, IN) / SOLVER.damping) < 1e-11
