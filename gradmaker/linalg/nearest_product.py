"""The Kronecker product that is nearest to a sum of two."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmaker.linalg.factors import add, diagonal_of, for_members

__all__ = ["nearest_product"]


def nearest_product(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> list[Tensor]:
    """``L, R`` with the least ``|L (x) R - (L_1 (x) R_1 + L_2 (x) R_2)|`` in the Frobenius norm; PSD, as the given factors are.

    Rearranged, the sum is ``vec(L_1) vec(R_1)^T + vec(L_2) vec(R_2)^T``; its largest singular triple is the nearest product.
    With ``t_j = |L_j| |R_j|`` and the inner products ``x, y`` of the unit factors ``L_j / |L_j|`` and ``R_j / |R_j|``,
    ``R = sum_j b_j R_j / |R_j|`` and ``L = sum_j c_j t_j L_j / |L_j|``: ``b`` is the eigenvector of the largest eigenvalue of
    ``[[t_1^2, t_1 t_2 x], [t_1 t_2 x, t_2^2]] Y`` with ``Y = [[1, y], [y, 1]]``, and ``c = Y b / (b^T Y b)``. Inner products of
    PSD matrices are not negative; hence neither are ``b`` and ``c``.

    Reference: Van Loan & Pitsianis 1993, "Approximation with Kronecker products", sections 2 and 5.

    # (B, d, d) or another form of `gradmaker.linalg.factors`; ``L_1`` may be a diagonal where ``L_2`` is none
    """
    sizes = [[_size(F) for F in pair] for pair in (first, second)]
    t = torch.stack([left * right for left, right in sizes], -1)  # (B, 2)
    largest = t.amax(-1, keepdim=True)
    x, y = (_cosine(F, G, m, n) for F, G, m, n in zip(first, second, *sizes, strict=True))
    b = _eigenvector(t / _nonzero(largest), x, y)
    c = b + y.unsqueeze(-1) * b.flip(-1)
    c = c / (b * c).sum(-1, keepdim=True) * t
    found = []
    for side, weights in enumerate((c, b)):
        scaled = [weights[:, j] / _nonzero(sizes[j][side]) for j in range(2)]
        F, G = (for_members(w.to(F), F) * F for w, F in zip(scaled, (first[side], second[side]), strict=True))
        found.append(add(G, F))
    return found


def _size(F: Tensor) -> Tensor:
    """The Frobenius norm, in double precision.  # (B,)"""
    found: Tensor = torch.linalg.vector_norm(F.flatten(1), dim=1, dtype=torch.float64)
    return found


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1.0)


def _cosine(F: Tensor, G: Tensor, m: Tensor, n: Tensor) -> Tensor:
    """``<F, G> / (|F| |G|)``; zero where one of them is.  # (B,)"""
    G = diagonal_of(G) if F.ndim < G.ndim else G
    products = (F / for_members(_nonzero(m).to(F), F)) * (G / for_members(_nonzero(n).to(G), G))
    return products.flatten(1).sum(1, dtype=torch.float64).clamp(min=0)


def _eigenvector(t: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """A unit vector of the largest eigenvalue of the 2 x 2 matrix, without cancellation.  # (B, 2)"""
    one, two = t.unbind(-1)
    cross = one * two * x
    a, d = one.square() + cross * y, two.square() + cross * y
    upper, lower = one.square() * y + cross, two.square() * y + cross
    gap = a - d
    root = (gap.square() + 4 * upper * lower).sqrt()
    b = torch.where(
        (gap >= 0).unsqueeze(-1), torch.stack([gap + root, 2 * lower], -1), torch.stack([2 * upper, root - gap], -1)
    )
    b[..., 0] += (b.sum(-1) == 0).to(b)  # two orthogonal terms of one size: the first
    unit: Tensor = b / b.norm(dim=-1, keepdim=True)
    return unit
