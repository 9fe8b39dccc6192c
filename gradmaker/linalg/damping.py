"""Damping of small eigenvalues before inversion: its units, and how Kronecker factors share it.

All solvers of powers use one set of modes, `Mode`. For ``damping = e`` and a factor with eigenvalues ``s_1 ... s_d``:

- ``absolute``: ``s + e``, in the units of the statistic (Tikhonov);
- ``largest``: ``s + e max s`` (Anil et al. 2020, arXiv:2002.09018, algorithm 1), at most ``1 + 1/e`` in condition;
- ``trace``: ``s + e mean s``, weaker by ``max s / mean s``;
- ``clamp``: ``max(s, e max s)``, eigenvalues above the bound are unchanged;
- ``pseudo``: ``s`` above ``max(e, d u) max s``, ``u`` the unit roundoff; directions below it map to zero (pseudo-inverse).

The last two need all eigenvalues. Damping is never added to a statistic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from gradmaker.linalg.factors import average_trace

__all__ = ["Mode", "Placement", "Split", "damp", "equal_ridges", "pi_ridges", "ridge_unit"]

Mode: TypeAlias = Literal["absolute", "largest", "trace", "clamp", "pseudo"]
"""Units and effect of ``damping``: see above."""
RIDGES = ("absolute", "largest", "trace")
"""Modes that add a ridge to the matrix; they need no eigenvalue but the largest."""

Placement: TypeAlias = Literal["before", "after"]
"""Damping of a root: ``(C + lambda)^(-1/2)``, or ``(C^(1/2) + lambda)^-1`` with ``lambda`` in units of ``C^(1/2)``."""

Split: TypeAlias = Literal["exact", "pi", "each"]
"""``exact``: ``F_1 (x) F_2 + lambda I``; ``pi``: a ridge on every factor by `pi_ridges`; ``each``: lambda on every factor."""


def ridge_unit(mode: str, largest: Tensor, average: Tensor) -> Tensor:
    """The unit of which ``damping`` is a multiple.  # eigenvalues (B, ...) -> (B, ...)"""
    return {"absolute": torch.ones_like(largest), "trace": average}.get(mode, largest)


def damp(s: Tensor, damping: float | Tensor, mode: str) -> Tensor:
    """The damped spectrum, to be raised to a negative power; infinite for directions that map to zero.

    s: eigenvalues of one matrix a member, not negative  # (B, ...) -> (B, ...)
    """
    axes = tuple(range(1, s.ndim))
    top = s.amax(axes, keepdim=True)
    if mode == "clamp":
        return torch.maximum(s, damping * top)
    if mode == "pseudo":
        least = torch.as_tensor(damping, dtype=s.dtype, device=s.device).clamp(min=s[:1].numel() * torch.finfo(s.dtype).eps / 2)
        return torch.where(s > least * top, s, torch.inf)
    return s + damping * ridge_unit(mode, top, s.mean(axes, keepdim=True))


def pi_ridges(factors: Sequence[Tensor], share: Tensor | float) -> list[Tensor]:
    """Factored Tikhonov: ``r_k = share t_k / t``, with ``t_k = tr F_k / d_k`` and ``t`` the geometric mean of the ``t_k``.

    For two factors ``t_1 / t = pi`` and ``t_2 / t = 1 / pi``. ``share`` is ``lambda^(order / m)``, the ridge of each factor if
    all have the same scale. If a trace is zero or not finite, ``pi = 1``.

    Reference: Martens, Grosse, ICML 2015, arXiv:1503.05671, section 6.3; k factors as in kfac-jax.  # -> m of (B,)
    """
    t = torch.stack([average_trace(F) for F in factors])  # (m, B)
    usable = (torch.isfinite(t) & (t > 0)).all(0)
    balance = torch.where(usable, t / t.log().mean(0).exp(), 1.0)
    return list(balance * share)


def equal_ridges(factors: Sequence[Tensor], damping: float) -> list[Tensor]:
    """``lambda`` on every factor.  # -> m of (B,)"""
    return [F.new_full(F.shape[:1], damping) for F in factors]
