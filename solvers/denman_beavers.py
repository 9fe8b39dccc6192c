"""Inverse 2nd, 4th, 8th, ... roots by the Denman-Beavers iteration: one inverse a step, smallest error of the iterations."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2, sqrt

import torch
from torch import Tensor

from gradmaker.linalg.coupled_iteration import Iterate, compose, converge
from gradmaker.linalg.eigen import symmetrise
from gradmaker.solvers.matrix_root import IteratedRoot, MatrixRoot
from gradmaker.solvers.newton_schulz import binary_root

__all__ = ["DenmanBeavers", "denman_beavers"]


def denman_beavers(A: Tensor, iterations: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """``A^(1/2)``, ``A^(-1/2)`` and the number of steps.

    ``X <- X (I + M^-1) / 2``, ``Y <- Y (I + M^-1) / 2``, ``M <- (I + (M + M^-1) / 2) / 2`` from ``M = X = A / s``, ``Y = I``,
    with ``s`` the average trace.

    Reference: Cheng, Higham, Kenney, Laub, SIAM J. Matrix Anal. 2001, 22(4), eq. 3.5 (the product form).
    """  # (B, d, d), (B, d, d), (B,)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    scale = A.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]

    def step(k: int, now: Iterate) -> Iterate:
        X, Y, M = now
        inverse = symmetrise(torch.linalg.inv_ex(M)[0])  # `inv` would wait for the device
        T = (eye + inverse) / 2
        return symmetrise(X @ T), symmetrise(Y @ T), (eye + (M + inverse) / 2) / 2

    M = A / scale
    # The first step may raise the error: the smallest eigenvalue of M becomes the largest, a quarter of its inverse.
    (X, Y, _), count = converge(step, (M, eye.expand_as(A), M), iterations, tolerance)
    return X * scale.sqrt(), Y / scale.sqrt(), count


@dataclass(frozen=True)
class _DenmanBeavers(IteratedRoot):
    iterations: int
    tolerance: float

    def root(self, A: Tensor) -> tuple[Tensor, Tensor]:
        return compose(lambda A, stage: denman_beavers(A, self.iterations, self.tolerance), A, self.p)


@dataclass(frozen=True, kw_only=True)
class DenmanBeavers(MatrixRoot):
    """``C^power`` from ``(F_k + damping lambda_max(F_k) I)^(-1/p)`` of every factor, ``p = 2^k / b`` with whole ``k, b``.

    Fourth and higher roots are square roots of square roots. Scaling and failures as in `MatrixRoot`.

    Reference: Denman, Beavers, Applied Math. and Computation 1976, 2(1); Higham 2008, Functions of Matrices, eq. 6.29.
    """

    def root_and_power(self, order: float) -> tuple[int, int]:
        return binary_root(self.power, order)

    def method(self, p: int, d: int) -> IteratedRoot:
        return _DenmanBeavers(p, self._limit(d), self.tolerance)

    def _limit(self, d: int) -> int:
        """Bound on the number of iterations: eigenvalues of ``M`` start below ``d (1 + 1 / damping)`` and fall by 4 a step."""
        if self.least(d) == 0:
            return self.iterations
        return min(self.iterations, ceil(log2(sqrt(d * (1 + 1 / self.least(d))))) + 4 + 8)
