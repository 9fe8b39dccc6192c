"""Cheap proofs that a factorisation is right, by products with a few vectors instead of with a whole basis: ``O(d^2)``.

For an error matrix ``E`` and random signs ``v``, ``mean |E v|^2 = |E|_F^2``. A wrong entry ``E_ij = e`` changes ``(E v)_i`` by
``e`` for every ``v``. A wrong direction ``E = e q q^T`` shows as ``e |q . v|``, which is below ``e x`` for all `COUNT` vectors
with a probability of about ``(0.8 x)^COUNT``.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["COUNT", "all_finite", "probes"]

COUNT = 4
"""Number of vectors. A product of this many rows with a matrix takes little more than of one: both read the matrix once."""
SMALL = 16
"""Sides up to which the probes are all unit vectors, so that nothing is hidden from them."""


def probes(A: Tensor) -> Tensor:
    """Rows ``v`` for products ``v A``: fixed pseudo-random signs, or all unit vectors.  # (B, d, d) -> (k, d)

    Made on the device, without a generator.
    """
    d = A.shape[-1]
    if d <= SMALL:
        return torch.eye(d, dtype=A.dtype, device=A.device)
    h = torch.arange(1, COUNT * d + 1, device=A.device)  # an integer hash of 32 bits
    for factor in (0x45D9F3B, 0x119DE1F3):
        h = ((h ^ (h >> 16)) * factor) & 0xFFFFFFFF
    return ((h >> 16) & 1).mul_(2).sub_(1).to(A.dtype).view(COUNT, d)


def all_finite(x: Tensor) -> Tensor:
    """Members without NaN and infinity, which reach an extreme entry: no mask of all entries.  # (B, ...) -> (B,)"""
    if x.numel() == 0:
        return x.new_ones(len(x), dtype=torch.bool)
    flat = x.reshape(len(x), -1)
    return torch.isfinite(flat.amax(1)) & torch.isfinite(flat.amin(1))
