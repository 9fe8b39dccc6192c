"""Diagnosis of a refresh: iterations, residuals, ridges of every factor, in one tensor of the cache, without a host read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradmaker.linalg.factors import widest
from gradmaker.linalg.fallbacks import Parts
from gradmaker.linalg.probes import probes

__all__ = [
    "COLUMNS",
    "described",
    "diagnose",
    "estimate_largest",
    "renew_row",
    "singular_residual",
    "spectral_residual",
    "unknown",
]

COLUMNS = ("iterations", "residual", "lambda_max", "damping", "retries")
"""Columns of ``cache["diagnosis"]`` (B, m, 5), one row for each factor: iterations of the accepted attempt (0: direct);
residual of ``A X^p - I`` with the damped ``A``; largest eigenvalue; ridge that was added, in units of the statistic; number of
fallbacks tried. A member that failed keeps its earlier root and row. For a tracked eigenbasis, the residual is the off-diagonal
part in the old basis, and a positive number of iterations means a new basis."""


def diagnose(
    infos: Sequence[Tensor], largest: Sequence[Tensor], retries: Tensor, scales: Sequence[Tensor] | None = None
) -> Tensor:
    """The rows of `COLUMNS`.  # (B, m, 5)

    infos: iterations, residual, ridge for each factor, each (B, 3); largest: each (B,); retries: (m, B)
    scales: divisors of the factors before the factorisation, each (B,)
    """
    (iterations, residual, ridge), top = torch.stack(list(infos), 1).unbind(-1), torch.stack(list(largest), 1)  # (B, m) each
    if scales is not None:
        unit = torch.stack(list(scales), 1)
        top, ridge = top * unit, ridge * unit
    return torch.stack([iterations, residual, top, ridge, retries.mT.to(top.dtype)], -1)


def described(residuals: Sequence[Tensor], ridges: Sequence[Tensor]) -> list[Tensor]:
    """Iterations, residual, ridge of a direct method.  # each (B,) -> each (B, 3)"""
    return [torch.stack([torch.zeros_like(e), e, r.to(e.dtype)], -1) for e, r in zip(residuals, ridges, strict=True)]


def renew_row(
    table: Tensor,
    factor: int,
    kept: Tensor,
    residual: Tensor,
    largest: Tensor,
    ridge: float = 0.0,
    iterations: Tensor | float = 0.0,
    retries: Tensor | float = 0.0,
) -> None:
    """Write a factor's row of a statistic's table in place, except for members that keep their row.

    table: (B, m, 5); kept: (B,); all else: (B,), or one number for all
    """
    row = torch.stack([torch.zeros_like(residual) + x for x in (iterations, residual, largest, ridge, retries)], -1)
    table[:, factor] = torch.where(kept[:, None], table[:, factor], row)


def unknown(diagnosis: Tensor) -> Tensor:
    """The row of a member whose factorisation never succeeded: the residual is infinite.  # (5,)"""
    row = torch.zeros(len(COLUMNS), dtype=diagnosis.dtype, device=diagnosis.device)
    row[COLUMNS.index("residual")] = torch.inf
    return row


def spectral_residual(F: Tensor, parts: Parts, damped: Tensor | None) -> Tensor:
    """``max|E v|`` over the vectors of `probes`, ``E = W^T (F + Q (damped - S) Q^T) W - I``, ``W = Q damped^(-1/2)``.  # (B,)

    The residual of ``A X^p`` for real ``p``; it is about as large as the largest entry of ``E`` or larger.
    If ``damped`` is None, as no factor has a root of its own: ``E = (Q^T F Q - S) / max S``.
    """
    return F.new_zeros(F.shape[:1]) if len(parts) == 1 else widest(_error, F, *parts, damped)


def _error(F: Tensor, s: Tensor, Q: Tensor, damped: Tensor | None) -> Tensor:
    """`spectral_residual` of square matrices."""
    V = probes(F)
    if damped is None:
        error = (V @ Q.mT @ F @ Q - V * s.unsqueeze(-2)).abs().amax((-2, -1))
        return (error / s.amax(-1)).nan_to_num(0.0)
    taken, w = torch.isfinite(damped).unsqueeze(-2), damped.rsqrt().unsqueeze(-2)  # infinite where a pseudo-inverse drops one
    x = (V * w) @ Q.mT
    found = (x @ F @ Q + torch.where(taken, (damped - s).unsqueeze(-2), 0.0) * (x @ Q)) * w
    return (found - V * taken).abs().amax((-2, -1))


def singular_residual(R: Tensor, parts: Parts, damped: Tensor) -> Tensor:
    """`spectral_residual` with ``F = R^T R``, without forming it: parts are the singular values and ``V``.  # (B,)"""
    if len(parts) == 1:
        return R.new_zeros(R.shape[:1])
    s, Q = parts
    V = probes(Q)
    taken, w = torch.isfinite(damped).unsqueeze(-2), damped.rsqrt().unsqueeze(-2)  # infinite where a pseudo-inverse drops one
    x = (V * w) @ Q.mT
    rest = torch.where(taken, (damped - s.square()).unsqueeze(-2), 0.0)
    found = (x @ R.mT @ R @ Q + rest * (x @ Q)) * w
    return (found - V * taken).abs().amax((-2, -1))


def estimate_largest(F: Tensor) -> Tensor:
    """Lower bound of ``lambda_max`` by four power iterations from the largest row: for a report, not for a ridge.

    It takes matrix-vector products only, for solvers that do not need the eigenvalue otherwise.  # any form -> (B,)
    """
    return F.amax(-1) if F.ndim == 2 else widest(_iterate, F)


def _iterate(F: Tensor) -> Tensor:
    widest_axis = F.diagonal(dim1=-2, dim2=-1).argmax(-1)
    v = torch.take_along_dim(F, widest_axis[:, None, None], 1)  # (B, 1, d): a row, with which products are faster
    for _ in range(2):
        v = v / torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp(min=torch.finfo(F.dtype).tiny)
        v = torch.bmm(torch.bmm(v, F), F)  # `@` takes four operators for one
    top: Tensor = torch.linalg.vector_norm(v, dim=(-2, -1)).sqrt()
    return top
