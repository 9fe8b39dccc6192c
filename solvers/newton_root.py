"""Inverse p-th roots by the coupled Newton iteration: matrix products only."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log, sqrt

import torch
from torch import Tensor

from gradmaker.linalg.coupled_iteration import Iterate, converge
from gradmaker.linalg.eigen import symmetrise
from gradmaker.linalg.roots import integer_root
from gradmaker.solvers.matrix_root import IteratedRoot, MatrixRoot

__all__ = ["NewtonRoot", "iterate_newton"]


def iterate_newton(A: Tensor, p: int, iterations: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """``A^(-1/p)`` and the number of steps: ``T = ((p + 1) I - M) / p``, ``X <- X T``, ``M <- T^p M``.

    From ``M = z A`` and ``X = z^(1/p) I``; ``X^p A = M -> I``. `converge` has the stopping rule.

    Reference: Guo, Higham, SIAM J. Matrix Anal. 2006, 28(3), eq. 3.6; Anil et al. 2020, arXiv:2002.09018, algorithm 2 and
    appendix D (``z``, stopping).  # (B, d, d), (B,)
    """
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    z = (1 + p) / (2 * torch.linalg.matrix_norm(A))[:, None, None]

    def step(k: int, now: Iterate) -> Iterate:
        X, M = now
        T = (1 + 1 / p) * eye - M / p
        return symmetrise(X @ T), symmetrise(torch.linalg.matrix_power(T, p) @ M)

    (X, _), count = converge(step, (torch.pow(z, 1 / p) * eye, z * A), iterations, tolerance)
    return X, count


@dataclass(frozen=True)
class _CoupledNewton(IteratedRoot):
    iterations: int
    tolerance: float

    def root(self, A: Tensor) -> tuple[Tensor, Tensor]:
        return iterate_newton(A, self.p, self.iterations, self.tolerance)


@dataclass(frozen=True, kw_only=True)
class NewtonRoot(MatrixRoot):
    """``C^power`` from ``(F_k + damping lambda_max(F_k) I)^(-1/p)`` of every factor, ``p = order / |power|`` a whole number.

    Scaling and failures as in `MatrixRoot`.

    Reference: Anil, Gupta, Koren, Regan, Singer 2020, arXiv:2002.09018, algorithm 1 and appendix D.
    """

    def root_and_power(self, order: float) -> tuple[int, int]:
        return integer_root(self.power, order), 1

    def method(self, p: int, d: int) -> IteratedRoot:
        return _CoupledNewton(p, self._limit(p, d), self.tolerance)

    def _limit(self, p: int, d: int) -> int:
        """Bound on the number of iterations by the ridge, for devices on which the loop has no early exit.

        The smallest eigenvalue grows by ``(1 + 1/p)^p`` a step from ``z lambda_min >= (1 + p) damping / (2 sqrt(d))``;
        four quadratic steps follow. Eight more allow for a ridge that rounding has reduced.
        """
        if self.least(d) == 0:
            return self.iterations
        growth = log(2 * sqrt(d) * (1 + 1 / self.least(d)) / (1 + p)) / (p * log(1 + 1 / p))
        return min(self.iterations, max(0, ceil(growth)) + 4 + 8)
