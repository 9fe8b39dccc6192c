"""Products by halves, at sides where they are made of blocks, against whole products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradmaker.linalg import halves
from gradmaker.linalg.halves import apply_triangles, moment, subtract_product_
from gradmaker.linalg.mode_products import apply_factors
from tests import oracles


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 256], autouse=True)
def smallest(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halves, "SMALLEST", request.param)


@pytest.mark.parametrize("d", [1, 3, 10, 261])
def test_a_moment_is_symmetric(d: int) -> None:
    x = randn(2, d, 7, seed=1)
    found = moment(x)
    assert oracles.relative_error(found, torch.einsum("bir,bjr->bij", x, x)) < 1e-14
    assert oracles.relative_error(found, found.mT) < 1e-14


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(9,), (5, 9), (6, 3, 5), (1, 270)])
def test_triangles_multiply_every_axis(shape: tuple[int, ...], transposed: bool) -> None:
    factors = [randn(2, d, d, seed=d).triu() for d in shape]
    if len(shape) == 3:
        factors[1] = randn(2, 3, seed=8)  # a diagonal
    g = randn(2, *shape, seed=4)
    expected = apply_factors([Q.mT if transposed and Q.ndim == 3 else Q for Q in factors], g)
    assert oracles.relative_error(apply_triangles(factors, g, transposed), expected) < 1e-14
    assert torch.equal(apply_triangles([None] * len(shape), g, transposed), g)


@pytest.mark.parametrize("d", [2, 11, 260])
def test_a_product_of_triangles_is_subtracted(d: int) -> None:
    E, Q = (randn(2, d, d, seed=s).triu() for s in (1, 2))
    out = subtract_product_(Q.clone(), E, Q)
    assert oracles.relative_error(out, Q - E @ Q) < 1e-14
    assert torch.equal(out, out.triu())
