"""The Kronecker product nearest to a sum of two, against the first singular triple of the whole rearranged matrix."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from gradmaker.linalg.factors import dense
from gradmaker.linalg.nearest_product import nearest_product
from tests import oracles


def psd(stack: int, side: int, rank: int | None = None) -> Tensor:
    x = torch.randn(stack, rank or side + 2, side, dtype=torch.float64)
    return x.mT @ x


def whole(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of the products.  # (B, P, P)"""
    return torch.stack([sum(oracles.kron(dense(L)[b], dense(R)[b]) for L, R in pairs) for b in range(len(pairs[0][0]))])  # type: ignore[misc]


def expected(C: Tensor, rows: int) -> Tensor:
    return torch.stack([oracles.kron(*oracles.nearest_kronecker(one, rows)) for one in C])


def tiled(F: Tensor, width: int) -> Tensor:
    """Blocks along the diagonal.  # (B, d, d) -> (B, d, width)"""
    out = F.new_zeros(*F.shape[:2], width)
    for start in range(0, F.shape[1], width):
        rows = slice(start, min(start + width, F.shape[1]))
        out[:, rows, : rows.stop - start] = F[:, rows, rows]
    return out


FORMS = {
    "dense": lambda F: F,
    "diagonal": lambda F: F.diagonal(dim1=1, dim2=2).contiguous(),
    "tiled": lambda F: tiled(F, 2),
}


@pytest.mark.parametrize(("left", "right"), [*product(FORMS, FORMS)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_it_is_the_first_singular_triple(left: str, right: str, scale: float) -> None:
    """The factors of the first term's left side are a diagonal, as those of one-hot inputs."""
    torch.manual_seed(0)
    first = psd(3, 5).diagonal(dim1=1, dim2=2) * scale, FORMS[right](psd(3, 4))
    second = FORMS[left](psd(3, 5, 2)), FORMS[right](psd(3, 4, 1))
    C = whole([first, second])
    L, R = nearest_product(first, second)
    assert L.shape == second[0].shape and R.shape == second[1].shape
    found = whole([(L, R)])
    torch.testing.assert_close(found, expected(C, 5), rtol=1e-10, atol=1e-12 * float(C.abs().max()))
    for F in (dense(L), dense(R)):
        assert float(torch.linalg.eigvalsh(F).min()) > -1e-12 * float(F.abs().max())


@pytest.mark.parametrize("empty", [0, 1])
def test_one_term_is_itself(empty: int) -> None:
    torch.manual_seed(1)
    pairs = [(psd(2, 3), psd(2, 4)), (psd(2, 3), psd(2, 4))]
    pairs[empty] = (torch.zeros(2, 3, 3).double(), pairs[empty][1])
    torch.testing.assert_close(whole([nearest_product(*pairs)]), whole([pairs[1 - empty]]), rtol=1e-13, atol=1e-13)  # type: ignore[list-item]


def test_nothing_is_nothing() -> None:
    zero = torch.zeros(2, 3), torch.zeros(2, 4, 4)
    assert all(float(F.abs().max()) == 0 for F in nearest_product(zero, zero))


def test_equal_orthogonal_terms_give_one_of_them() -> None:
    """Where the singular value is double the nearest product is not unique, and its distance is."""
    eye = torch.eye(2, dtype=torch.float64)[None]
    pairs = [(eye[:, 0], torch.diag_embed(eye[:, 0])), (eye[:, 1], torch.diag_embed(eye[:, 1]))]
    found = whole([nearest_product(*pairs)])  # type: ignore[list-item]
    assert float(torch.linalg.norm(found - whole(pairs))) == pytest.approx(1.0, rel=1e-12)


def test_small_numbers_do_not_underflow() -> None:
    """In single precision, where the squares of these entries are zero."""
    torch.manual_seed(2)
    first, second = ((psd(1, 3), 1e-25 * psd(1, 4)) for _ in range(2))
    single = [tuple(F.float() for F in pair) for pair in (first, second)]
    L, R = nearest_product(*single)  # type: ignore[arg-type]
    found = whole([(L.double(), R.double())])
    assert oracles.relative_error(found, whole([nearest_product(first, second)])) < 1e-5  # type: ignore[list-item]
