"""Geometries of PSGD: coordinates for gradient steps of a factor on the criterion ``E[h^T P h + v^T P^-1 v]``.

The gradient of the criterion is ``h h^T - P^-1 v v^T P^-1``. A geometry gives ``dQ`` by a small matrix ``E`` and takes the
steepest ``E``. All have the fixed point ``P E[h h^T] P = E[v v^T]``; they differ in cost and in rounding errors.

Letters: ``B`` members, ``d`` length of an axis, ``c`` elements of a block over ``d``, ``Q`` factor (B, d, d), or (B, d) of a
diagonal, ``x, z`` images of ``h`` and ``v``, with the axis as rows (B, d, c), ``E`` the gap of their moments, ``s`` the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from gradmaker.linalg.mode_products import apply_factors

__all__ = ["GEOMETRIES", "STARTS", "Geometry", "divide", "rotate", "spectral_bound"]

STARTS = 32
"""Starting vectors of the power iterations for a norm."""


def spectral_bound(A: Tensor, noise: Tensor) -> Tensor:
    """A lower bound of ``|A|_2`` for a symmetric or skew matrix: four products from each start, without orthogonalisation.

    The starts are turned towards the longest row, so that a few suffice for a matrix of low rank. Exact for rank one; above 0.8
    of the norm on random matrices of up to 256 rows.

    Reference: psgd_torch (Li, 2025).  # (B, d, d), (B, k, d) -> (B,)
    """
    tiny = torch.finfo(A.dtype).tiny
    scale = A.abs().amax((-2, -1), keepdim=True) + tiny
    A = A / scale
    longest = A.norm(dim=-1).argmax(-1)
    row = A[torch.arange(len(A), device=A.device), longest].unsqueeze(1)
    V = row + (noise * row).sum(-1, keepdim=True).sign() * noise
    for _ in range(2):
        V = V @ A
        V = V / (V.norm(dim=-1, keepdim=True) + tiny)
        V = V @ A
    found: Tensor = scale.flatten() * V.norm(dim=-1).amax(-1)
    return found


def rotate(Q: Tensor, noise: Tensor, longest: float, order: int) -> Tensor:
    """``exp(a R) Q``, a rotation towards a symmetric matrix: ``R = (Q^T - Q) / |Q^T - Q|``, the series up to power ``order``.

    ``a <= longest`` maximises ``tr(exp(a R) Q)`` to second order; over all rotations the trace is largest for a symmetric
    ``Q``. A positive determinant stays positive.  # (B, d, d), (B, k, d) -> (B, d, d)
    """
    R = Q.mT - Q
    R = R / (spectral_bound(R, noise) + torch.finfo(R.dtype).tiny)[:, None, None]
    RQ = R @ Q
    RRQ = R @ RQ
    rise, bend = (X.diagonal(dim1=-2, dim2=-1).sum(-1) for X in (RQ, RRQ))
    a = torch.where(bend < 0, (-rise / bend).clamp(max=longest), longest)[:, None, None]
    turned = Q + a * (RQ + a / 2 * RRQ)
    return turned if order == 2 else turned + a**3 / 6 * (R @ RRQ)


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

    def gap(self, Q: Tensor, x: Tensor, z: Tensor | None, noise: Tensor) -> tuple[Tensor, Tensor]:
        """``E``, and the size of ``t_1 + t_2``.  z: None for the expectation; noise: (B, k, d)  # (B, d, d) or (B, d), (B,)"""
        t = _moment(x, Q)
        if z is not None:
            return _difference(t, _moment(z, Q), noise)
        c = x.shape[-1]
        return _subtract_identity(t, c), _size(t, noise) + c

    def move(self, Q: Tensor, E: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """The factor after a step.  s: (B,)"""
        return Q - _scaled(E @ Q if Q.ndim == 3 else E * Q, s)


class EQ(Geometry):
    """``dQ = E Q`` with triangular ``E`` and ``Q``: ``x = Q h``, ``z = Q^-T v`` by substitution.

    Reference: Li, IEEE TNNLS 2018, arXiv:1512.04202, section 4.
    """

    triangular: ClassVar[bool] = True

    def images(self, factors: Sequence[Tensor], v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        for axis, Q in enumerate(factors):
            v = divide(Q, v, axis, transposed=True)
        return apply_factors(factors, h), v

    def gap(self, Q: Tensor, x: Tensor, z: Tensor | None, noise: Tensor) -> tuple[Tensor, Tensor]:
        assert z is not None
        E, size = _difference(_moment(x, Q), _moment(z, Q), noise)
        return E if E.ndim == 2 else E.triu(), size


class QEP(Geometry):
    """``dQ = Q E P``: as `EQ` with ``Q x`` and ``Q v``. Steps depend on the scale of a factor, so that factors are balanced."""

    def gap(self, Q: Tensor, x: Tensor, z: Tensor | None, noise: Tensor) -> tuple[Tensor, Tensor]:
        if z is None:
            t = x.shape[-1] * (Q.square() if Q.ndim == 2 else Q @ Q.mT)
        else:
            t = _moment(_apply(Q, z), Q)
        return _difference(_moment(_apply(Q, x), Q), t, noise)


class QEQ(Geometry):
    """``dQ = Q E Q``: ``Q <- Q (I - s E)``."""

    def move(self, Q: Tensor, E: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        return Q - _scaled(Q @ E if Q.ndim == 3 else E * Q, s)


class Q05EQ15(Geometry):
    """``dQ = Q^(1/2) E Q^(3/2)``, exact for a symmetric ``Q``: a rotation keeps it nearly symmetric, with the same ``P``."""

    def move(self, Q: Tensor, E: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        new = super().move(Q, E, s, noise)
        return new if Q.ndim == 2 else rotate(new, noise, 1 / 8, order=2)


class QUAD(Geometry):
    """``Q <- (I - s E / 2) Q (I - s E / 2)``: products alone; ``Q`` stays exactly symmetric, and definite for any step."""

    share: ClassVar[float] = 0.5

    def move(self, Q: Tensor, E: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        e = _scaled(E, self.share * s)
        if Q.ndim == 2:
            return Q * (1 - e).square()
        new = Q - e @ Q
        new = new - new @ e
        return (new + new.mT) / 2


class QUAD4P(QUAD):
    """`QUAD` for ``P`` itself, in whole steps: half the products of a solve; rounding may make ``P`` indefinite."""

    direct: ClassVar[bool] = True
    share: ClassVar[float] = 1.0


class PRO4P(Geometry):
    """``dP = P^(1/2) E P`` with rotations until ``|P - P^T| <= 1e-3 |P|`` entry by entry; what remains is symmetrised."""

    direct: ClassVar[bool] = True
    rotations: ClassVar[int] = 10
    tolerance: ClassVar[float] = 1e-3

    def move(self, Q: Tensor, E: Tensor, s: Tensor, noise: Tensor) -> Tensor:
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
    return x.square().sum(-1) if Q.ndim == 2 else x @ x.mT


def _apply(Q: Tensor, x: Tensor) -> Tensor:
    return Q @ x if Q.ndim == 3 else Q.unsqueeze(-1) * x


def _difference(t1: Tensor, t2: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    return t1 - t2, _size(t1 + t2, noise)


def _subtract_identity(t: Tensor, c: float) -> Tensor:
    """``t - c I``, for a matrix or a diagonal."""
    if t.ndim == 2:
        return t - c
    out = t.clone()
    out.diagonal(dim1=-2, dim2=-1).sub_(c)
    return out


def _size(t: Tensor, noise: Tensor) -> Tensor:
    """A lower bound of the largest eigenvalue of a positive semidefinite matrix: at least its largest entry.  # (B,)"""
    if t.ndim == 2:
        return t.amax(-1)
    return torch.maximum(spectral_bound(t, noise), t.diagonal(dim1=-2, dim2=-1).amax(-1))


def _scaled(E: Tensor, s: Tensor) -> Tensor:
    return E * s.view(-1, *[1] * (E.ndim - 1))
