"""Eigendecompositions at sides that are enlarged for speed, against LAPACK at the side itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradmaker.linalg.eigen import PADDED, agrees, eigh
from tests import oracles

D = PADDED


def moment(rank: int, seed: int, scale: float = 1.0) -> Tensor:
    X = torch.randn(D, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return scale * X @ X.mT


def stack(kind: str) -> Tensor:
    if kind == "definite":
        return torch.stack([moment(2 * D, 0), moment(2 * D, 1, 1e-8)])
    if kind == "rank-deficient":
        return torch.stack([moment(40, 2, 1e12), torch.zeros(D, D, dtype=torch.float64)])
    if kind == "indefinite":
        return torch.stack([-moment(1, 3), moment(D, 4) - 2 * moment(D, 5)])
    return torch.stack([torch.eye(D, dtype=torch.float64), torch.diag(torch.arange(D, dtype=torch.float64) - 9)])


@pytest.mark.parametrize("kind", ["definite", "rank-deficient", "indefinite", "diagonal"])
def test_the_spectrum_and_the_basis_are_those_of_the_matrix(kind: str) -> None:
    A = stack(kind)
    s, Q = eigh(A)
    expected = torch.stack([torch.linalg.eigh(member)[0] for member in A])
    assert s.shape == (2, D) and Q.shape == (2, D, D)
    unit = expected.abs().amax(-1, keepdim=True).clamp(min=1e-300)
    assert float(((s - expected) / unit).abs().max()) < 1e-12
    assert bool(agrees(A, s, Q).all())
    assert oracles.relative_error((Q * s.unsqueeze(-2)) @ Q.mT, A) < 1e-12
    assert float((Q.mT @ Q - torch.eye(D, dtype=torch.float64)).abs().max()) < 1e-12


def test_small_eigenvalues_keep_their_digits() -> None:
    """The appended ones are apart: they enter no rotation, however large they are."""
    entries = torch.logspace(-12, 0, D, dtype=torch.float64)
    s, _ = eigh(torch.diag_embed(entries[None]))
    assert float((s[0] / entries - 1).abs().max()) < 1e-14


def test_other_sides_are_decomposed_as_they_are() -> None:
    A = moment(D, 6)[None, : D - 1, : D - 1]
    s, Q = eigh(A)
    expected = torch.linalg.eigh(A)
    assert torch.equal(s, expected[0]) and torch.equal(Q, expected[1])
