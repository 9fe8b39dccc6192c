"""What a refresh says about itself: one tensor in the cache, written without a host read, read when somebody asks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradmaker.representations.factor import widest

__all__ = ["COLUMNS", "described", "diagnose", "estimate_largest", "unknown"]

COLUMNS = ("iterations", "residual", "lambda_max", "damping", "retries")
"""Of ``cache["diagnosis"]`` (B, m, 5), one row for each factor: iterations of the attempt that was accepted (0: direct);
residual of ``A X^p - I`` with the damped ``A``; largest eigenvalue; ridge that was added, in units of the statistic; rungs of
the ladder. A member that failed keeps the row of the root that it keeps."""


def diagnose(
    infos: Sequence[Tensor], largest: Sequence[Tensor], rungs: Tensor, scales: Sequence[Tensor] | None = None
) -> Tensor:
    """The rows of `COLUMNS`.  # (B, m, 5)

    infos: iterations, residual, ridge for each factor, each (B, 3); largest: each (B,); rungs: (m, B)
    scales: what the factors were divided by before, each (B,)
    """
    rows = []
    for k, (info, top) in enumerate(zip(infos, largest, strict=True)):
        iterations, residual, ridge = info.unbind(-1)
        unit = torch.ones_like(top) if scales is None else scales[k]
        rows.append(torch.stack([iterations, residual, top * unit, ridge * unit, rungs[k].to(top.dtype)], -1))
    return torch.stack(rows, 1)


def described(residuals: Sequence[Tensor], ridges: Sequence[Tensor]) -> list[Tensor]:
    """Iterations, residual, ridge of a direct method.  # each (B,) -> each (B, 3)"""
    return [torch.stack([torch.zeros_like(e), e, r.to(e.dtype)], -1) for e, r in zip(residuals, ridges, strict=True)]


def unknown(diagnosis: Tensor) -> Tensor:
    """The row of a member that never succeeded: the residual is infinite.  # (5,)"""
    row = torch.zeros(len(COLUMNS), dtype=diagnosis.dtype, device=diagnosis.device)
    row[COLUMNS.index("residual")] = torch.inf
    return row


def estimate_largest(F: Tensor) -> Tensor:
    """``lambda_max`` from below, by eight steps of power iteration from the largest column: for a report, not for a ridge.

    Matrix-vector products only, for those solvers that have no other use for it.  # any form -> (B,)
    """
    return F.amax(-1) if F.ndim == 2 else widest(_iterate, F)


def _iterate(F: Tensor) -> Tensor:
    longest = torch.linalg.vector_norm(F, dim=-2).argmax(-1)
    v = torch.take_along_dim(F, longest[:, None, None], -1)  # (B, d, 1)
    for _ in range(8):
        norm = torch.linalg.vector_norm(v, dim=-2, keepdim=True)
        v = F @ (v / torch.where(norm > 0, norm, 1.0))
    top: Tensor = torch.linalg.vector_norm(v, dim=(-2, -1))
    return top
