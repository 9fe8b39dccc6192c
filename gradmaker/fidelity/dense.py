"""The measures by dense float64 matrices.

``C`` reference, ``Ĉ`` approximation, ``P`` preconditioner, ``p`` its power, ``g`` gradient, ``d = P g``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradmaker.fidelity.lanczos import krylov

__all__ = ["Decomposed", "best_scalar", "of_directions", "of_matrices", "of_spectrum", "quadratic_decrease", "spectral_norm"]


@dataclass
class Decomposed:
    """A symmetric matrix with its eigenvalues and eigenvectors, computed when they are needed."""

    C: Tensor  # (P, P)
    _pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _powers: dict[tuple[float, float], Tensor] = field(default_factory=dict)

    @property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues, in rising order, and eigenvectors as columns."""
        if not self._pairs:
            self._pairs.append(tuple(torch.linalg.eigh(self.C)))
        return self._pairs[0]

    def powered(self, damping: float, power: float, definite: bool = True) -> Tensor:
        """The spectrum of ``(C + damping I)^power``; of a definite matrix negative roundings are zero; NaN where undefined."""
        s = self.pairs[0].clamp(min=0) if definite else self.pairs[0]
        damped = s + damping
        return damped**power if float(damped.min()) > 0 or power == -1.0 else torch.full_like(s, torch.nan)

    def power(self, damping: float, power: float, definite: bool = True) -> Tensor:
        """``(C + damping I)^power``.  # (P, P)"""
        if (damping, power) not in self._powers:
            Q = self.pairs[1]
            self._powers = {(damping, power): (Q * self.powered(damping, power, definite)) @ Q.mT}
        return self._powers[damping, power]

    def solve(self, damping: float, power: float, g: Tensor, definite: bool = True) -> Tensor:
        """``(C + damping I)^power g``.  # (P,)"""
        Q = self.pairs[1]
        found: Tensor = Q @ (self.powered(damping, power, definite) * (Q.mT @ g))
        return found


def best_scalar(C: Tensor, approximation: Tensor) -> float:
    """``s`` with the least ``|s Ĉ - C|_F``; 1 for a zero matrix."""
    size = float(approximation.square().sum())
    return float((C * approximation).sum()) / size if size > 0 else 1.0


SMALL = 256
"""Side of matrices whose eigenvalues are all computed to know the largest: beyond it Lanczos' method is faster."""
CONVERGED = 1e-12
"""Relative change of the largest Ritz value at which it is taken."""


def spectral_norm(A: Tensor) -> float:
    """The largest absolute eigenvalue of a symmetric matrix."""
    if len(A) <= SMALL:
        return float(torch.linalg.eigvalsh(A).abs().max())
    steps, before = 32, 0.0
    start = torch.randn(len(A), dtype=A.dtype, device=A.device, generator=torch.Generator(A.device).manual_seed(0))
    while True:
        top = float(krylov(lambda v: A @ v, start, steps).pairs[0].abs().max())
        if top - before <= CONVERGED * top or steps >= len(A):
            return top
        before, steps = top, 2 * steps


def of_matrices(C: Tensor, approximation: Tensor, largest: float) -> dict[str, float]:
    """Relative errors in the Frobenius and the spectral norm, as it is and times the best scalar of the Frobenius norm.

    largest: the spectral norm of ``C``. There are none of a zero matrix.
    """
    size = float(C.norm())
    if size == 0:
        return {}
    s = best_scalar(C, approximation)
    scaled = s * approximation - C
    return {
        "error": float((approximation - C).norm()) / size,
        "error_scaled": float(scaled.norm()) / size,
        "scale": s,
        "spectral": spectral_norm(approximation - C) / largest,
        "spectral_scaled": spectral_norm(scaled) / largest,
    }


def of_spectrum(s: Tensor, damping: float) -> dict[str, float]:
    """Trace, effective rank, condition at this damping, and the largest eigenvalue.  # eigenvalues (n,)"""
    trace, squares = float(s.sum()), float(s.square().sum())
    top, low = float(s.max()) + damping, float(s.min()) + damping
    return {
        "trace": trace,
        "effective_rank": trace**2 / squares if squares > 0 else 0.0,
        "condition": top / low if low > 0 else float("inf"),
        "largest": float(s.max()),
    }


def of_directions(d: Tensor, exact: Tensor) -> dict[str, float]:
    """Cosine and relative length of two directions.  # (P,), (P,)"""
    sizes = float(d.norm()), float(exact.norm())
    if min(sizes) == 0:
        return {}
    return {"cosine": float(d @ exact) / (sizes[0] * sizes[1]), "length": sizes[0] / sizes[1]}


def quadratic_decrease(slope: float, curvature: float) -> tuple[float, float]:
    """``max_η η gᵀd - η² dᵀC d / 2`` and its ``η``; infinite where the model has no maximum.

    slope: ``gᵀd``; curvature: ``dᵀC d``
    """
    if curvature <= 0:
        return (0.0, 0.0) if slope == 0 else (float("inf"), 1.0)
    return slope**2 / (2 * curvature), slope / curvature
