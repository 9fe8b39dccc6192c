"""A basis is kept while it is within its tolerance, member by member, however it is tracked."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from gradmaker.curvature import Gradient
from gradmaker.linalg.state import State
from gradmaker.representations import RotatedDims
from gradmaker.representations.base import Fold, Frame
from tests.refreshing import take

FOLD = Fold(0.5, 0.5, 0.5)
SHAPE = (3, 4)


def states(representation: RotatedDims, gradients: list[Tensor]) -> list[State]:
    """After each gradient (B, *SHAPE)."""
    frame = Frame(len(gradients[0]), SHAPE, frozenset(), torch.float64, torch.device("cpu"))
    state, found = representation.init(frame), []
    for index, g in enumerate(gradients):
        take(representation, state, Gradient(g), FOLD, index)
        found.append({k: v.clone() for k, v in state.items()})
    return found


def still_and_turning(steps: int) -> list[Tensor]:
    """The first member repeats one gradient but for a little noise, the second draws anew."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(*SHAPE, dtype=torch.float64, generator=generator)  # noqa: E731
    same = draw()
    return [torch.stack([same + 1e-3 * draw(), draw()]) for _ in range(steps)]


def error(state: State, H: Tensor, axis: int, member: int) -> float:
    """``|B - diag B| / |B|`` of ``B = Q^T H Q``."""
    Q = state[f"basis_{axis}"][member]
    B = Q.T @ H[member] @ Q
    return float((B - torch.diag(B.diagonal())).norm() / B.norm())


@pytest.mark.parametrize("sequence", ["moments_first", "basis_first"])
@pytest.mark.parametrize("tracking", ["power", "qr", "eigh"])
def test_a_basis_within_tolerance_is_kept(tracking: Any, sequence: Any) -> None:
    """Bit for bit where it is, while others of its stack turn; without a tolerance every one is renewed."""
    tolerance = 0.1
    gradients = still_and_turning(6)
    kept = states(RotatedDims(tracking=tracking, tolerance=tolerance, sequence=sequence), gradients)
    free = states(RotatedDims(tracking=tracking, sequence=sequence), gradients)
    turned = []
    for before, after in pairwise(kept[1:]):
        for axis in range(2):
            H = (after if sequence == "basis_first" else before)[f"factor_{axis}"]  # what the renewal has seen
            for member in range(2):
                within = error(before, H, axis, member) <= tolerance
                same = torch.equal(before[f"basis_{axis}"][member], after[f"basis_{axis}"][member])
                assert same == within
                assert float(after["diagnosis"][member, axis, 0]) == (0.0 if within else 1.0)
                turned.append((member, not same))
    assert (0, True) not in turned and (1, True) in turned
    assert not torch.equal(free[-1]["basis_1"][0], free[-2]["basis_1"][0])


@pytest.mark.parametrize("tolerance", [0.0, 0.1])
def test_moments_follow_the_columns_of_a_renewed_basis_alone(tolerance: float) -> None:
    """A member whose basis is kept has the moments that it would have by itself."""
    gradients = still_and_turning(6)
    options: Any = {"tracking": "power", "tolerance": tolerance}
    together = states(RotatedDims(**options), gradients)[-1]
    for member in range(2):
        alone = states(RotatedDims(**options), [g[member : member + 1] for g in gradients])[-1]
        assert torch.allclose(together["moments"][member], alone["moments"][0], rtol=1e-10, atol=0)
