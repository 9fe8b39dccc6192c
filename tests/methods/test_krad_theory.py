"""What is claimed of KrADagrad's joint inverse: the curvature that a step adds, and whose turn it is."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from gradmaker.curvature import Gradient
from gradmaker.representations import AlternatingInverse
from gradmaker.representations.alternating_inverse import scheduled_axis
from gradmaker.representations.base import Fold, Frame
from gradmaker.representations.inverse_dims import krad_update
from tests import oracles
from tests.refreshing import take

SUM = Fold(1.0, 1.0, 1.0, summed=True)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def definite(d: int, seed: int) -> Tensor:
    X = randn(d, d, seed=seed)
    return X @ X.T + 0.1 * torch.eye(d, dtype=torch.float64)


def excess(den: Any, rank: int, seed: int, share: str) -> float:
    """The smallest eigenvalue of ``L'^-1 (x) R^-1 - L^-1 (x) R^-1 - share g g^T``, relative to the largest of the first.

    One step of the axis of ``L`` on ``S = G R G^T`` with the other axis' inverse ``R``.
    """
    L, R = definite(4, seed), definite(3, seed + 1000)
    G = randn(4, rank, seed=seed + 2000) @ randn(rank, 3, seed=seed + 3000)
    s, Q = torch.linalg.eigh(R)
    X = G @ (Q * s.sqrt()) @ Q.T
    new = krad_update(L[None], X[None], den)[0]
    S = G @ R @ G.T
    size = 1 + {"tr": (L @ S).trace(), "fro": (L @ S).norm(), "op": torch.linalg.eigvals(L @ S).abs().max()}[den]
    shares = {"whole": 1.0, "size": 1 / size, "rank": 1 / rank, "both": 1 / (rank * size)}
    g = G.reshape(-1)
    before, after = (oracles.kron(torch.linalg.inv(M), torch.linalg.inv(R)) for M in (L, new))
    found = torch.linalg.eigvalsh(after - before - shares[share] * torch.outer(g, g))[0]
    return float(found / torch.linalg.eigvalsh(after)[-1])


@pytest.mark.parametrize("den", ["tr", "fro", "op"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_step_adds_the_gradient_to_the_implied_curvature(den: Any, rank: int) -> None:
    """``L'^-1 (x) R^-1 >= L^-1 (x) R^-1 + g g^T / (r den)``, for what the update divides by."""
    assert min(excess(den, rank, seed, "both") for seed in range(60)) > -1e-10


@pytest.mark.parametrize("share", ["whole", "size", "rank"])
def test_the_factor_of_the_bound_is_needed(share: str) -> None:
    """Neither the rank nor the size can be left out: a plain sum ``+ g g^T`` is not reached."""
    assert min(excess("tr", 3, seed, share) for seed in range(60)) < -1e-3


def traces(decay: float | None, shape: tuple[int, ...], steps: int = 40) -> list[float]:
    """``tr(L_1 (x) ... (x) L_m)`` after every gradient."""
    held = AlternatingInverse(damping=0.0, start=None)
    state = held.init(Frame(1, shape, frozenset(), torch.float64, torch.device("cpu")))
    fold = SUM if decay is None else Fold(decay, 1 - decay, 1 - decay)
    found = []
    for k in range(steps):
        take(held, state, Gradient(randn(1, *shape, seed=k) / 3), fold, k, k % 3 == 0)
        product = torch.ones(())
        for axis in range(len(shape)):
            product = product * state[f"inverse_{axis}"][0].trace()
        found.append(float(product))
    return found


@pytest.mark.parametrize("shape", [(5,), (4, 3), (3, 4, 2)])
def test_the_trace_of_the_inverse_never_grows(shape: tuple[int, ...]) -> None:
    """With ``b_2 = 1``; an average lets go of what it knew, and the inverse grows."""
    summed = traces(None, shape)
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(summed))
    assert summed[-1] < 0.5 * summed[0]
    averaged = traces(0.5, shape)
    assert any(after > before for before, after in pairwise(averaged))


# t = 0 ... 24: rounds below m^2; from each square on every axis once, then the longest (of equal ones the first)
TURNS = {
    (2, 5): [0, 1, 0, 1, *[0, 1, 1, 1, 1], *[0, 1, 1, 1, 1, 1, 1], *[0, 1, 1, 1, 1, 1, 1, 1, 1]],
    (5, 5): [0, 1, 0, 1, *[0, 1, 0, 0, 0], *[0, 1, 0, 0, 0, 0, 0], *[0, 1, 0, 0, 0, 0, 0, 0, 0]],
    (9, 5, 2): [0, 1, 2, 0, 1, 2, 0, 1, 2, *[0, 1, 2, 0, 0, 0, 0], *[0, 1, 2, 0, 0, 0, 0, 0, 0]],
    (2, 3, 7): [0, 1, 2, 0, 1, 2, 0, 1, 2, *[0, 1, 2, 2, 2, 2, 2], *[0, 1, 2, 2, 2, 2, 2, 2, 2]],
}


@pytest.mark.parametrize("shape", TURNS)
def test_the_table_of_turns(shape: tuple[int, ...]) -> None:
    """Not only the schedule: just that axis' inverse moves."""
    assert [scheduled_axis(t, shape) for t in range(25)] == TURNS[shape]
    held = AlternatingInverse(damping=0.0)
    state = held.init(Frame(1, shape, frozenset(), torch.float64, torch.device("cpu")))
    for t, turn in enumerate(TURNS[shape]):
        before = {axis: state[f"inverse_{axis}"].clone() for axis in range(len(shape))}
        take(held, state, Gradient(randn(1, *shape, seed=t)), SUM, t)
        if t:  # at the first one all axes take on the scale of the gradient
            assert [axis for axis in before if not torch.equal(before[axis], state[f"inverse_{axis}"])] == [turn]
