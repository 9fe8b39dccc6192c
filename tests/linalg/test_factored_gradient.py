"""Gradients held by rows agree with the formed ones."""

from __future__ import annotations

import pytest
import torch

from gradmaker.linalg.factored_gradient import FactoredGradient

G = torch.Generator().manual_seed(0)
ROWS = FactoredGradient(
    torch.randn(2, 5, 3, dtype=torch.float64, generator=G), torch.randn(2, 5, 4, dtype=torch.float64, generator=G)
)
FORMED = torch.einsum("bro,bri->boi", ROWS.g, ROWS.a)


def test_products_are_those_of_the_formed_gradient() -> None:
    torch.testing.assert_close(ROWS.form(), FORMED, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(ROWS.moment(0), FORMED @ FORMED.mT, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ROWS.moment(1), FORMED.mT @ FORMED, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ROWS.squared_norm(), FORMED.square().sum((1, 2)), rtol=1e-13, atol=1e-13)
    assert ROWS.shape == FORMED.shape and ROWS.count == 5


@pytest.mark.parametrize(("rows", "pays"), [(511, True), (512, False)])
def test_rows_pay_where_they_are_fewer_than_equal_sides(rows: int, pays: bool) -> None:
    assert FactoredGradient(torch.zeros(1, rows, 512), torch.zeros(1, rows, 512)).pays is pays


def test_rows_are_converted() -> None:
    assert ROWS.to(torch.float32).form().dtype == torch.float32


def test_a_length_is_right_where_rows_cancel() -> None:
    """A gradient near zero, as at the optimum of a batch: the sum by rows would be rounding, or negative."""
    g, a = torch.randn(1, 64, 8, generator=G), torch.randn(1, 64, 9, generator=G)
    rows = FactoredGradient(torch.cat([g, -g], 1), torch.cat([a, a + 1e-4 * torch.randn(1, 64, 9, generator=G)], 1))
    exact = FactoredGradient(rows.g.double(), rows.a.double()).form().norm()
    assert abs(float(rows.length()) / float(exact) - 1) < 1e-2
    assert abs(float(rows.squared_norm().clamp(min=0).sqrt()) / float(exact) - 1) > 0.1
    assert FactoredGradient(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2)).length().tolist() == [0.0]
