"""Second moments by stripes up to the diagonal."""

from __future__ import annotations

import pytest
import torch

from gradmaker.linalg.moments import ENTRIES, SIDE, STRIPES, add_moment_


@pytest.mark.parametrize(("stack", "d", "R"), [(1, 256, 300), (2, 301, 250), (1, 513, 128), (2, 40, 7), (1, 300, 3)])
@pytest.mark.parametrize("weights", [False, True])
def test_stripes_are_the_product(stack: int, d: int, R: int, weights: bool) -> None:
    x = torch.randn(stack, R, d, dtype=torch.float64)
    w = torch.rand(R, 1, dtype=torch.float64) if weights else torch.ones(R, 1, dtype=torch.float64)
    start = x.mT @ x
    whole = torch.zeros(stack, d + 1, d + 1, dtype=torch.float64)
    whole[:, :d, :d] = start
    add_moment_(whole[:, :d, :d], w * x, x, 0.9, 0.3)
    torch.testing.assert_close(whole[:, :d, :d], 0.9 * start + 0.3 * (w * x).mT @ x, rtol=1e-13, atol=1e-11)
    assert not whole[:, d].any() and not whole[:, :, d].any()  # nothing beyond the matrix
    if d >= SIDE and R * d >= ENTRIES:
        width = -(-d // STRIPES)
        assert torch.equal(whole[:, :width, width:], whole[:, width:, :width].mT)
