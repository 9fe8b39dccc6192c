"""Running averages with and without bias correction, and raw sums that forget, over 30 steps against explicit loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gradmaker import CasprGradientConfig, OneSidedGradientConfig, ShampooGradientConfig
from tests import oracles
from tests.methods.test_kronecker_dims import gradients, run

DECAY, DAMPING = 0.9, 1e-3


def weights(averaging: str, steps: int) -> list[float]:
    """Of the gradients, oldest first."""
    share = 1.0 if averaging == "raw" else 1 - DECAY
    found = [share * DECAY ** (steps - 1 - j) for j in range(steps)]
    return [w / (1 - DECAY**steps) for w in found] if averaging == "corrected" else found


def root(H: Tensor, mode: str, exponent: float) -> Tensor:
    s, Q = torch.linalg.eigh(H)
    unit = {"absolute": 1.0, "largest": s.max().item(), "trace": s.mean().item()}[mode]
    return Q @ torch.diag((s + DAMPING * unit) ** exponent) @ Q.T


def expected(steps: list[Tensor], averaging: str, mode: str, method: str) -> Tensor:
    w = weights(averaging, len(steps))
    L = root(sum(x * g @ g.T for x, g in zip(w, steps, strict=True)), mode, -0.25)  # type: ignore[arg-type]
    R = root(sum(x * g.T @ g for x, g in zip(w, steps, strict=True)), mode, -0.25)  # type: ignore[arg-type]
    if method == "shampoo":
        return L @ steps[-1] @ R
    J = (L @ steps[-1] + steps[-1] @ R) / 2
    return (L @ J + J @ R) / 2


@pytest.mark.parametrize("method", ["shampoo", "caspr"])
@pytest.mark.parametrize("mode", ["absolute", "largest", "trace"])
@pytest.mark.parametrize("averaging", ["corrected", "plain", "raw"])
def test_thirty_steps_by_hand(averaging: str, mode: str, method: str) -> None:
    steps = gradients(4, 3, steps=30)
    options: dict[str, Any] = {"method": method, "decay": DECAY, "damping": DAMPING, "grafting": "none", "beta1": 0.0}
    options |= {"averaging": averaging, "mode": mode, "preconditioner_interval": 1}
    options |= {"nesterov_average": False} if method == "caspr" else {}
    for count in (1, 7, 30):
        found = run(options, [[g] for g in steps[:count]])[0]
        assert oracles.relative_error(found, expected(steps[:count], averaging, mode, method)) < 1e-10


@pytest.mark.parametrize("grafting", ["keep", "adam"])
@pytest.mark.parametrize("method", ["shampoo", "caspr"])
def test_relative_damping_and_a_grafted_length_leave_no_scale(method: str, grafting: str) -> None:
    steps = [[g] for g in gradients(4, 3, steps=12)]
    options: dict[str, Any] = {"method": method, "decay": DECAY, "grafting": grafting, "preconditioner_interval": 1}
    found = [run(options | {"averaging": a}, steps)[0] for a in ("corrected", "plain", "raw")]
    assert oracles.relative_error(found[1], found[0]) < 1e-9 and oracles.relative_error(found[2], found[0]) < 1e-9
    other = [
        run(options | {"averaging": a, "mode": "absolute", "damping": 0.1}, steps)[0] for a in ("corrected", "plain", "raw")
    ]
    assert oracles.relative_error(other[1], other[0]) > 1e-7 and oracles.relative_error(other[2], other[0]) > 1e-7


def test_refusals() -> None:
    with pytest.raises(ValueError, match="averaging='plain' would have no effect: the statistic is a sum; set decay"):
        ShampooGradientConfig(decay=None, averaging="plain")
    with pytest.raises(ValueError, match=r"averaging='no': .*corrected"):
        ShampooGradientConfig(averaging="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode='clamp': expected absolute, largest, trace"):
        CasprGradientConfig(root="newton", mode="clamp")
    with pytest.raises(ValueError, match="root='svd'"):
        OneSidedGradientConfig(root="svd")  # type: ignore[arg-type]
