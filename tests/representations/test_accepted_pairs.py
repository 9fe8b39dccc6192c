"""Which secant pairs L-BFGS and K-BFGS take, on every scale of steps and changes, and what they start from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gradmaker.curvature.evidence import Outer, Pair
from gradmaker.linalg.state import State
from gradmaker.representations import KronPairs, Pairs
from gradmaker.representations.base import Fold, Frame

ONCE = Fold(1.0, 1.0, 1.0, summed=True)


def held(representation: Pairs, *pairs: tuple[Tensor, Tensor]) -> State:
    """A state after pairs of vectors (B, P)."""
    first = pairs[0][0]
    state = representation.init(Frame(len(first), first.shape[1:], frozenset(), torch.float64, torch.device("cpu")))
    for s, y in pairs:
        representation.update(state, Pair(s, y, "secant"), ONCE)
    return state


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("acceptance", [0.0, 1e-8, 0.5])
def test_the_curvature_along_a_step_decides(acceptance: float, scale: float) -> None:
    """``s^T y > acceptance |s|^2``, whatever the length of the step: a little more is taken, a little less is not."""
    s = scale * torch.randn(3, 5, dtype=torch.float64)
    ratios = torch.tensor([1.01 * acceptance + 1e-12, 0.99 * acceptance - 1e-12, acceptance + 1.0]).double().unsqueeze(1)
    state = held(Pairs(memory=2, acceptance=acceptance), (s, ratios * s))
    assert state["taken"].tolist() == [1, 0, 1] and state["refused"].tolist() == [0, 1, 0]
    assert torch.equal(state["s"][1], torch.zeros(2, 5).double()) and torch.equal(state["s"][0, -1], s[0])


@pytest.mark.parametrize("damping", [0.0, 0.25])
def test_damping_is_added_before_a_pair_is_judged(damping: float) -> None:
    s = torch.eye(4)[:1].double()
    state = held(Pairs(memory=1, damping=damping, acceptance=0.1), (s, 0.05 * s))
    assert bool(state["taken"][0]) == (damping > 0)
    if damping:
        assert float(state["gamma"][0]) == pytest.approx(1 / (0.05 + damping))


def test_the_scale_is_that_of_the_newest_accepted_pair() -> None:
    """``s^T y / y^T y``: neither ``s^T s / s^T y`` nor that of a pair that was refused."""
    s, y = torch.tensor([[1.0, 0.0, 2.0]]).double(), torch.tensor([[2.0, 1.0, 1.0]]).double()
    state = held(Pairs(memory=3), (s, s), (s, y), (s, -y))
    assert float(state["gamma"][0]) == pytest.approx(4 / 6) and int(state["taken"][0]) == 2


@pytest.mark.parametrize("memory", [1, 2, 4])
def test_the_oldest_pair_leaves(memory: int) -> None:
    """The inverse of the last pairs alone, and each is interpolated: ``P y = s`` of the newest."""
    pairs = [(s := torch.randn(1, 6, dtype=torch.float64), s + 0.1 * torch.randn(1, 6, dtype=torch.float64)) for _ in range(5)]
    assert all(float((s * y).sum()) > 0 for s, y in pairs)
    representation = Pairs(memory=memory)
    whole, last = held(representation, *pairs), held(representation, *pairs[-memory:])
    g = torch.randn(1, 6, dtype=torch.float64)
    assert torch.allclose(representation.apply(whole, g), representation.apply(last, g), rtol=1e-12)
    assert torch.allclose(representation.apply(whole, pairs[-1][1]), pairs[-1][0], rtol=1e-9)


# --- K-BFGS ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["powell", "shift"])
@pytest.mark.parametrize("positions", [1, 4, 9])
def test_positions_share_the_damping_of_k_bfgs(positions: int, form: Any) -> None:
    """``sqrt(damping / R)`` bounds the curvature of outputs from below, ``sqrt(damping R)`` is added to that of inputs."""
    damping, representation = 0.3, KronPairs(damping=0.3, form=form)
    state = representation.init(Frame(1, (2, 3), frozenset(), torch.float64, torch.device("cpu")))
    a, g = torch.randn(1, 5, positions, 3, dtype=torch.float64), torch.zeros(1, 1, 5, positions, 2, dtype=torch.float64)
    representation.update(state, Outer(a, g, kind="with_secants"), Fold(0.9, 0.1, 0.1))
    A = torch.einsum("gnri,gnrj->ij", a, a) / 5
    eye = torch.eye(3).double()
    s = torch.linalg.inv(A + (damping * positions) ** 0.5 * eye) @ a.mean((0, 1, 2))
    held = torch.linalg.inv(representation.snapshot(state)["right"][0])
    assert torch.allclose(held @ s, (A + (damping * positions) ** 0.5 * eye) @ s, rtol=1e-9)
    flat = torch.tensor([[1.0, 0.0]]).double()
    representation.update(state, Pair(flat, 0.05 * flat, "output_secant"), Fold(0.9, 0.1, 0.1))
    floor = (damping / positions) ** 0.5
    found = float(torch.linalg.inv(state["left"][0])[0, 0])
    assert found == pytest.approx(max(floor, 0.05) if form == "powell" else 0.05 + floor)
