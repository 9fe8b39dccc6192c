"""Inverse roots, also fractional ones, by a coupled iteration of higher order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, log

import torch
from torch import Tensor

from gradmaker.linalg.coupled_iteration import Iterate, converge
from gradmaker.linalg.eigen import symmetrise
from gradmaker.options.checks import check_interval
from gradmaker.solvers.matrix_root import IteratedRoot, MatrixRoot, fraction

__all__ = ["HigherOrder", "coupled_series"]


@lru_cache(maxsize=64)
def _coefficients(p: int, degree: int) -> tuple[float, ...]:
    """``b_0, b_1, ...`` of ``(1 - e)^(-1/p)``: ``b_j = b_(j-1) (1 + (j - 1) p) / (j p)``."""
    b = [1.0]
    for j in range(1, degree):
        b.append(b[-1] * (1 + (j - 1) * p) / (j * p))
    return tuple(b)


def coupled_series(A: Tensor, p: int, degree: int, iterations: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """``A^(-1/p)``: ``T = sum_(j < degree) b_j (I - M)^j``, ``X <- X T``, ``M <- T^p M`` from ``M = A / tr A``; and the steps.

    The first step is Newton's, ``degree = 2``, with which every eigenvalue of ``M`` stays in ``(0, 1]``.

    Reference: Lakić, ZAMM 1998, 78(3); as in Meta's Distributed Shampoo, Shi et al. 2023, arXiv:2309.06497.
    """  # (B, d, d), (B,)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    z = 1 / A.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]

    def step(k: int, now: Iterate) -> Iterate:
        X, M = now
        *rest, last = _coefficients(p, degree if k else 2)
        T = last * eye
        for b in reversed(rest):  # Horner
            T = T @ (eye - M) + b * eye
        return symmetrise(X @ T), symmetrise(torch.linalg.matrix_power(T, p) @ M)

    (X, _), count = converge(step, (torch.pow(z, 1 / p) * eye, z * A), iterations, tolerance)
    return X, count


@dataclass(frozen=True)
class _CoupledSeries(IteratedRoot):
    degree: int
    iterations: int
    tolerance: float

    def root(self, A: Tensor) -> tuple[Tensor, Tensor]:
        return coupled_series(A, self.p, self.degree, self.iterations, self.tolerance)


@dataclass(frozen=True, kw_only=True)
class HigherOrder(MatrixRoot):
    """``C^power`` from ``(F_k + damping lambda_max(F_k) I)^(-1/p)`` of every factor, ``p = order / |power| = a / b``.

    The iteration gives the root ``a``, which is raised to ``b``: a residual ``e`` becomes about ``b e``. ``degree`` is the
    number of terms of the series, and the order of the iteration. Scaling and failures as in `MatrixRoot`.

    Reference: Shi et al. 2023, arXiv:2309.06497 (Distributed Shampoo, its higher-order coupled iteration).
    """

    degree: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_interval("degree", self.degree, 2, 17, closed=True)

    def root_and_power(self, order: float) -> tuple[int, int]:
        p = fraction(self.power, order)
        return p.numerator, p.denominator

    def method(self, p: int, d: int) -> IteratedRoot:
        return _CoupledSeries(p, self.degree, self._limit(p, d), self.tolerance)

    def _limit(self, p: int, d: int) -> int:
        """Most iterations, as for `NewtonRoot`: ``lambda_min`` grows by ``(sum_j b_j)^p`` a step from ``damping / d``."""
        if self.least(d) == 0:
            return self.iterations
        growth = log(d * (1 + 1 / self.least(d))) / (p * log(sum(_coefficients(p, self.degree))))
        return min(self.iterations, 1 + max(0, ceil(growth)) + 4 + 8)
