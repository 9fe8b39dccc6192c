"""Every solver and representation that takes rows does with them what it does with the formed gradient."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gradmaker import by_rows
from gradmaker.curvature import CURVATURES
from gradmaker.curvature.evidence import Gradient
from gradmaker.curvature.evidence_kinds import kinds
from gradmaker.curvature.row_gradient import RowGradient
from gradmaker.linalg.factored_gradient import FactoredGradient, transform_rows
from gradmaker.methods.custom import CustomGradientConfig, CustomGradientMaker
from gradmaker.representations import REPRESENTATIONS, KronDims
from gradmaker.representations.base import Fold, Frame
from gradmaker.representations.roles import FoldsRows
from gradmaker.solvers import SOLVERS
from gradmaker.solvers.roles import AppliesRows
from gradmaker.triple import legality
from tests import models, oracles

O, I, R = 9, 13, 6  # noqa: E741

LEGAL = [row[:3] for row in legality() if row[3] is None and isinstance(SOLVERS[row[2]](), AppliesRows)]
APPLY = list({row[1:]: row for row in LEGAL}.values())  # one curvature for each pair
FOLD = [name for name, part in REPRESENTATIONS.items() if issubclass(part, FoldsRows) and kinds(Gradient) <= part.takes]


def rows(members: int = 1, seed: int = 0) -> FactoredGradient:
    generator = torch.Generator().manual_seed(seed)
    g, a = (torch.randn(members, R, d, generator=generator, dtype=torch.float64) for d in (O, I))
    return FactoredGradient(g, a)


def test_what_rows_say_of_their_product() -> None:
    given = rows(3)
    G = given.form()
    assert given.shape == tuple(G.shape) and given.count == R
    torch.testing.assert_close(given.moment(0), G @ G.mT)
    torch.testing.assert_close(given.moment(1), G.mT @ G)
    torch.testing.assert_close(given.length(), torch.linalg.matrix_norm(G))
    torch.testing.assert_close(given.scaled(torch.tensor([1.0, 2.0, 3.0])).form()[2], 3 * G[2])
    assert bool(given.bound() >= torch.linalg.vector_norm(G))
    left, right = (torch.randn(3, d, d, dtype=torch.float64) for d in (O, I))
    torch.testing.assert_close(transform_rows([left, right], given).form(), left @ G @ right.mT)
    torch.testing.assert_close(transform_rows([left], given).form(), left @ G)
    torch.testing.assert_close(transform_rows([None, right[..., 0]], given).form(), G * right[:, None, :, 0])


def test_rows_that_cancel_have_the_length_zero() -> None:
    g, a = torch.randn(1, 1, O), torch.randn(1, 1, I)
    assert FactoredGradient(torch.cat([g, -g], 1), torch.cat([a, a], 1)).length() >= 0


@pytest.mark.parametrize("planted", [float("inf"), float("nan"), 1e300])
def test_a_bound_shows_what_is_not_finite(planted: float) -> None:
    given = rows()
    given.a[0, 2, 3] = planted
    given.g[0, 2, 3] *= 1e20
    assert not bool(given.bound().isfinite())


def maker_of(row: tuple[str, str, str]) -> CustomGradientMaker:
    """A maker of a triple after three steps, on a layer that is no stack."""
    curvature, label, solver = row
    name, _, grain = label.rstrip(")").partition("(")
    part = REPRESENTATIONS[name](**({"granularity": grain} if grain else {}))
    case = models.mlp()
    config = CustomGradientConfig(curvature=CURVATURES[curvature](), representation=part, solver=SOLVERS[solver]())
    maker = CustomGradientMaker(case.model, config)
    for k in range(3):
        case.model.zero_grad()
        maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t.roll(k, 0))
        maker.forward_and_backward()
    return maker


@pytest.mark.parametrize("row", APPLY, ids="-".join)
def test_solutions_by_rows(row: tuple[str, str, str]) -> None:
    for block in maker_of(row).plan.blocks:
        solver, representation, shape = block.triple.solver, block.triple.representation, block.frame.shape
        assert isinstance(solver, AppliesRows)
        if not block.cache or len(shape) != 2 or not solver.by_rows(representation):
            continue
        g, a = (torch.randn(block.frame.stack, 4, d, dtype=torch.float64) for d in shape)
        given = FactoredGradient(g, a)
        expected = solver.solve(representation, block.cache, given.form())
        found = solver.solve_rows(representation, block.cache, given)
        assert relative(found if isinstance(found, Tensor) else found.form(), expected) < 1e-12


def frames() -> Iterator[Frame]:
    for diagonal in (frozenset[int](), frozenset([0]), frozenset([1])):
        yield Frame(2, (O, I), diagonal, torch.float64, torch.device("cpu"), 4096)


@pytest.mark.parametrize("name", FOLD)
def test_statistics_by_rows(name: str) -> None:
    representation = REPRESENTATIONS[name]()
    assert isinstance(representation, FoldsRows)
    for frame in frames():
        formed, by_rows = representation.init(frame), representation.init(frame)
        for k in range(3):
            given = rows(2, k)
            fold = Fold(0.9, 0.1, 0.1, refresh=k != 1, first=k == 0, index=k)
            representation.update(formed, Gradient(given.form()), fold)
            representation.update_rows(by_rows, given, fold)
            if k == 0:  # the null space of the first gradient has no basis of its own
                by_rows |= {key: v.clone() for key, v in formed.items() if key.startswith("basis")}
        assert {k: v.shape for k, v in formed.items()} == {k: v.shape for k, v in by_rows.items()}
        assert relative(representation.to_dense(by_rows), representation.to_dense(formed)) < 1e-10


def relative(found: Tensor, expected: Tensor) -> float:
    size = float(expected.double().norm())
    return float((found.double() - expected.double()).norm()) / (size or 1.0)


def test_statistics_of_rows_that_nearly_cancel_are_those_of_the_formed_gradient() -> None:
    """As at the optimum of a batch: products of the rows alone would be rounding of the single rows."""
    generator = torch.Generator().manual_seed(0)
    g, a = torch.randn(1, 32, 20, generator=generator), torch.randn(1, 32, 30, generator=generator)
    near = a + 1e-4 * torch.randn(1, 32, 30, generator=generator)
    rows = FactoredGradient(torch.cat([g, -g], 1), torch.cat([a, near], 1))
    exact = FactoredGradient(rows.g.double(), rows.a.double()).form()
    state = {
        k: v.clone() for k, v in KronDims().init(Frame(1, (20, 30), frozenset(), torch.float32, torch.device("cpu"))).items()
    }
    by_rows.update(KronDims(), state, RowGradient(rows), Fold(0.0, 1.0, 1.0))
    found = next(v for v in state.values() if v.shape == (1, 20, 20)).double()
    assert oracles.relative_error(found, exact @ exact.mT) < 1e-3
    assert oracles.relative_error(rows.moment(0).double(), exact @ exact.mT) > 0.1
