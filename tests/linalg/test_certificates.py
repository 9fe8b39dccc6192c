"""Certificates by two vectors: right inverses and triangles pass, wrong ones do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gradmaker.linalg.certificates import certify_inverse, certify_triangle

SIDES = (2, 33, 200)


def decaying(d: int, condition: float) -> Tensor:
    Q, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))
    return (Q * torch.logspace(-float(torch.tensor(condition).log10()), 0, d, dtype=torch.float64)) @ Q.T


def rank_deficient(d: int, condition: float) -> Tensor:
    x = torch.randn(d // 4 + 1, d, dtype=torch.float64)
    A = x.T @ x
    return A / torch.linalg.eigvalsh(A)[-1] + torch.eye(d, dtype=torch.float64) / condition


def one_direction(d: int, condition: float) -> Tensor:
    x = torch.rand(2 * d, d, dtype=torch.float64)
    A = x.T @ x
    return A / torch.linalg.eigvalsh(A)[-1] + torch.eye(d, dtype=torch.float64) / condition


def scaled(d: int, condition: float) -> Tensor:
    """Axes of different scale."""
    s = torch.logspace(-float(torch.tensor(condition).log10()) / 2, 0, d, dtype=torch.float64)[torch.randperm(d)]
    x = torch.randn(4 * d, d, dtype=torch.float64)
    return s.unsqueeze(-1) * (x.T @ x / (4 * d)) * s


KINDS: list[Callable[[int, float], Tensor]] = [decaying, rank_deficient, one_direction, scaled]
CASES = [(torch.float32, condition) for condition in (1e1, 1e4, 1e6)] + [(torch.float64, c) for c in (1e1, 1e6, 1e11)]


def made(kind: Callable[[int, float], Tensor], d: int, condition: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix with its inverse and its triangle, by torch.  # (1, d, d)"""
    A = kind(d, condition)
    A = ((A + A.T) / 2).to(dtype).unsqueeze(0)
    L = torch.linalg.cholesky(A)
    return A, torch.cholesky_inverse(L), L.mT


@pytest.mark.parametrize(("dtype", "condition"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_right_ones_pass(kind, dtype, condition):
    for d in SIDES:
        A, X, U = made(kind, d, condition, dtype)
        for found, ok in (certify_inverse(A, X), certify_triangle(A, U)):
            assert ok.tolist() == [True] and found.item() < 0.45


@pytest.mark.parametrize(("dtype", "condition"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_wrong_entry_is_refused(kind, dtype, condition):
    """In units of the diagonal; of a triangle, above what rounding moves a factor of this condition by."""
    share = max(1e-3, 30 * condition * torch.finfo(dtype).eps)
    for d in SIDES:
        A, X, U = made(kind, d, condition, dtype)
        for i, j in ((0, 1), (d // 2, d // 3), (d - 1, d - 1)):
            wrong = X.clone()
            wrong[0, i, j] += 1e-2 * (X[0, i, i] * X[0, j, j]).sqrt()
            assert certify_inverse(A, wrong)[1].tolist() == [False]
            i, j = min(i, j), max(i, j)
            wrong = U.clone()
            wrong[0, i, j] += share * A[0, j, j].sqrt()
            assert certify_triangle(A, wrong)[1].tolist() == [False]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused_wherever_it_is(value):
    A, X, U = made(decaying, 33, 1e2, torch.float32)
    for at in ((0, 0), (0, 32), (32, 0), (32, 32), (16, 3)):
        for own, certify in ((X, certify_inverse), (U.contiguous(), certify_triangle)):
            bad = own.clone()
            bad[0][at] = value
            spoilt = A.clone()
            spoilt[0][at] = value
            if own is X or at[0] <= at[1]:  # below the diagonal, a triangle has no entries
                assert certify(A, bad)[1].tolist() == [False]
            assert certify(spoilt, own)[1].tolist() == [False]


def test_another_matrix_and_another_scale_are_refused():
    A, X, U = made(decaying, 64, 1e3, torch.float64)
    for wrong in (2 * X, X + 1e-9 * X.abs().amax() * torch.eye(64), -X, torch.zeros_like(X)):
        assert certify_inverse(A, wrong)[1].tolist() == [False]
    for wrong in (1.0001 * U, U.mT, torch.eye(64, dtype=torch.float64).unsqueeze(0)):
        assert certify_triangle(A, wrong)[1].tolist() == [False]


def test_singular_to_working_precision_is_refused():
    """Cholesky may succeed by the sign of a rounding error: neither form is then an inverse of anything."""
    refused = 0
    for _ in range(20):
        x = torch.randn(100, 200)
        A = (x.mT @ x / 100 + 3e-7 * torch.eye(200)).unsqueeze(0)
        L, info = torch.linalg.cholesky_ex(A)
        if not info.item():
            refused += 1
            found = torch.linalg.solve_triangular(L.mT, torch.linalg.solve_triangular(L, A, upper=False), upper=True)
            wrong = (found - torch.eye(200)).abs().amax() > 1
            assert not (certify_triangle(A, L.mT)[1].item() and wrong)
            assert not (certify_inverse(A, torch.cholesky_inverse(L))[1].item() and wrong)
    A = torch.diag(torch.tensor([1.0, 1.0, 1.0])).unsqueeze(0)
    A[0, 0, 1] = A[0, 1, 0] = 1 - 6e-8
    L, _ = torch.linalg.cholesky_ex(A)
    assert certify_inverse(A, torch.cholesky_inverse(L) * 1.6)[1].tolist() == [False]


def test_members_are_judged_alone_and_signs_do_not_depend_on_the_stack():
    parts = [made(kind, 33, 1e3, torch.float32) for kind in KINDS]
    A, X, U = (torch.cat([p[k] for p in parts]) for k in range(3))
    X[2, 4, 5] += X[2].abs().amax()
    U = U.contiguous()
    U[1, 4, 5] += 1
    assert certify_inverse(A, X)[1].tolist() == [True, True, False, True]
    assert certify_triangle(A, U)[1].tolist() == [True, False, True, True]
    alone = torch.cat([certify_inverse(A[k : k + 1], X[k : k + 1])[0] for k in range(4)])
    torch.testing.assert_close(certify_inverse(A, X)[0], alone, rtol=0, atol=1e-4)  # rounding itself
