"""Functions of a large symmetric matrix times a vector, and its spectrum, by Lanczos' method.

Reference: Golub & Van Loan, Matrix Computations, chapter 10; Golub & Meurant, Matrices, Moments and Quadrature, 2010;
Ghorbani, Krishnan & Xiao, ICML 2019, arXiv:1901.10159, for spectral densities.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Krylov", "krylov"]


@dataclass(frozen=True)
class Krylov:
    """An orthonormal basis of ``span(v, C v, C^2 v, ...)``, and ``C`` in it, which is tridiagonal."""

    basis: Tensor  # (k, n)
    T: Tensor  # (k, k) in float64
    size: float  # |v|
    beyond: float  # the next off-diagonal entry; zero where the space is invariant

    @property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Ritz values, in rising order, and vectors in the basis as columns."""
        s, Q = torch.linalg.eigh(self.T)
        return s, Q

    def solve(self, damping: float, power: float, definite: bool) -> tuple[Tensor, float]:
        """``(C + damping I)^power v``, and for ``power = -1`` the relative residual, which is that of CG.  # (n,)"""
        s, Q = self.pairs
        damped = (s.clamp(min=0) if definite else s) + damping
        y = Q @ (damped**power * Q[0])
        residual = abs(self.beyond * float(y[-1])) if power == -1.0 else float("nan")
        found: Tensor = self.size * (y.to(self.basis) @ self.basis)
        return found, residual

    def density(self) -> tuple[Tensor, Tensor]:
        """Nodes and weights of the quadrature, the density of eigenvalues as ``v`` sees it.  # (k,), (k,)"""
        s, Q = self.pairs
        return s, Q[0].square()


def krylov(matvec: Callable[[Tensor], Tensor], v: Tensor, steps: int, done: Callable[[], None] | None = None) -> Krylov:
    """At most so many products; twice is orthogonalised against the whole basis.  # v: (n,)"""
    size, most = float(v.norm()), min(steps, len(v))
    basis = v.new_empty(most, len(v))
    basis[0] = v / max(size, torch.finfo(v.dtype).tiny)
    alpha: list[float] = []
    beta: list[float] = []
    tiny = 100 * torch.finfo(v.dtype).eps
    for k in range(most):
        w = matvec(basis[k]).to(v)
        if done is not None:
            done()
        alpha.append(float(w.double() @ basis[k].double()))
        for _ in range(2):
            w = w - (basis[: k + 1] @ w) @ basis[: k + 1]
        beta.append(float(w.double().norm()))
        if beta[-1] <= tiny * max(abs(a) for a in (*alpha, *beta)):
            beta[-1] = 0.0
            break
        if k + 1 < most:
            basis[k + 1] = w / beta[-1]
    k = len(alpha)
    T = torch.diag(torch.tensor(alpha, dtype=torch.float64))
    between = torch.tensor(beta[: k - 1], dtype=torch.float64)
    T = T + torch.diag(between, 1) + torch.diag(between, -1)
    return Krylov(basis[:k], T.to(v.device), size, beta[-1])
