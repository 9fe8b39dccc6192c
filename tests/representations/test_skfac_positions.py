"""SKFAC's ``subsample``: which positions it keeps, what they weigh, and masks, where nothing divides; float64 oracles."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker.curvature import FisherExact, Outer
from gradmaker.representations import KronRows
from gradmaker.representations.base import Fold, Frame
from tests import models, oracles
from tests.methods.test_kronecker_methods import EVERY_STEP, make_of, pairs, step
from tests.models import Case

NEW = Fold(0.0, 1.0, 1.0)


def kept(counted: Tensor, positions: int) -> tuple[list[int], float]:
    """Of the counted ones of an example, evenly spaced, from the first to the last; and for how many each stands."""
    at = counted.nonzero().flatten().tolist()
    c, k = len(at), min(positions, len(at))
    chosen = at[:1] if k == 1 else [at[round(j * (c - 1) / (k - 1))] for j in range(k)]
    return chosen, c / max(k, 1)


def masked_sequences(R: int) -> Case:
    """Three sequences of R positions, of which all, all but the first and the first two count."""
    layers = partial(nn.Linear, 4, 5), nn.Tanh, partial(nn.Linear, 5, 3)
    case = models.build(lambda: nn.Sequential(*(layer() for layer in layers)), 3, R, 4)
    t = torch.arange(3 * R).reshape(3, R) % 3
    t[1, 0] = -100
    t[2, 2:] = -100
    return case._replace(t=t, loss=lambda z, t: F.cross_entropy(z.mT, t))


def factors(case: Case, layer: str, columns: oracles.Columns, positions: int) -> tuple[Tensor, Tensor]:
    """``A`` is a mean over the counted positions, ``B`` a sum, of which those that are kept stand for all."""
    tape = oracles.layer_tape(case.model, case.x, layer, columns)
    valid, A, B = case.t >= 0, 0.0, 0.0
    for n, (inputs, per_column) in enumerate(tape):
        chosen, share = kept(valid[n], positions)
        a = torch.cat([inputs[0][0, chosen], torch.ones(len(chosen), 1).double()], 1)
        A = A + share * a.mT @ a
        for per in per_column:
            B = B + share * per[0][0, chosen].mT @ per[0][0, chosen]
    return A / valid.sum(), B / valid.sum()


@pytest.mark.parametrize("R, positions", [(7, 3), (7, 2), (5, 4), (6, 4), (9, 5), (5, 1), (4, 3), (5, 5), (5, 8)])
def test_positions_that_are_kept(R: int, positions: int) -> None:
    case, twin = masked_sequences(R), masked_sequences(R)
    maker = make_of("skfac", case, fisher=FisherExact(), reduction="subsample", positions=positions, **EVERY_STEP)
    step(maker, case)
    columns = oracles.exact_columns("categorical", twin.t)
    for layer in ("0", "2"):
        A, B = factors(twin, layer, columns, positions)
        found = pairs(maker)[layer]
        assert oracles.relative_error(found[0], B) < 1e-12 and oracles.relative_error(found[1], A) < 1e-12


def outer(n: int, R: int, weights: Tensor | None = None) -> Outer:
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, dtype=torch.float64, generator=generator)
    return Outer(draw(1, n, R, 3), draw(2, 1, n, R, 4), True, weights=weights)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n, R, positions", [(2, 5, 2), (3, 7, 4), (1, 6, 5), (4, 3, 2)])
def test_subsampled_evidence(n: int, R: int, positions: int, masked: bool) -> None:
    """The factors themselves: rows of several cotangents, the bias, weights that are no prefix."""
    weights = (torch.arange(n * R).reshape(n, R) % 3 != 1).double() if masked else None
    evidence: Any = outer(n, R, weights)
    representation = KronRows(reduction="subsample", positions=positions)
    state = representation.init(Frame(1, (4, 4), frozenset(), torch.float64, torch.device("cpu")))
    representation.update(state, evidence, NEW)
    left, right = representation.factors(state)
    counted = torch.ones(n, R).double() if weights is None else weights
    A, B = torch.zeros(4, 4).double(), torch.zeros(4, 4).double()
    for e in range(n):
        chosen, share = kept(counted[e], positions)
        a = torch.cat([evidence.inputs[0][e, chosen], torch.ones(len(chosen), 1).double()], -1)
        g = evidence.gradients[:, 0, e, chosen].reshape(-1, 4)
        A, B = A + share * a.mT @ a, B + share * g.mT @ g
    assert oracles.relative_error(right[0], A / counted.sum()) < 1e-12
    assert oracles.relative_error(left[0], B) < 1e-12


@pytest.mark.parametrize("kind", ["rows", "inputs"])
def test_rows_of_a_sequence_that_is_left_out(kind: Any) -> None:
    """Nothing of it counts, whatever its inputs are."""
    weights = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]).double()
    one: Any = outer(2, 3, weights)
    one = replace(one, kind=kind)
    other = replace(one, inputs=torch.where(weights[None, :, :, None] > 0, one.inputs, 100.0))
    for reduction in ("sum", "subsample", "none"):
        found = []
        for evidence in (one, other):
            representation = KronRows(reduction=reduction, positions=2)  # type: ignore[arg-type]
            state = representation.init(Frame(1, (4, 4), frozenset(), torch.float64, torch.device("cpu")))
            representation.update(state, evidence, NEW)
            found.append(representation.factors(state)[1])
        assert torch.equal(*found) and float(found[0][0, -1, -1]) == pytest.approx(1.0)
