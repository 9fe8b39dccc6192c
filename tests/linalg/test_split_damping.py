"""How two, three and four factors share a damping, and spectra with several axes; ridges by their definition in float64."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from gradmaker.linalg.damping import damp, equal_ridges, pi_ridges
from gradmaker.representations import KronDims, TensorNormal
from gradmaker.solvers import Cholesky, Eigh

pytestmark = pytest.mark.usefixtures("double")
SHAPES = [(3, 4), (4, 4), (2, 3, 4), (2, 2, 3, 2)]
LAMBDA = 0.2


def statistic(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Two members whose axes have factors of very different sizes."""
    state = {"mass": torch.ones(2)}
    for axis, d in enumerate(shape):
        X = torch.randn(2, d, 2 * d) * 3.0**axis
        state[f"factor_{axis}"] = X @ X.mT
    return state


def power(F: Tensor, ridge: Tensor, exponent: float) -> Tensor:
    s, Q = torch.linalg.eigh(F)
    return (Q * (s + ridge.unsqueeze(-1)).unsqueeze(-2) ** exponent) @ Q.mT


def applied(matrices: list[Tensor], g: Tensor) -> Tensor:
    for axis, X in enumerate(matrices, start=1):
        g = torch.einsum("bij,bj...->bi...", X, g.movedim(axis, 1)).movedim(1, axis)
    return g


def ridges(factors: list[Tensor], order: float, mode: str) -> list[Tensor]:
    """``lambda^(order / m)`` in units of the geometric mean of the factors' own, times ``t_k`` over that of the ``t_k``."""
    m, t = len(factors), [F.diagonal(dim1=1, dim2=2).mean(1) for F in factors]
    tops = [torch.linalg.eigvalsh(F)[:, -1] for F in factors]
    units = {"absolute": [torch.ones(2)] * m, "trace": t, "largest": tops}[mode]
    share = (LAMBDA**order * prod(units)) ** (1 / m)
    return [share * each / prod(t) ** (1 / m) for each in t]


@pytest.mark.parametrize("mode", ["absolute", "trace", "largest"])
@pytest.mark.parametrize("exponent", [None, 0.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pi_of_several_factors_before_a_root(shape: tuple[int, ...], exponent: float | None, mode: Any) -> None:
    representation, state = KronDims(exponent=exponent), statistic(shape)
    order = len(shape) if exponent is None else 1 / exponent
    solver = Eigh(power=-0.5, damping=LAMBDA, split="pi", mode=mode)
    factors = [state[f"factor_{k}"] for k in range(len(shape))]
    roots = [power(F, r, -0.5 / order) for F, r in zip(factors, ridges(factors, order, mode), strict=True)]
    g = torch.randn(2, *shape)
    found = solver.solve(representation, solver.prepare(representation, state, None), g)
    torch.testing.assert_close(found, applied(roots, g), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("split", ["pi", "each"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inverses_of_several_factors(shape: tuple[int, ...], split: Any) -> None:
    """Of a product that is ``C`` itself: all ridges multiply to ``lambda``, or every factor gets all of it."""
    representation, state = TensorNormal(granularity="tensor"), statistic(shape)
    trace = state["factor_0"].diagonal(dim1=1, dim2=2).sum(1)
    for k, _ in enumerate(shape):  # as gradients make them, of one trace
        own = state[f"factor_{k}"].diagonal(dim1=1, dim2=2).sum(1)
        state[f"factor_{k}"] *= (trace / own)[:, None, None]
    solver = Cholesky(damping=LAMBDA, split=split)
    factors = representation.factors(state)
    each = ridges(factors, 1.0, "absolute") if split == "pi" else [torch.full((2,), LAMBDA)] * len(shape)
    if split == "pi":
        torch.testing.assert_close(prod(each), torch.full((2,), LAMBDA), rtol=1e-10, atol=0)
    inverses = [power(F, r, -1.0) for F, r in zip(factors, each, strict=True)]
    g = torch.randn(2, *shape)
    found = solver.solve(representation, solver.prepare(representation, state, None), g)
    torch.testing.assert_close(found, applied(inverses, g), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_pi_is_about_ratios_of_traces(count: int) -> None:
    factors = [torch.diag_embed(torch.rand(3, 2 + k) + 0.1) * 10.0**k for k in range(count)]
    found = pi_ridges(factors, torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(prod(found), torch.tensor([1.0, 2.0, 3.0]) ** count, rtol=1e-10, atol=0)
    shares = [r / F.diagonal(dim1=1, dim2=2).mean(1) for r, F in zip(found, factors, strict=True)]
    assert all(torch.allclose(each, shares[0]) for each in shares)
    assert all(r.tolist() == [0.3] * 3 for r in equal_ridges(factors, 0.3))


@pytest.mark.parametrize("shape", [(6,), (2, 3), (3, 1, 2)])
@pytest.mark.parametrize("mode", ["absolute", "largest", "trace", "clamp", "pseudo"])
def test_a_spectrum_with_several_axes_is_one_spectrum(mode: str, shape: tuple[int, ...]) -> None:
    """Its largest, its mean and its number of values are those of all axes together, member by member."""
    s = torch.rand(2, 6) * torch.tensor([[1.0], [100.0]])
    s[:, 2] = 0.0
    found = damp(s.reshape(2, *shape), 0.1, mode).reshape(2, 6)
    for member in range(2):
        torch.testing.assert_close(found[member], damp(s[member : member + 1], 0.1, mode)[0])
        top, mean = float(s[member].max()), float(s[member].mean())
        expected = {
            "absolute": s[member] + 0.1,
            "largest": s[member] + 0.1 * top,
            "trace": s[member] + 0.1 * mean,
            "clamp": s[member].clamp(min=0.1 * top),
            "pseudo": torch.where(s[member] > 0.1 * top, s[member], torch.inf),
        }[mode]
        torch.testing.assert_close(found[member], expected)


def test_a_pseudo_inverse_counts_all_axes_in_its_roundoff() -> None:
    """``d u lambda_max`` with ``d`` the number of eigenvalues: 200 rows of two are 400."""
    u = torch.finfo(torch.float64).eps / 2
    s = torch.ones(1, 200, 2)
    s[0, 3, 1], s[0, 4, 1] = 399 * u, 401 * u
    found = damp(s, 0.0, "pseudo")
    assert found[0, 3, 1] == torch.inf and found[0, 4, 1] == s[0, 4, 1]
