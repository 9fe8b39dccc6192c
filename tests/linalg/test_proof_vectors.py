"""Certificates by a few products: whatever is wrong is refused, and what is right passes however ill-conditioned it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from gradmaker.linalg.diagnosis import spectral_residual
from gradmaker.linalg.eigen import agrees, decompose, decompose_again
from gradmaker.linalg.finite import finite_members
from gradmaker.linalg.probes import COUNT, SMALL, probes

DTYPES = [torch.float32, torch.float64]
SIZES = (1, 2, 3, 10, 17, 96, 200)


def gaussian(d: int) -> Tensor:
    x = torch.randn(4 * d, d, dtype=torch.float64)
    return x.T @ x


def fallen(d: int) -> Tensor:
    Q, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))
    return (Q * torch.logspace(-12, 0, d, dtype=torch.float64)) @ Q.T


def deficient(d: int) -> Tensor:
    x = torch.randn(max(1, d // 4), d, dtype=torch.float64)
    return x.T @ x


RIGHT: dict[str, Callable[[int], Tensor]] = {
    "gaussian": gaussian,
    "spectrum of 1e12": fallen,
    "rank deficient": deficient,
    "identity": lambda d: torch.eye(d, dtype=torch.float64),
    "zero": lambda d: torch.zeros(d, d, dtype=torch.float64),
    "one large eigenvalue": lambda d: torch.ones(d, d, dtype=torch.float64) + 1e-6 * gaussian(d),
    "diagonal of 1e30": lambda d: torch.diag(torch.logspace(-30, 0, d, dtype=torch.float64)),
    "indefinite": lambda d: gaussian(d) - 3 * d * torch.eye(d, dtype=torch.float64),
}


@pytest.mark.parametrize("kind", RIGHT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_right_passes(dtype: torch.dtype, kind: str) -> None:
    for d in SIZES:
        for scale in (1e-30, 1.0, 1e30):
            A = (scale * RIGHT[kind](d)).to(dtype)
            assert decompose(A.unsqueeze(0))[2].all(), d


@cache
def decomposed(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix without a structure, its spectrum from 0.1 to one, its basis."""
    Q, _ = torch.linalg.qr(torch.randn(128, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
    A = ((Q * torch.linspace(0.1, 1, 128, dtype=torch.float64)) @ Q.T).to(dtype)
    s, Q = torch.linalg.eigh(A)
    return A, s, Q.contiguous()


def refused(A: Tensor, s: Tensor, Q: Tensor) -> Tensor:
    return ~agrees(A.expand(len(Q), *A.shape), s.expand(len(Q), -1), Q)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_wrong_entry_of_the_basis_is_refused(dtype: torch.dtype) -> None:
    """Each entry of some columns and rows, off by a tenth of the usual size, ``1/sqrt(d)``."""
    A, s, Q = decomposed(dtype)
    d = len(A)
    for cut in (slice(0, d), slice(d * 50, d * 51), slice(0, d * d, d), slice(17, d * d, 401)):
        entries = torch.arange(d * d)[cut]
        wrong = Q.expand(len(entries), d, d).clone()
        wrong.view(len(entries), -1)[torch.arange(len(entries)), entries] += 0.1 / d**0.5
        assert refused(A, s, wrong).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_wrong_eigenvalue_or_direction_is_refused(dtype: torch.dtype) -> None:
    """One eigenvalue off by a hundredth of the largest; one column of the basis zero, turned round, or a copy of the next."""
    A, s, Q = decomposed(dtype)
    d = len(A)
    every, all_bases = torch.arange(d), Q.expand(d, d, d)
    values = s.expand(d, d).clone()
    values[every, every] += 0.01
    assert refused(A, values, all_bases).all()
    for column in (torch.zeros_like(Q), Q.flip(0), Q.roll(1, 1)):
        wrong = all_bases.clone()
        wrong[every, :, every] = column.T
        assert refused(A, s, wrong).all()
    swapped = all_bases.clone()  # orthogonal, but in the wrong order, with neighbours 30 places apart
    swapped[every, :, every] = Q.roll(30, 1).T
    swapped[every, :, (every - 30) % d] = Q.T
    assert refused(A, s, swapped).all()
    assert not refused(A, s, all_bases[:1] * 1).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_product_of_a_wrong_basis_is_refused(dtype: torch.dtype) -> None:
    """A longer column with a smaller eigenvalue; any vector for an eigenvalue of zero."""
    _, s, Q = decomposed(dtype)
    d = len(Q)
    for k in (0, 50, 127):
        values, wrong = s.clone(), Q.clone()
        values[k] /= 1.21
        wrong[:, k] *= 1.1
        assert refused((wrong * values) @ wrong.T, values, wrong.unsqueeze(0)).all()
        values[k] = 0
        wrong[:, k] = Q[:, (k + 1) % d]
        assert refused((wrong * values) @ wrong.T, values, wrong.unsqueeze(0)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_sides_are_compared_in_full(dtype: torch.dtype) -> None:
    for d in range(1, SMALL + 1):
        A = gaussian(d).to(dtype)
        s, Q = torch.linalg.eigh(A)
        wrong = Q.contiguous().expand(d * d, d, d).clone().view(d * d, -1)
        wrong[torch.arange(d * d), torch.arange(d * d)] += 0.01
        assert refused(A, s, wrong.view(-1, d, d)).all()
        values = s.expand(d, d) + 0.01 * s[-1] * torch.eye(d, dtype=dtype)
        assert refused(A, values, Q.expand(d, d, d)).all()


def test_what_is_not_finite_is_refused() -> None:
    A, s, Q = decomposed(torch.float32)
    for bad in (torch.nan, torch.inf, -torch.inf):
        wrong = Q.clone()
        wrong[7, 100] = bad
        assert refused(A, s, wrong.unsqueeze(0)).all()
        values = s.clone()
        values[0] = bad
        assert refused(A, values, Q.unsqueeze(0)).all()


def test_probes_are_signs_that_do_not_repeat_or_touch_the_generators() -> None:
    before = torch.get_rng_state()
    V = probes(torch.empty(3, 784, 784))
    assert torch.equal(V, probes(torch.empty(1, 784, 784))) and torch.equal(V.abs(), torch.ones(COUNT, 784))
    assert (V @ V.T / 784 - torch.eye(COUNT)).abs().max() < 0.15 and V.mean(1).abs().max() < 0.15
    assert torch.equal(before, torch.get_rng_state())
    assert probes(torch.empty(2, 784, 784, device="meta", dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_member_that_is_not_finite(bad: float) -> None:
    x = torch.full((3, 4, 5), 3e38)  # whose sum is not finite
    assert finite_members(x).all() and finite_members(x[:, :0]).all()
    y = x.clone()
    y[1, 2, 3] = bad
    assert finite_members(y).tolist() == finite_members(x, y.transpose(1, 2), x[:, :0]).tolist() == [True, False, True]


@pytest.mark.parametrize("damped", [False, True])
def test_the_told_residual_is_no_less_than_that_of_all_entries(damped: bool) -> None:
    """With one eigenvalue wrong, in float64, computed again in full."""
    A, s, Q = decomposed(torch.float64)
    eye = torch.eye(len(A), dtype=A.dtype)
    for k in (0, 50, 127):
        wrong = s.clone()
        wrong[k] *= 1.5
        ridge = 1e-3
        told = spectral_residual(A.unsqueeze(0), (wrong[None], Q[None]), (wrong + ridge)[None] if damped else None)
        if damped:
            W = Q * (wrong + ridge).rsqrt()
            full = (W.T @ (A + ridge * eye) @ W - eye).abs().max()
        else:
            full = (Q.T @ A @ Q - torch.diag(wrong)).abs().max() / wrong.max()
        torch.testing.assert_close(told[0], full, rtol=1e-6, atol=0)


def test_a_retry_in_float64_is_of_a_symmetric_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """A statistic by rows is symmetric up to rounding only, which float64 would take for an error."""
    x = torch.randn(1, 40, 30)
    A = x.mT @ ((x @ x.mT) @ x)
    assert not torch.equal(A, A.mT)
    original = torch.linalg.eigh

    def wrong(M: Tensor) -> tuple[Tensor, Tensor]:
        s, Q = original(M)
        return (s, Q) if M.dtype == torch.float64 else (2 * s, Q)

    monkeypatch.setattr(torch.linalg, "eigh", wrong)
    s, _, ok, retries = decompose_again(A)
    assert ok.all() and retries.tolist() == [1]
    torch.testing.assert_close(s, torch.linalg.eigvalsh(A.double()).float(), rtol=1e-4, atol=1e-3)
