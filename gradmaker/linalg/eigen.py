"""Eigendecomposition of stacks of symmetric matrices with failures by member, and the largest eigenvalue."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmaker.linalg.probes import probes

__all__ = ["add_ridge", "agrees", "decompose", "decompose_again", "eigh", "is_definite", "largest_eigenvalue", "symmetrise"]

NOISE = 1e-2
"""Negative eigenvalues up to this share of the largest are rounding (bf16 statistics: 5e-4); beyond, ``A`` is indefinite."""
EXACT = 256
"""Roundoffs that a decomposition may be off on a vector, relative to the norms: 5-20 are seen up to a side of 1500, and 40
where the spectrum falls by 1e12. They grow more slowly than ``sqrt(d)``. One wrong entry of the usual size ``1/sqrt(d)`` in the
basis makes ``1/d``, 1e4 roundoffs of float32 at a side of 784."""
PADDED, PADDING = 512, 8
"""At sides that are multiples of 512, columns share cache lines: 11.9, 87.6 ms at 512, 1024, and 10.8, 68.4 at 520, 1032; in
float64 26.3, 167.7 and 22.4, 148.9 (one CPU core). At other multiples of 128 it gains less than a tenth."""


def symmetrise(A: Tensor) -> Tensor:
    """``(A + A^T) / 2``, bitwise symmetric.  # (B, d, d)"""
    return (A + A.mT) / 2


def add_ridge(A: Tensor, ridge: Tensor) -> Tensor:
    """``A + ridge I``, out of place.  # (B, d, d), (B,) -> (B, d, d)"""
    out = A.clone()
    out.diagonal(dim1=-2, dim2=-1).add_(ridge.unsqueeze(-1))
    return out


def is_definite(s: Tensor) -> Tensor:
    """Whether a spectrum is finite and non-negative up to noise.  # (B, d) -> (B,)"""
    return torch.isfinite(s).all(-1) & (s.amin(-1) >= -NOISE * s.abs().amax(-1))


def eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh`, with another side where that is faster: eigenvalues of ``-2 |A|``, below all others, are appended.

    # symmetric (B, d, d) -> (B, d), (B, d, d)
    """
    B, d = A.shape[:2]
    if A.device.type != "cpu" or d % PADDED:
        s, Q = torch.linalg.eigh(A)
        return s, Q
    size = torch.linalg.vector_norm(A, dim=(-2, -1))
    padded = A.new_zeros(B, d + PADDING, d + PADDING)
    padded[:, :d, :d] = A
    padded.diagonal(dim1=-2, dim2=-1)[:, d:] = torch.where(size > 0, -2 * size, -1.0).unsqueeze(-1)
    s, Q = torch.linalg.eigh(padded)
    return s[:, PADDING:], Q[:, :d, PADDING:]


def decompose(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigendecomposition ``A = Q diag(s) Q^T``: spectrum, basis, accepted members.  # (B, d), (B, d, d), (B,)

    LAPACK and cuSOLVER may raise on finite input (pytorch#94772, #105359) and may be silently wrong, so the result is checked:
    ``A v = Q (s * Q^T v)`` and ``Q Q^T v = v`` for the vectors of `probes`, to `EXACT` roundoffs. One triangle is decomposed,
    and all of ``A`` compared.
    """
    try:
        s, Q = eigh(A)
    except RuntimeError:  # one member fails the whole call
        s, Q = _decompose_one_by_one(A)
    return s, Q, agrees(A, s, Q)


def agrees(A: Tensor, s: Tensor, Q: Tensor) -> Tensor:
    """Whether ``A = Q diag(s) Q^T`` and ``Q Q^T = I`` on the probes; not for NaN.  # (B, d, d), (B, d), (B, d, d) -> (B,)"""
    V, top = probes(A), s.abs().amax(-1)
    unit = torch.where(top > 0, top, 1.0)[:, None, None]  # no square of an entry over- or underflows
    turned = V @ Q
    skew = torch.linalg.vector_norm(turned @ Q.mT - V, dim=-1).amax(-1)
    error = torch.linalg.vector_norm((V @ A) / unit - (turned * (s.unsqueeze(-2) / unit)) @ Q.mT, dim=-1).amax(-1)
    within = EXACT * torch.finfo(A.dtype).eps * torch.linalg.vector_norm(V[0])
    agrees: Tensor = torch.maximum(error, skew) <= within
    return agrees


def decompose_again(A: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`decompose`, again in float64 for members that fail, and the number of retries.  # (B, d), (B, d, d), (B,), (B,)

    For statistics that hold their eigenbases. One host read: whether all members succeeded.
    """
    s, Q, ok = decompose(A)
    if A.dtype == torch.float64 or bool(ok.all()):
        return s, Q, ok, (~ok).to(s.dtype)
    values, basis, right = decompose(symmetrise(A.double()))  # products leave it symmetric to float32 alone
    retried = ~ok
    s, Q = torch.where(ok[:, None], s, values.to(s.dtype)), torch.where(ok[:, None, None], Q, basis.to(Q.dtype))
    return s, Q, ok | right, retried.to(s.dtype)


def _decompose_one_by_one(A: Tensor) -> tuple[Tensor, Tensor]:
    s, Q = torch.full_like(A[..., 0], torch.nan), torch.full_like(A, torch.nan)
    for b in range(A.shape[0]):
        try:
            s[b], Q[b] = torch.linalg.eigh(A[b])
        except RuntimeError:
            continue
    return s, Q


def largest_eigenvalue(A: Tensor) -> Tensor:
    """``lambda_max`` of positive semidefinite matrices by repeated squaring: ``tr(A^256 A) / tr(A^256)``.  # (B, d, d) -> (B,)

    The mean of the spectrum with weights ``s^256``: a lower bound, within a few per cent also if many eigenvalues are close to
    the largest. It serves for a ridge, not as a bound for convergence. Eight products, and no start vector that could be
    orthogonal to the leading eigenvector.
    """
    M = A
    for _ in range(8):
        M = M @ M
        M = M / M.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    return (M * A).sum((-2, -1))
