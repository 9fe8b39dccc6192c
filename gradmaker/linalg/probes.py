"""A few vectors whose products with matrices prove a factorisation in ``O(d^2)``, where a residual takes full products.

For an error matrix ``E`` and random signs ``v``, ``mean |E v|^2 = |E|_F^2``. A wrong entry ``E_ij = e`` changes ``(E v)_i`` by
``e`` for every ``v``. A wrong direction ``E = e q q^T`` shows as ``e |q . v|``, which is below ``e x`` for all `COUNT` vectors
with a probability of about ``(0.8 x)^COUNT``.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["COUNT", "SMALL", "probes"]

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
