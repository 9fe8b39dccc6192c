"""Geometries of PSGD: coordinates for gradient steps of a factor on the criterion ``E[h^T P h + v^T P^-1 v]``.

The gradient of the criterion is ``h h^T - P^-1 v v^T P^-1``. A geometry gives ``dQ`` by a small matrix ``E`` and takes the
steepest ``E``. All have the fixed point ``P E[h h^T] P = E[v v^T]``; they differ in cost and in rounding errors.

Letters: ``B`` members, ``d`` length of an axis, ``c`` elements of a block over ``d``, ``Q`` factor (B, d, d), or (B, d) of a
diagonal, ``x, z`` images of ``h`` and ``v``, with the axis as rows (B, d, c), ``E`` the gap of their moments, ``s`` the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from gradmaker.linalg.eigen import symmetrise
from gradmaker.linalg.halves import apply_triangles, moment, subtract_product_
from gradmaker.linalg.mode_products import apply_factors

__all__ = ["GEOMETRIES", "STARTS", "Columns", "Gap", "Geometry", "divide", "rotate", "spectral_bound"]

STARTS = 32
"""Starting vectors of the power iterations for a norm."""


@dataclass(frozen=True)
class Columns:
    """The gap ``E = x x^T - c I`` by its columns, which are fewer than half of its side: products with them take less."""

    x: Tensor  # (B, d, r)
    c: float


Gap: TypeAlias = Tensor | Columns
"""``E`` of a factor as a matrix or a diagonal, or by its columns."""


def spectral_bound(A: Tensor, noise: Tensor) -> Tensor:
    """A lower bound of ``|A|_2`` for a symmetric or skew matrix: four products from each start, without orthogonalisation.

    The starts are turned towards the longest row, so that a few suffice for a matrix of low rank. Exact for rank one; above 0.8
    of the norm on random matrices of up to 256 rows.

    Reference: psgd_torch (Li, 2025).  # (B, d, d), (B, k, d) -> (B,)
    """
    scale = A.abs().amax((-2, -1), keepdim=True) + torch.finfo(A.dtype).tiny
    A = A / scale
    return scale.flatten() * _iterated(lambda V: V @ A, _longest(A, A.norm(dim=-1)), noise)


def _bound_of_columns(x: Tensor, noise: Tensor) -> Tensor:
    """`spectral_bound` of ``x x^T``.  # (B, d, r), (B, k, d) -> (B,)"""
    largest: Tensor = torch.linalg.vector_norm(x, dim=-1).amax(-1)  # its square is the largest entry
    scale = largest[:, None, None] + torch.finfo(x.dtype).tiny
    x = x / scale
    lengths = ((x @ (x.mT @ x)) * x).sum(-1)  # squares of those of the rows of x x^T
    longest = _longest(x, lengths) @ x.mT
    bound: Tensor = scale.flatten().square() * _iterated(lambda V: (V @ x) @ x.mT, longest, noise)
    return bound


def _longest(A: Tensor, lengths: Tensor) -> Tensor:
    """The row of the largest length.  # (B, d, c), (B, d) -> (B, 1, c)"""
    return A[torch.arange(len(A), device=A.device), lengths.argmax(-1)].unsqueeze(1)


def _iterated(multiply: Callable[[Tensor], Tensor], row: Tensor, noise: Tensor) -> Tensor:
    """Four power iterations from each start.  # (B, 1, d), (B, k, d) -> (B,)"""
    tiny = torch.finfo(row.dtype).tiny
    V = row + (noise * row).sum(-1, keepdim=True).sign() * noise
    for _ in range(2):
        V = multiply(V)
        V = V / (V.norm(dim=-1, keepdim=True) + tiny)
        V = multiply(V)
    found: Tensor = V.norm(dim=-1).amax(-1)
    return found


def rotate(Q: Tensor, noise: Tensor, longest: float, order: int) -> Tensor:
    """``exp(a R) Q``, a rotation towards a symmetric matrix: ``R = (Q^T - Q) / |Q^T - Q|``, the series up to power ``order``.

    ``a <= longest`` maximises ``tr(exp(a R) Q)`` to second order; over all rotations the trace is largest for a symmetric
    ``Q``. A positive determinant stays positive.  # (B, d, d), (B, k, d) -> (B, d, d)
    """
    R = Q.mT - Q
    R.div_((spectral_bound(R, noise) + torch.finfo(R.dtype).tiny)[:, None, None])
    RQ = R @ Q
    rise, bend = RQ.diagonal(dim1=-2, dim2=-1).sum(-1), -(R * RQ).sum((-2, -1))  # traces of R Q, R R Q
    a = torch.where(bend < 0, (-rise / bend).clamp(max=longest), longest)[:, None, None]
    if order == 2:
        return torch.baddbmm(torch.addcmul(Q, a, RQ), R.mul_(a * a / 2), RQ)
    RRQ = R @ RQ
    return torch.baddbmm(torch.addcmul(Q, a, RQ).addcmul_(a * a / 2, RRQ), R.mul_(a**3 / 6), RRQ)


def divide(Q: Tensor, x: Tensor, axis: int, transposed: bool, triangular: bool = True) -> Tensor:
    """``Q^-1 x``, or ``Q^-T x``, along an axis.  # x: (B, d_1, ..., d_m)"""
    if Q.ndim == 2:
        return x / Q.view(len(Q), *[1] * axis, -1, *[1] * (x.ndim - axis - 2))
    rows = x.movedim(axis + 1, 1)
    flat, M = rows.reshape(len(x), rows.shape[1], -1), Q.mT if transposed else Q
    solved: Tensor = torch.linalg.solve_triangular(M, flat, upper=not transposed) if triangular else torch.linalg.solve(M, flat)
    return solved.reshape(rows.shape).movedim(1, axis + 1)


class Geometry:
    """``Q <- (I - s E) Q`` with ``E = t_1 - t_2``, where ``t_1 = x x^T`` of ``x = P h``, and ``t_2 = v v^T``.

    For noise ``v`` that is independent of ``h`` the expectation ``c I`` replaces ``t_2``.
    """

    direct: ClassVar[bool] = False
    """Whether the factors are those of ``P``; otherwise ``P = Q^T Q``."""
    triangular: ClassVar[bool] = False
    """Whether ``Q`` is upper triangular; then the noise itself is needed, not only its expectation."""

    def images(self, factors: Sequence[Tensor], v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The images of ``h`` and ``v``, whose moments are compared.  # (B, d_1, ..., d_m)"""
        x = apply_factors(factors, h)
        return (x if self.direct else apply_factors([Q if Q.ndim == 2 else Q.mT for Q in factors], x)), v

    def gap(self, Q: Tensor, x: Tensor, z: Tensor | None, noise: Tensor, count: int) -> tuple[Gap, Tensor]:
        """``E``, and the size of ``t_1 + t_2``.

        x: (B, d, r) with ``t_1 = x x^T``; z: None for the expectation of ``count`` columns; noise: (B, k, d)
        """
        if z is not None:
            return _difference(_moment(x, Q), _moment(z, Q), noise)
        if Q.ndim == 3 and 2 * x.shape[-1] < x.shape[-2]:
            largest = torch.maximum(_bound_of_columns(x, noise), x.square().sum(-1).amax(-1))
            return Columns(x, count), largest + count
        t = _moment(x, Q)
        size = _size(t, noise) + count
        (t if t.ndim == 2 else t.diagonal(dim1=-2, dim2=-1)).sub_(count)
        return t, size

    def move(self, Q: Tensor, E: Gap, s: Tensor, noise: Tensor) -> Tensor:
        """The factor after a step.  s: (B,)"""
        if isinstance(E, Columns):
            return torch.baddbmm(_scaled(Q, 1 + s * E.c), E.x, _scaled(E.x.mT @ Q, s), alpha=-1)
        return torch.baddbmm(Q, _scaled(E, s), Q, alpha=-1) if Q.ndim == 3 else Q - _scaled(E, s) * Q


class EQ(Geometry):
    """``dQ = E Q`` with triangular ``E`` and ``Q``: ``x = Q h``, ``z = Q^-T v`` by substitution.

    Reference: Li, IEEE TNNLS 2018, arXiv:1512.04202, section 4.
    """

    triangular: ClassVar[bool] = True

    def images(self, factors: Sequence[Tensor], v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        for axis, Q in enumerate(factors):
            v = divide(Q, v, axis, transposed=True)
        return apply_triangles(factors, h), v

    def gap(self, Q: Tensor, x: Tensor, z: Tensor | None, noise: Tensor, count: int) -> tuple[Gap, Tensor]:
        assert z is not None
        E, size = _difference(_moment(x, Q), _moment(z, Q), noise)
        return E if E.ndim == 2 else E.triu_(), size

    def move(self, Q: Tensor, E: Gap, s: Tensor, noise: Tensor) -> Tensor:
        assert isinstance(E, Tensor)
        return subtract_product_(Q.clone(), _scaled(E, s), Q) if Q.ndim == 3 else Q - _scaled(E, s) * Q


class QEP(Geometry):
    """``dQ = Q E P``: as `EQ` with ``Q x`` and ``Q v``. Steps depend on the scale of a factor, so that factors are balanced."""

    def gap(self, Q: Tensor, x: Tensor, z: Tensor | None, noise: Tensor, count: int) -> tuple[Gap, Tensor]:
        if z is None:
            t = count * (Q.square() if Q.ndim == 2 else Q @ Q.mT)
        else:
            t = _moment(_apply(Q, z), Q)
        return _difference(_moment(_apply(Q, x), Q), t, noise)


class QEQ(Geometry):
    """``dQ = Q E Q``: ``Q <- Q (I - s E)``."""

    def move(self, Q: Tensor, E: Gap, s: Tensor, noise: Tensor) -> Tensor:
        if isinstance(E, Columns):
            return torch.baddbmm(_scaled(Q, 1 + s * E.c), Q @ E.x, _scaled(E.x.mT, s), alpha=-1)
        return torch.baddbmm(Q, Q, _scaled(E, s), alpha=-1) if Q.ndim == 3 else Q - _scaled(E, s) * Q


class Q05EQ15(Geometry):
    """``dQ = Q^(1/2) E Q^(3/2)``, exact for a symmetric ``Q``: a rotation keeps it nearly symmetric, with the same ``P``."""

    def move(self, Q: Tensor, E: Gap, s: Tensor, noise: Tensor) -> Tensor:
        new = super().move(Q, E, s, noise)
        return new if Q.ndim == 2 else rotate(new, noise, 1 / 8, order=2)


class QUAD(Geometry):
    """``Q <- (I - s E / 2) Q (I - s E / 2)``: products alone; ``Q`` stays exactly symmetric, and definite for any step."""

    share: ClassVar[float] = 0.5

    def move(self, Q: Tensor, E: Gap, s: Tensor, noise: Tensor) -> Tensor:
        if isinstance(E, Columns):
            return self._move_by_columns(Q, E, self.share * s)
        e = _scaled(E, self.share * s)
        if Q.ndim == 2:
            return Q * (1 - e).square()
        new = torch.baddbmm(Q, e, Q, alpha=-1)
        new = torch.baddbmm(new, new, e, alpha=-1)
        return symmetrise(new)

    def _move_by_columns(self, Q: Tensor, E: Columns, s: Tensor) -> Tensor:
        """``f^2 Q - A x^T - x A^T``, ``A = s f u - s^2 x (x^T u) / 2``, ``u = Q x``, ``f = 1 + s c``.  s: (B,)"""
        u, f = Q @ E.x, 1 + s * E.c
        A = torch.baddbmm(_scaled(u, s * f), _scaled(E.x, s.square()), E.x.mT @ u, alpha=-0.5)
        half = A @ E.x.mT
        return _scaled(Q, f.square()).sub_(half + half.mT)


class QUAD4P(QUAD):
    """`QUAD` for ``P`` itself, in whole steps: half the products of a solve; rounding may make ``P`` indefinite."""

    direct: ClassVar[bool] = True
    share: ClassVar[float] = 1.0


class PRO4P(Geometry):
    """``dP = P^(1/2) E P`` with rotations until ``|P - P^T| <= 1e-3 |P|`` entry by entry; what remains is symmetrised."""

    direct: ClassVar[bool] = True
    rotations: ClassVar[int] = 10
    tolerance: ClassVar[float] = 1e-3

    def move(self, Q: Tensor, E: Gap, s: Tensor, noise: Tensor) -> Tensor:
        P = super().move(Q, E, s, noise)
        if P.ndim == 2:
            return P
        for _ in range(self.rotations):
            skewed = (P - P.mT).abs().amax((-2, -1)) > self.tolerance * P.abs().amax((-2, -1))
            if P.device.type == "cpu" and not bool(skewed.any()):  # a host read is free here, a rotation is not
                break
            P = torch.where(skewed[:, None, None], rotate(P, noise, 1 / 3, order=3), P)
        return (P + P.mT) / 2


GEOMETRIES: dict[str, Geometry] = {
    "EQ": EQ(),
    "QEP": QEP(),
    "QEQ": QEQ(),
    "Q0.5EQ1.5": Q05EQ15(),
    "QUAD": QUAD(),
    "QUAD4P": QUAD4P(),
    "PRO4P": PRO4P(),
}
"""Geometries by their names in psgd_torch. Reference: Li, 2024, arXiv:2402.11858; psgd_torch (2025)."""


def _moment(x: Tensor, Q: Tensor) -> Tensor:
    """``x x^T``, or its diagonal where ``Q`` is a diagonal."""
    return x.square().sum(-1) if Q.ndim == 2 else moment(x)


def _apply(Q: Tensor, x: Tensor) -> Tensor:
    return Q @ x if Q.ndim == 3 else Q.unsqueeze(-1) * x


def _difference(t1: Tensor, t2: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    size = _size(t1 + t2, noise)
    return t1.sub_(t2), size


def _size(t: Tensor, noise: Tensor) -> Tensor:
    """A lower bound of the largest eigenvalue of a positive semidefinite matrix: at least its largest entry.  # (B,)"""
    if t.ndim == 2:
        return t.amax(-1)
    return torch.maximum(spectral_bound(t, noise), t.diagonal(dim1=-2, dim2=-1).amax(-1))


def _scaled(E: Tensor, s: Tensor) -> Tensor:
    return E * s.view(-1, *[1] * (E.ndim - 1))
