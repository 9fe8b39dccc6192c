"""Mode products, Kronecker products and contractions against `torch.einsum` written out and products of whole matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradmaker.linalg.contraction import contract
from gradmaker.linalg.factors import dense
from gradmaker.linalg.mode_products import NARROW, apply_factors, kronecker_product, mode_matrix

B = 2
WIDE = NARROW + 1
MATRICES = [(4, 3), (WIDE, 3), (3, WIDE)]
TENSORS = [(4, 3, 2), (2, WIDE, 3), (3, 2, WIDE), (WIDE, 2, 2), (3, 4, 3, 3), (1, 3, 1, 2)]
BY_ORDER = {1: "bai,bi->ba", 2: "bai,bcj,bij->bac", 3: "bai,bcj,bdk,bijk->bacd", 4: "bai,bcj,bdk,bel,bijkl->bacde"}


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= 1e-12 * float(expected.norm())


@pytest.mark.parametrize(
    "shape",
    [
        (1,),
        (5,),
        (WIDE,),
        (4, 3),
        (WIDE, 3),
        (3, WIDE),
        (4, 3, 2),
        (2, WIDE, 3),
        (3, 2, WIDE),
        (WIDE, 2, 2),
        (3, 4, 3, 3),
        (1, 3, 1, 2),
    ],
    ids=str,
)
def test_mode_products(shape: tuple[int, ...]) -> None:
    """Narrow and wide axes, of which each way of `apply_factors` serves some."""
    g, factors = draw(B, *shape), [draw(B, d, d) for d in shape]
    expected = torch.einsum(BY_ORDER[len(shape)], *factors, g)
    close(apply_factors(factors, g), expected)
    for strided in (g.flip(0).flip(0), g.transpose(0, -1).contiguous().transpose(0, -1)):
        close(apply_factors(factors, strided), expected)
    for b in range(B):
        whole = kronecker_product(factors)[b]
        close(whole @ g[b].reshape(-1), expected[b].reshape(-1))


@pytest.mark.parametrize("shape", [(4, 3), (3, WIDE, 2), (4, 3, 3, 3)], ids=str)
def test_axes_that_are_left_alone(shape: tuple[int, ...]) -> None:
    g = draw(B, *shape)
    for axis, d in enumerate(shape):
        F, eyes = draw(B, d, d), [torch.eye(n, dtype=torch.float64).expand(B, n, n) for n in shape]
        alone = [F if k == axis else None for k in range(len(shape))]
        expected = torch.einsum(BY_ORDER[len(shape)], *(F if k == axis else eye for k, eye in enumerate(eyes)), g)
        close(apply_factors(alone, g), expected)
        close(mode_matrix(apply_factors(alone, g), axis), F @ mode_matrix(g, axis))


def test_forms_of_factors() -> None:
    """Dense, diagonal, tiled: blocks of 3 and a rest of 1."""
    tiled = draw(B, 7, 3)
    tiled[:, 6, 1:] = 0
    factors = [draw(B, 4, 4), draw(B, 5), tiled]
    g = draw(B, 4, 5, 7)
    expected = torch.einsum(BY_ORDER[3], *(dense(F) for F in factors), g)
    close(apply_factors(factors, g), expected)
    close((kronecker_product(factors) @ g.reshape(B, -1, 1)).reshape(g.shape), expected)


def test_kronecker_products_by_hand() -> None:
    F = [draw(B, 2, 2), draw(B, 3, 3), draw(B, 2, 2)]
    for b in range(B):
        close(kronecker_product(F)[b], torch.kron(torch.kron(F[0][b], F[1][b]), F[2][b]))
    close(kronecker_product(F[:1]), F[0])


def test_an_unfolding_by_hand() -> None:
    g = torch.arange(12.0).reshape(1, 2, 3, 2)
    assert mode_matrix(g, 1)[0].tolist() == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]


@pytest.mark.parametrize("sizes", [{"r": 2, "i": 30, "o": 20}, {"r": 40, "i": 3, "o": 2}], ids=["pairs of positions", "rows"])
def test_contractions_in_both_orders(sizes: dict[str, int]) -> None:
    """Few positions and many: other orders, one sum."""
    r, i, o = sizes["r"], sizes["i"], sizes["o"]
    a, g = draw(1, 4, r, i), draw(3, 1, 4, r, o)
    J = torch.einsum("gnri,kgnro->kgnoi", a, g)
    close(contract("gnri,gnsi,kgnso,kgnrp->gop", a, a, g, g), torch.einsum("kgnoi,kgnpi->gop", J, J))
    close(contract("gnri,gnsj,kgnro,kgnso->gij", a, a, g, g), torch.einsum("kgnoi,kgnoj->gij", J, J))
