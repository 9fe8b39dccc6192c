"""Inverse roots of factors ``F = R^T R`` from the SVD of ``R``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from gradmaker.linalg.damping import Mode, damp, ridge_unit
from gradmaker.linalg.diagnosis import described, diagnose, singular_residual
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.fallbacks import Factorisation, Parts, factorise, is_empty
from gradmaker.linalg.powers import axis_power
from gradmaker.linalg.roots import apply_roots, apply_roots_to_rows, keep_roots
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_choice
from gradmaker.representations.capabilities import RootFactored
from gradmaker.solvers.definition import DefinedByAxes
from gradmaker.solvers.factor_solver import FactorSolver
from gradmaker.solvers.roles import AppliesRows

__all__ = ["SvdRoot"]


class _SingularValues(Factorisation):
    """Parts ``(s, V)`` of ``R = U diag(s) V^T``, or ``(s,)`` for a diagonal. The spectrum is damped afterwards."""

    larger_ridges = 0
    symmetric = False

    def matrix(self, A: Tensor, ridge: Tensor) -> tuple[Parts, Tensor]:
        s, V = _decompose(A)
        tolerance = 1e4 * torch.finfo(A.dtype).eps
        eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        AV = A @ V
        skew = (V.mT @ V - eye).abs().amax((-2, -1))
        lengths = (torch.linalg.vector_norm(AV, dim=-2) - s).abs().amax(-1)
        mixed = (AV.mT @ AV - torch.diag_embed(s.square())).abs().amax((-2, -1))  # U^T U = I without U
        top = s.amax(-1)
        return (s, V), (skew <= tolerance) & (lengths <= tolerance * top) & (mixed <= tolerance * top.square())

    def diagonal(self, a: Tensor, ridge: Tensor) -> tuple[Parts, Tensor]:
        return (a.abs(),), torch.isfinite(a).all(-1)

    last_resort = matrix


def _decompose(R: Tensor) -> tuple[Tensor, Tensor]:
    """``s``, ``V``; NaN for a member whose SVD does not converge.  # (B, d), (B, d, d)"""
    try:
        _, s, Vh = torch.linalg.svd(R)
    except RuntimeError:  # one member that does not converge fails the call for all
        s, Vh = torch.full_like(R[..., 0], torch.nan), torch.full_like(R, torch.nan)
        for b in range(len(R)):
            try:
                _, s[b], Vh[b] = torch.linalg.svd(R[b])
            except RuntimeError:
                continue
    return s, Vh.mT


@dataclass(frozen=True, kw_only=True)
class SvdRoot(FactorSolver[RootFactored], DefinedByAxes[RootFactored], AppliesRows[RootFactored]):
    """``C^power`` from ``V (S^2 + damping s_max^2)^(power/order) V^T`` of every ``R_k = U S V^T``, where ``F_k = R_k^T R_k``.

    Singular values have an error of ``u s_max``, so that eigenvalues ``s^2`` are accurate to ``u^2 lambda_max``; the damping
    can be that small (1e-10 in float32). Roots are divided by their norm first. ``mode`` damps in other units, see
    `gradmaker.linalg.damping`. A block whose refreshes have all failed keeps its gradient; with absolute damping it gets
    ``damping^power g``, the result for zero curvature.

    Reference: Golub & Van Loan, Matrix Computations, section 8.6; Anil et al. 2020, arXiv:2002.09018 (the ridge).
    """

    power: float = -0.5
    damping: float = 1e-6
    mode: Mode = "largest"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("mode", self.mode, get_args(Mode))

    def prepare(self, representation: RootFactored, state: State, previous: State | None) -> State:
        roots = representation.factor_roots(state)
        return self.prepare_factors(roots, representation.order(len(roots)), previous)

    def prepare_factors(self, held: Sequence[Tensor], order: float, previous: State | None) -> State:
        held = [R.reshape(-1, 1) if R.shape[1:] == (1, 1) else R for R in held]
        norms = [R.flatten(1).abs().amax(1) for R in held]
        scales = [torch.where(n > 0, n, 1.0) for n in norms]
        normal = [R / s.view(-1, *[1] * (R.ndim - 1)) for R, s in zip(held, scales, strict=True)]
        results, failed, retries = factorise(_SingularValues(), normal, [R.new_zeros(R.shape[:1]) for R in normal])
        spectra = [parts[0].square() for parts in results]
        squares = [s.square() for s in scales]
        absolute = self.mode == "absolute"
        dampings = [self.damping / (s if absolute else torch.ones_like(s)) for s in squares]  # (B,)
        damped = [damp(s, e.unsqueeze(-1), self.mode) for s, e in zip(spectra, dampings, strict=True)]
        ridges = [e * ridge_unit(self.mode, s.amax(-1), s.mean(-1)) for s, e in zip(spectra, dampings, strict=True)]
        exponent = self.power / order
        roots = [_root(*each, exponent) for each in zip(results, damped, scales, strict=True)]
        for X in roots:  # a singular matrix without damping overflows
            failed = failed | ~torch.isfinite(X).flatten(1).all(1)
        found = [singular_residual(*each) for each in zip(normal, results, damped, strict=True)]
        diagnosis = diagnose(described(found, ridges), [s.amax(-1) for s in spectra], retries, squares)
        gain = self.damping**self.power if absolute and self.damping else 1.0
        return keep_roots(roots, failed, previous, gain, diagnosis, is_empty(held))

    def axes(self, representation: RootFactored, state: State) -> list[Tensor]:
        factors = representation.factors(state)
        exponent = self.power / representation.order(len(factors))
        return [axis_power(F, self.damping, exponent, self.mode) for F in factors]

    def solve(self, representation: RootFactored, cache: State, g: Tensor) -> Tensor:
        return apply_roots(cache, representation.unfold(g)).reshape(g.shape)

    def solve_rows(self, representation: RootFactored, cache: State, rows: FactoredGradient) -> FactoredGradient:
        return apply_roots_to_rows(cache, rows)


def _root(parts: Parts, damped: Tensor, scale: Tensor, exponent: float) -> Tensor:
    """``V diag(damped scale^2)^exponent V^T``, or the diagonal.  # (B, d, d) or (B, d)"""
    powered = damped**exponent * (scale ** (2 * exponent)).unsqueeze(-1)
    return (parts[1] * powered.unsqueeze(-2)) @ parts[1].mT if len(parts) == 2 else powered
