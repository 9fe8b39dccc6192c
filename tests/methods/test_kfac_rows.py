"""K-FAC of the newest batch by its rows: equal to the formed factors, in float64, and only where it may."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker.curvature import FisherEmp, FisherExact, FisherForward, FisherMC
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.representations import Kron, KronRows
from gradmaker.solvers import Cholesky, FactorWoodbury
from tests import models, oracles
from tests.methods.test_kronecker_methods import EVERY_STEP, custom, make_of, step
from tests.models import Case


def wide(*positions: int, bias: bool = True) -> Case:
    """Layers whose sides are longer than those of stacks, with one narrow side."""
    layers = partial(nn.Linear, 150, 140, bias=bias), nn.Tanh, partial(nn.Linear, 140, 3, bias=bias)
    case = models.build(lambda: nn.Sequential(*(layer() for layer in layers)), 4, *positions, 150)
    t = torch.arange(case.x[..., 0].numel()).view(case.x.shape[:-1]) % 3
    return case._replace(t=t, loss=lambda z, t: F.cross_entropy(z.flatten(0, -2), t.flatten()))


def masked() -> Case:
    case = wide(3)
    t = case.t.clone()
    t[1, 1:], t[3] = -100, -100
    return case._replace(t=t)


CASES = {"vectors": wide, "no bias": partial(wide, bias=False), "sequences": partial(wide, 3), "masked": masked}
FISHERS = {"mc": FisherMC(samples=2), "exact": FisherExact(), "empirical": FisherEmp(), "forward": FisherForward()}


def held(maker: Any) -> set[str]:
    return {type(b.triple.representation).__name__ for b in maker.plan.blocks}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_rows_are_the_formed_factors(name: str, fisher: str, sharing: Any) -> None:
    """At every step the newest batch, with a cache that is older than the statistic in between."""
    one, other = CASES[name](), CASES[name]()
    options: dict[str, Any] = {**EVERY_STEP, "preconditioner_interval": 2, "damping": 0.01}
    rows = make_of("kfac", one, decay=0.0, sharing=sharing, fisher=FISHERS[fisher], **options)
    formed = custom(other, FISHERS[fisher], Kron(sharing=sharing), Cholesky(damping=0.01), **options)
    assert held(rows) == {"KronRows"} and held(formed) == {"Kron"}
    for k in range(3):
        found = [step(m, c._replace(t=c.t.roll(k, 0))) for m, c in ((rows, one), (formed, other))]
        assert oracles.relative_error(*found) < 1e-10, k
    assert rows.verify().passed


def test_micro_batches_of_any_size() -> None:
    one, other = wide(), wide()
    rows = make_of("kfac", one, decay=0.0, fisher=FisherExact(), **EVERY_STEP)
    formed = custom(other, FisherExact(), Kron(), Cholesky(), **EVERY_STEP)
    found = []
    for maker, case in ((rows, one), (formed, other)):
        for part in (slice(0, 1), slice(1, 4)):
            y = maker.setup_model_call(case.model, case.x[part])
            maker.setup_loss_call(case.loss, y, case.t[part])
            maker.accumulate((part.stop - part.start) / 4)
        maker.precondition()
        found.append(oracles.gradient_vector(case.model))
    assert oracles.relative_error(*found) < 1e-10


def test_many_rows_are_formed() -> None:
    """160 rows of a layer with sides of 151 and 140."""
    one, other = wide(40), wide(40)
    rows = make_of("kfac", one, decay=0.0, fisher=FisherEmp(), **EVERY_STEP)
    formed = custom(other, FisherEmp(), Kron(), Cholesky(), **EVERY_STEP)
    assert oracles.relative_error(step(rows, one), step(formed, other)) < 1e-10
    assert {"left_factor", "right_factor"} <= rows.plan.blocks[0].state.keys()


@pytest.mark.parametrize("max_dim", [100, 145])
def test_sides_over_max_dim_are_diagonal_as_without_rows(max_dim: int) -> None:
    one, other = wide(2), wide(2)
    rows = make_of("kfac", one, decay=0.0, fisher=FisherExact(), max_dim=max_dim, **EVERY_STEP)
    formed = custom(other, FisherExact(), Kron(), Cholesky(), max_dim=max_dim, **EVERY_STEP)
    for k in range(2):
        found = [step(m, c._replace(t=c.t.roll(k, 0))) for m, c in ((rows, one), (formed, other))]
        assert oracles.relative_error(*found) < 1e-10
    assert "right_diagonal" in rows.plan.blocks[0].state


@pytest.mark.parametrize(
    "options",
    [
        {"decay": 0.9},
        {"decay": None},
        {"decay": 0.0, "split": "exact"},
        {"decay": 0.0, "damping": 0.0},
        {"decay": 0.0, "wide_sides": "blocks"},
    ],
    ids=str,
)
def test_where_factors_are_formed(options: dict[str, Any]) -> None:
    assert held(make_of("kfac", wide(), **options)) == {"Kron"}


def test_layers_that_are_no_wide_linear_map_are_formed() -> None:
    for case in (models.mlp(), models.convolution(2), models.tagger(mix=True), models.normed()):
        assert "KronRows" not in held(make_of("kfac", case, decay=0.0))


# --- gradients by their rows ------------------------------------------------------------------------------------------------
def states() -> dict[str, dict[str, Tensor]]:
    Y, X, ones = torch.randn(2, 3, 5).double(), torch.randn(2, 4, 7).double(), torch.ones(2).double()
    masses = {"left_mass": ones, "right_mass": 3 * ones}
    return {
        "rows": {"left_rows": Y, "right_rows": X, **masses},
        "formed": {"left_factor": Y.mT @ Y, "right_factor": X.mT @ X, **masses},
        "diagonal": {"left_rows": Y, "right_diagonal": X.square().sum(1), **masses},
    }


@pytest.mark.parametrize("form", ["rows", "formed", "diagonal"])
def test_rows_of_a_gradient_are_multiplied_on_their_sides(form: str) -> None:
    state, rows = states()[form], FactoredGradient(torch.randn(2, 6, 5).double(), torch.randn(2, 6, 7).double())
    representation, solver = KronRows(), FactorWoodbury(damping=0.02)
    cache = solver.prepare(representation, state, None)
    P, G = solver.operator(representation, state), rows.g.mT @ rows.a
    expected = (P @ G.reshape(2, -1, 1)).view_as(G)
    assert oracles.relative_error(solver.solve(representation, cache, G), expected) < 1e-10
    assert oracles.relative_error(solver.solve_rows(representation, cache, rows).form(), expected) < 1e-10


def test_the_cache_shares_the_rows() -> None:
    state = states()["rows"]
    cache = FactorWoodbury().prepare(KronRows(), state, None)
    assert all(cache[f"rows_{k}"] is state[name] for k, name in enumerate(("left_rows", "right_rows")))
