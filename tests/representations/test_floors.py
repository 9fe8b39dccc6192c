"""Eigenvalues below a floor, and statistics that lack rank, in the representations that bound them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradmaker.curvature import Gradient
from gradmaker.representations import CrossDims
from gradmaker.representations.base import Fold, Frame
from tests import oracles
from tests.refreshing import take

CPU = torch.device("cpu")


def frame(*shape: int, diagonal: tuple[int, ...] = (), stack: int = 1) -> Frame:
    return Frame(stack, shape, frozenset(diagonal), torch.float64, CPU)


def raised(S: Tensor, floor: float) -> Tensor:
    s, Q = torch.linalg.eigh(S)
    return (Q * s.clamp(min=floor)) @ Q.mT


@pytest.mark.parametrize("diagonal", [(), (1,), (0, 1)])
@pytest.mark.parametrize("floor", [1e-8, 0.05, 2.0])
def test_the_factors_of_kl_shampoo_have_a_floor(floor: float, diagonal: tuple[int, ...]) -> None:
    """One gradient of rank one beside a small start: what is held is ``max(S, floor)``, on balanced factors."""
    representation = CrossDims(start=1e-3, floor=floor)
    state = representation.init(frame(3, 4, diagonal=diagonal))
    u, v = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.3, 1.0, -1.0, 2.0]).double()
    G = torch.outer(u, v)
    take(representation, state, Gradient(G.unsqueeze(0)), Fold(0.9, 0.1, 0.1), 0)
    factors = []
    for axis, x in enumerate((G, G.T)):
        S = 0.9 * 1e-3 * torch.eye(len(x)).double() + 0.1 * x @ x.T / (
            1e-3 * x.shape[1]
        )  # the other side is whitened by its start
        factors.append(torch.diag(S.diagonal()) if axis in diagonal else S)
    means = [float(S.diagonal().mean()) for S in factors]
    scale = (means[0] * means[1]) ** 0.5
    expected = [raised(S * scale / mean, floor) for S, mean in zip(factors, means, strict=True)]
    assert min(float(torch.linalg.eigvalsh(S)[0]) for S in expected) >= floor - 1e-12
    assert oracles.relative_error(representation.to_dense(state)[0], oracles.kron(*expected)) < 1e-10


def test_a_floor_that_is_reached_bounds_the_inverse() -> None:
    """Later gradients are whitened by the raised factors."""
    representation, other = (CrossDims(start=1e-6, floor=floor) for floor in (0.5, 1e-8))
    states = [each.init(frame(2, 3)) for each in (representation, other)]
    for k in range(3):
        G = torch.outer(torch.tensor([1.0, k]), torch.tensor([1.0, 0.0, 2.0 * k])).double().unsqueeze(0)
        for each, state in zip((representation, other), states, strict=True):
            take(each, state, Gradient(G), Fold(0.5, 0.5, 0.5), k)
    bounded, free = (max(float(1 / state[f"values_{k}"].min()) for k in range(2)) for state in states)
    assert bounded <= 2.0 + 1e-12 and free > 2.0
