"""Inverse roots of factors, held as matrices, ``X = (A + ridge I)^(-1/p)``: residual, cache, application."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradmaker.linalg.diagnosis import unknown
from gradmaker.linalg.eigen import add_ridge, decompose, is_definite
from gradmaker.linalg.factored_gradient import FactoredGradient, transform_rows
from gradmaker.linalg.factors import identity
from gradmaker.linalg.fallbacks import Factorisation, Parts, keep_previous
from gradmaker.linalg.mode_products import apply_factors
from gradmaker.linalg.state import State

__all__ = ["InverseRoot", "apply_roots", "apply_roots_to_rows", "held_roots", "integer_root", "keep_roots", "residual"]


def integer_root(power: float, order: float) -> int:
    """``p = order / |power|``: the power ``-1/p`` of each factor gives ``C^power``. ValueError if it is not whole."""
    p = order / abs(power)
    if round(p) < 1 or abs(p - round(p)) > 1e-9:
        raise ValueError(f"power={power!r} needs the inverse root p = {p:g} of a factor: expected a whole p; use Eigh")
    return round(p)


def residual(A: Tensor, X: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """``max|X^h A X^(p-h) - I|``, ``h = floor(p / 2)``, and its tolerance ``50 u kappa``, within 1e-5 (float32: 6e-4) and 0.45.

    It equals ``A X^p - I``, since ``X`` commutes with ``A``. The coupled iterate of Newton's method is no substitute: it shows
    2e-7 where the root has an error of 3e-3. The power is split in halves so that rounding does not dominate: in float32, for
    a rank-deficient ``A`` with the customary ridge of 1e-6 ``lambda_max``, the residual is 0.03-0.1 (p = 1: 0.1-0.35) for a
    root with an error of 0.002-0.07, and that of ``A X^p`` up to 1.0. A root that is wrong by a factor of two gives 0.5 or
    more. A single wrong direction changes entries by about ``1/d`` only, so the caller also checks that ``A`` is positive.
    """  # (B, d, d), (B, d, d) -> (B,), (B,)
    u = torch.finfo(A.dtype).eps / 2
    right = torch.linalg.matrix_power(X, p - p // 2)
    product, kappa = A @ right, _norm(A) * _norm(right)
    if p > 1:
        left = torch.linalg.matrix_power(X, p // 2)
        product, kappa = left @ product, kappa * _norm(left)
    product.diagonal(dim1=-2, dim2=-1).sub_(1)
    return product.abs_().amax((-2, -1)), (50 * u * kappa).clamp(max(1e-5, 1e4 * u), 0.45)


def _norm(A: Tensor) -> Tensor:
    """The infinity norm.  # (B,)"""
    return A.abs().sum(-1).amax(-1)


@dataclass(frozen=True)
class InverseRoot(Factorisation):
    """Inverse root ``(A + ridge I)^(-1/p)``; parts are one tensor, (B, d, d) or (B, d).

    If ``described``, a second part (B, 3) holds iterations, residual and ridge of the attempt.
    """

    p: int
    described: ClassVar[bool] = False

    @property
    def summaries(self) -> int:
        return int(self.described)

    def parts(self, X: Tensor, iterations: Tensor | float, found: Tensor, ridge: Tensor) -> Parts:
        """The parts of an attempt.  # residual (B,), ridge (B,)"""
        return (X, torch.stack([torch.zeros_like(ridge) + iterations, found, ridge], -1)) if self.described else (X,)

    def diagonal(self, a: Tensor, ridge: Tensor) -> tuple[Parts, Tensor]:
        damped = a.clamp(min=0) + ridge.unsqueeze(-1)
        x = damped ** (-1 / self.p)
        found = (damped * x**self.p - 1).abs().amax(-1)
        return self.parts(x, 0, found, ridge), is_definite(a) & torch.isfinite(x).all(-1)

    def last_resort(self, A: Tensor, ridge: Tensor) -> tuple[Parts, Tensor]:
        s, Q, ok = decompose(A)
        X = (Q * ((s.clamp(min=0) + ridge.unsqueeze(-1)) ** (-1 / self.p)).unsqueeze(-2)) @ Q.mT
        found, tolerance = residual(add_ridge(A, ridge), X, self.p)
        return self.parts(X, 0, found, ridge), ok & (s.amin(-1) + ridge > 0) & (found <= tolerance)


def keep_roots(
    roots: Sequence[Tensor],
    failed: Tensor,
    previous: State | None,
    gain: float,
    diagnosis: Tensor | None = None,
    empty: Tensor | None = None,
) -> State:
    """A cache with one root for each factor. A failed member without a previous one gets ``P = gain I``.

    empty: as in `keep_previous`
    """
    new = {f"root_{k}": X for k, X in enumerate(roots)}
    share = gain ** (1 / len(roots))
    default = {name: share * identity(X) for name, X in new.items()}
    if diagnosis is not None:
        new["diagnosis"], default["diagnosis"] = diagnosis, unknown(diagnosis)
    return keep_previous(new, failed, previous, default, empty)


def held_roots(cache: State) -> list[Tensor]:
    """The roots in a cache, one for each factor.  # each (B, d, d) or (B, d)"""
    return [cache[f"root_{k}"] for k in range(sum(name.startswith("root_") for name in cache))]


def apply_roots_to_rows(cache: State, rows: FactoredGradient) -> FactoredGradient:
    """`apply_roots` of a matrix: the first root on the gradients of the outputs, the second, if there is one, on the inputs."""
    return transform_rows(held_roots(cache), rows)


def apply_roots(cache: State, g: Tensor) -> Tensor:
    """``g x_1 X_1 x_2 X_2 ...`` with the roots in a cache.  # (B, d_1, ..., d_m)"""
    return apply_factors(held_roots(cache), g)
