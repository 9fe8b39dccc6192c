"""Inverse p-th roots by the coupled Newton iteration: products only, as GPUs like it."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf, log, sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradmaker.representations.base import Factored, State
from gradmaker.solvers.base import Solver, kronecker_power
from gradmaker.solvers.damping import average_trace, check_interval
from gradmaker.solvers.ladder import Parts, climb, scalars
from gradmaker.solvers.roots import InverseRoot, apply_roots, integer_root, settle_roots, verify
from gradmaker.solvers.spectrum import add_ridge, largest_eigenvalue, symmetrise

__all__ = ["NewtonRoot", "coupled_newton"]


def coupled_newton(A: Tensor, p: int, iterations: int, tolerance: float) -> Tensor:
    """``A^(-1/p)``: ``T = ((p + 1) I - M) / p``, ``X <- X T``, ``M <- T^p M`` from ``M = z A``, ``X = z^(1/p) I``.

    ``X^p A = M -> I``. A member is frozen once ``max|M - I| <= tolerance``, when the error grows by a fifth, or when it stalls.

    Reference: Guo, Higham, SIAM J. Matrix Anal. 2006, 28(3), eq. 3.6; Anil et al. 2020, arXiv:2002.09018, algorithm 2 and
    appendix D (``z``, stopping).  # (B, d, d)
    """
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    z = (1 + p) / (2 * torch.linalg.matrix_norm(A))[:, None, None]
    X, M = torch.pow(z, 1 / p) * eye, z * A
    # The first step may raise the largest entry by any factor (5/8 to 0.9 for a uniform vector of rank one); from then on
    # M <= I, whose largest deviation lies on the diagonal and falls.
    error = A.new_full(A.shape[:1], inf)
    active = error > tolerance
    for _ in range(iterations):
        if A.device.type == "cpu" and not bool(active.any()):  # elsewhere the test would wait for the device
            break
        T = (1 + 1 / p) * eye - M / p
        X_new, M_new = symmetrise(X @ T), symmetrise(torch.linalg.matrix_power(T, p) @ M)
        error_new = (M_new - eye).abs().amax((-2, -1))
        # Rises below a fifth are normal far from the solution; near it a rise is roundoff.
        active = active & ((error_new < error) | ((error > 1e-3) & (error_new <= 1.2 * error)))
        keep = active[:, None, None]
        X, M, error = torch.where(keep, X_new, X), torch.where(keep, M_new, M), torch.where(active, error_new, error)
        active = active & (error > tolerance)
    return X


@dataclass(frozen=True)
class _CoupledNewton(InverseRoot):
    iterations: int
    tolerance: float

    rungs = 5

    def matrix(self, A: Tensor, ridge: Tensor) -> tuple[Parts, Tensor]:
        damped = add_ridge(A, ridge)
        X = coupled_newton(damped, self.p, self.iterations, self.tolerance)
        positive = torch.linalg.cholesky_ex(damped)[1] == 0  # a negative direction among many would not show in the residual
        return (X,), positive & verify(damped, X, self.p)


@dataclass(frozen=True, kw_only=True)
class NewtonRoot(Solver):
    """``C^power`` from ``(F_k + damping lambda_max(F_k) I)^(-1/p)`` of every factor, ``p = order / |power|`` a whole number.

    Factors are divided by their average trace first and roots scaled back, so that no scale under- or overflows. A block that
    fails before it ever succeeded keeps its gradient: relative damping leaves no scale for it.

    Reference: Anil, Gupta, Koren, Regan, Singer 2020, arXiv:2002.09018, algorithm 1 and appendix D.
    """

    needs: ClassVar[type] = Factored
    definite: ClassVar[bool] = True

    power: float = -0.5
    damping: float = 1e-6
    iterations: int = 100
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        check_interval("power", self.power, -inf, 0)
        check_interval("damping", self.damping, 0, inf, closed=True)
        check_interval("iterations", self.iterations, 1, inf, closed=True)
        check_interval("tolerance", self.tolerance, 0, 1e-4)

    @property
    def exponent(self) -> float:
        return self.power

    def refuse(self, representation: Any) -> str | None:
        try:
            integer_root(self.power, representation.order(1))
        except ValueError as error:
            return f"NewtonRoot with {error}"
        return None

    def prepare(self, representation: Any, state: State, previous: State | None) -> State:
        factors = scalars(representation.factors(state))
        p = integer_root(self.power, representation.order(len(factors)))
        traces = [average_trace(F) for F in factors]
        scales = [torch.where(t > 0, t, 1.0) for t in traces]
        normal = [F / s.view(-1, *[1] * (F.ndim - 1)) for F, s in zip(factors, scales, strict=True)]
        ridges = [self.damping * (F.amax(-1) if F.ndim == 2 else largest_eigenvalue(F)) for F in normal]
        method = _CoupledNewton(p, self._limit(p, max(F.shape[-1] for F in factors)), self.tolerance)
        results, lost = climb(method, normal, ridges)
        roots = [X * s.view(-1, *[1] * (X.ndim - 1)) ** (-1 / p) for (X,), s in zip(results, scales, strict=True)]
        return settle_roots(roots, lost, previous, 1.0)

    def operator(self, representation: Any, state: State) -> Tensor:
        factors = representation.factors(state)
        ridges = [self.damping * (F if F.ndim == 2 else torch.linalg.eigvalsh(F)).amax(-1) for F in factors]
        return representation.widen(state, kronecker_power(factors, ridges, self.power / representation.order(len(factors))))

    def _limit(self, p: int, d: int) -> int:
        """The number of iterations that the ridge allows to be needed: a device without early exit must not run them all.

        The smallest eigenvalue grows by ``(1 + 1/p)^p`` a step from ``z lambda_min >= (1 + p) damping / (2 sqrt(d))``; then
        come four quadratic steps (methods_kronecker.md, S2). Eight more are slack for a ridge that rounding has eaten into.
        """
        if self.damping == 0:
            return self.iterations
        growth = log(2 * sqrt(d) * (1 + 1 / self.damping) / (1 + p)) / (p * log(1 + 1 / p))
        return min(self.iterations, max(0, ceil(growth)) + 4 + 8)

    def solve(self, representation: Any, cache: State, g: Tensor) -> Tensor:
        return apply_roots(representation, cache, g)
