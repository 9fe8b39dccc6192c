"""Powers of factors and their products with gradients by definition: the reference for checks of large blocks.

Slow and in float64, by `torch.linalg` alone; no step uses these functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradmaker.linalg.damping import damp
from gradmaker.linalg.factors import blocks, conjugate, diagonal_of, is_tiled, join, join_vector, split

__all__ = ["along_axes", "axis_power", "axis_spectrum", "balanced_ridges", "outer"]


def axis_spectrum(F: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues, not negative, and eigenvectors of a factor in any form; None for a diagonal.  # (B, d), as F"""
    if F.ndim == 2:
        return F.clamp(min=0), None
    found = [torch.linalg.eigh(x) for x in (split(F) if is_tiled(F) else [F])]
    if not is_tiled(F):
        return found[0][0].clamp(min=0), found[0][1]
    s = join_vector([s for s, _ in found], len(F))
    return s.clamp(min=0), join([Q for _, Q in found], F.shape[1])


def axis_power(F: Tensor, damping: float | Tensor, exponent: float, mode: str = "absolute") -> Tensor:
    """``(F + damping I)^exponent``, or damped by another `Mode`, in the form of the factor."""
    if exponent == -1 and mode == "absolute" and F.ndim == 3 and not is_tiled(F):  # ten times faster than a decomposition
        ridge = torch.as_tensor(damping, dtype=F.dtype, device=F.device).reshape(-1, 1, 1)
        X, info = torch.linalg.inv_ex(F + ridge * torch.eye(F.shape[-1], dtype=F.dtype, device=F.device))
        if bool((info == 0).all()):
            inverse: Tensor = X
            return inverse
    s, Q = axis_spectrum(F)
    powered = damp(s, damping, mode) ** exponent
    return powered if Q is None else conjugate(Q, powered)


def along_axes(factors: Sequence[Tensor | None], g: Tensor) -> Tensor:
    """Mode products ``g x_1 F_1 x_2 F_2 ...``, axis by axis; None for the identity.  # (B, d_1, ..., d_m)"""
    for axis, F in enumerate(factors, start=1):
        if F is not None:
            g = _moved(F, g.movedim(axis, -1)).movedim(-1, axis)
    return g


def _moved(F: Tensor, x: Tensor) -> Tensor:
    """The product with ``F`` along the last axis.  # (B, ..., d)"""
    if F.ndim == 2:
        return torch.einsum("b...j,bj->b...j", x, F)
    return torch.cat([torch.einsum("b...j,bij->b...i", x[..., rows], block) for rows, block in blocks(F)], -1)


def outer(spectra: Sequence[Tensor]) -> Tensor:
    """``s_1 (x) s_2 (x) ...`` with an axis for each.  # each (B, d_k) -> (B, d_1, ..., d_m)"""
    out, *rest = spectra
    for s in rest:
        out = torch.einsum("b...,bj->b...j", out, s)
    return out


def balanced_ridges(factors: Sequence[Tensor], share: float | Tensor) -> list[Tensor]:
    """``share t_k / (t_1 t_2 ... t_m)^(1/m)``, ``t_k`` the mean of the diagonal; ``share`` where one is zero.  # each (B,)"""
    t = torch.stack([diagonal_of(F).mean(-1) for F in factors])
    product = t.prod(0)
    ratio = t / torch.where(product > 0, product, 1.0) ** (1 / len(factors))
    return list(torch.where(product > 0, ratio, torch.ones_like(t)) * share)
