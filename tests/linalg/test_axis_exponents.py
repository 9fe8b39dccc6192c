"""Powers and traces of the axes' factors, for every order of tensor and exponent, against their definition in float64."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest
import torch
from torch import Tensor

from gradmaker.curvature import Gradient
from gradmaker.representations import KronDims
from gradmaker.representations.base import Fold, Frame
from gradmaker.representations.root_dims import RootKronDims
from tests import oracles

DECAY = 0.7
SHAPES = [(4,), (3, 4), (3, 3), (2, 3, 2), (2, 2, 2, 2)]


def measured(
    representation: Any, shape: tuple[int, ...], diagonal: tuple[int, ...], steps: int = 5
) -> tuple[Any, list[Tensor]]:
    """A running average of gradients, and the factors that it stands for; axes in ``diagonal`` keep their diagonal."""
    generator, steps = torch.Generator().manual_seed(1), 5
    gradients = [3 * torch.randn(*shape, dtype=torch.float64, generator=generator) for _ in range(steps)]
    state = representation.init(Frame(1, shape, frozenset(diagonal), torch.float64, torch.device("cpu")))
    for g in gradients:
        representation.update(state, Gradient(g.unsqueeze(0)), Fold(DECAY, 1 - DECAY, 1 - DECAY))
    weights = torch.tensor([DECAY ** (steps - 1 - t) for t in range(steps)], dtype=torch.float64)
    factors = []
    for axis in range(len(shape)):
        H = torch.stack([torch.tensordot(g, g, dims=([k for k in range(len(shape)) if k != axis],) * 2) for g in gradients])
        mean = (weights[:, None, None] * H).sum(0) / weights.sum()
        factors.append(torch.diag(mean.diagonal()) if axis in diagonal else mean)
    return state, factors


def positive_power(H: Tensor, p: float) -> Tensor:
    s, Q = torch.linalg.eigh(H)
    return (Q * s.clamp(min=0) ** p) @ Q.mT


@pytest.mark.parametrize("kind", [KronDims, RootKronDims])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("exponent", [None, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_of_the_powers(shape: tuple[int, ...], exponent: float | None, balanced: bool, kind: Any) -> None:
    """``H_1^e (x) H_2^e ... / tr^(m e - 1)``, the trace being that of every factor; ``e = 1/m`` unless given."""
    m = len(shape)
    e = 1 / m if exponent is None else exponent
    representation = kind(exponent=exponent, balanced=balanced)
    for diagonal in ((), (m - 1,), tuple(range(m))):
        state, factors = measured(representation, shape, diagonal)
        trace = float(factors[0].trace())
        assert all(float(H.trace()) == pytest.approx(trace) for H in factors)
        expected = reduce(oracles.kron, [positive_power(H, e) for H in factors])
        expected = expected / trace ** (m * e - 1) if balanced else expected
        assert oracles.relative_error(representation.to_dense(state)[0], expected) < 1e-7
        v = torch.randn(1, *shape, dtype=torch.float64)
        assert oracles.relative_error(representation.matvec(state, v).reshape(-1), expected @ v.reshape(-1)) < 1e-7


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
def test_a_balanced_product_has_the_scale_of_a_covariance(exponent: float) -> None:
    """Gradients twice as large make a matrix four times as large, whatever the exponent."""
    representation = KronDims(exponent=exponent, balanced=True)
    state, _ = measured(representation, (3, 4), ())
    larger = {k: v if k == "mass" else 4 * v for k, v in state.items()}
    assert oracles.relative_error(representation.to_dense(larger), 4 * representation.to_dense(state)) < 1e-12
