"""The residual of a root by singular values: the same as by the eigenvalues of the formed factor."""

from __future__ import annotations

import pytest
import torch

from gradmaker.linalg.diagnosis import singular_residual, spectral_residual
from tests import oracles


@pytest.mark.parametrize("d", [5, 40])
@pytest.mark.parametrize("wrong", [0.0, 1e-3])
def test_two_forms_of_one_residual(d: int, wrong: float) -> None:
    generator = torch.Generator().manual_seed(d)
    R = torch.randn(2, d, d, dtype=torch.float64, generator=generator)
    _, s, Vh = torch.linalg.svd(R)
    s = s * (1 + wrong)
    damped = s.square() + 0.3
    damped[1, 0] = torch.inf  # dropped by a pseudo-inverse
    found, expected = singular_residual(R, (s, Vh.mT), damped), spectral_residual(R.mT @ R, (s.square(), Vh.mT), damped)
    assert oracles.relative_error(found, expected) < (1e-9 if wrong else 1.0)
    assert (found > 1e-4).all() if wrong else (found < 1e-11).all()
