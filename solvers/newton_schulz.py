"""Inverse 2nd, 4th, 8th, ... roots by the coupled Newton-Schulz iteration: matrix products only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, log, sqrt
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from gradmaker.linalg.coupled_iteration import Iterate, compose, converge
from gradmaker.linalg.eigen import symmetrise
from gradmaker.options.checks import check_choice
from gradmaker.solvers.matrix_root import IteratedRoot, MatrixRoot, fraction
from gradmaker.solvers.polar_factor import Quintic, polar_express

__all__ = ["NewtonSchulz", "Polynomial", "binary_root", "coupled_square_root"]

Polynomial: TypeAlias = Literal["cubic", "quintic", "polar_express"]
CUBIC: Quintic = (3 / 2, -1 / 2, 0.0)
QUINTIC: Quintic = (15 / 8, -10 / 8, 3 / 8)
NEAR = 0.9
"""Singular values from which three plain quintic steps suffice: a step maps the error ``e`` to ``5/2 e^3``."""


@lru_cache(maxsize=64)
def _first_quintics(lowest: float) -> tuple[Quintic, ...]:
    """Minimax quintics that map ``[lowest, 1]`` above `NEAR`."""
    quintics: tuple[Quintic, ...] = ()
    x = lowest
    while x < NEAR and len(quintics) < 40:
        quintics, x = polar_express(lowest, len(quintics) + 1), lowest
        for a, b, c in quintics:
            x = x * (a + x * x * (b + x * x * c))
    return quintics


def coupled_square_root(
    A: Tensor, polynomial: Polynomial, iterations: int, tolerance: float, lowest: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``A^(1/2)``, ``A^(-1/2)``: ``T = a I + b P + c P^2``, ``Y <- Y T``, ``Z <- T Z``, ``P = Z Y``; and the steps taken.

    From ``Y = A / |A|_F``, ``Z = I``. An eigenvalue ``x^2`` of ``P`` becomes ``(a x + b x^3 + c x^5)^2``. ``polar_express``
    takes steps made for ``x >= lowest``, then the plain quintic.

    Reference: Higham, Functions of Matrices, SIAM 2008, eq. 6.35; Amsel et al. 2025, arXiv:2505.16932 (coefficients).
    """  # (B, d, d), (B, d, d), (B,)
    first = _first_quintics(lowest) if polynomial == "polar_express" else ()
    rest = CUBIC if polynomial == "cubic" else QUINTIC
    norm = torch.linalg.matrix_norm(A)[:, None, None]
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)

    def step(k: int, now: Iterate) -> Iterate:
        Y, Z, P = now
        a, b, c = first[k] if k < len(first) else rest
        T = a * eye + b * P + (c * (P @ P) if c else 0.0)
        Y, Z = symmetrise(Y @ T), symmetrise(T @ Z)
        return Y, Z, Z @ Y

    Y = A / norm
    (Y, Z, _), count = converge(step, (Y, eye.expand_as(A), Y), len(first) + iterations, tolerance, len(first))
    return Y * norm.sqrt(), Z / norm.sqrt(), count


@dataclass(frozen=True)
class _CoupledSquareRoot(IteratedRoot):
    polynomial: Polynomial
    iterations: int
    tolerance: float
    share: float  # lower bound of lambda_min / lambda_max by the ridge; 0: unknown

    def root(self, A: Tensor) -> tuple[Tensor, Tensor]:
        known = max(self.share, torch.finfo(A.dtype).eps)

        def half(A: Tensor, stage: int) -> tuple[Tensor, Tensor, Tensor]:
            lowest = sqrt(known ** (1 / 2**stage) / sqrt(A.shape[-1]))  # of |A|_F
            return coupled_square_root(A, self.polynomial, self._limit(lowest), self.tolerance, lowest)

        return compose(half, A, self.p)

    def _limit(self, lowest: float) -> int:
        if self.share == 0:
            return self.iterations
        slope = 1.5 if self.polynomial == "cubic" else 15 / 8
        growth = log(1 / lowest) / log(slope) if self.polynomial != "polar_express" else 0
        return min(self.iterations, ceil(growth) + 4 + 8)


def binary_root(power: float, order: float) -> tuple[int, int]:
    """``a, b`` of ``p = order / |power| = a / b`` with ``a = 2, 4, 8, ...``. ValueError where there are none."""
    p = fraction(power, order)
    a, b = (p.numerator, p.denominator) if p.numerator > 1 else (2, 2 * p.denominator)
    if a & (a - 1):
        raise ValueError(
            f"power={power!r} needs the inverse root p = {order / abs(power):g} of a factor: expected 2, 4, 8, ... over a "
            "whole number; use HigherOrder or Eigh"
        )
    return a, b


@dataclass(frozen=True, kw_only=True)
class NewtonSchulz(MatrixRoot):
    """``C^power`` from ``(F_k + damping lambda_max(F_k) I)^(-1/p)`` of every factor, ``p = 2^k / b`` with whole ``k, b``.

    Fourth and higher roots are square roots of square roots. Scaling and failures as in `MatrixRoot`.

    Reference: Higham 2008, Functions of Matrices, section 6.7; Amsel et al. 2025, arXiv:2505.16932 (``polar_express``).
    """

    polynomial: Polynomial = "polar_express"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("polynomial", self.polynomial, ("cubic", "quintic", "polar_express"))

    def root_and_power(self, order: float) -> tuple[int, int]:
        return binary_root(self.power, order)

    def method(self, p: int, d: int) -> IteratedRoot:
        least = self.least(d)
        share = least / (1 + least)
        return _CoupledSquareRoot(p, self.polynomial, self.iterations, self.tolerance, share)
