"""BFGS in double precision, to minimise a function of a few variables: the coordinates in a subspace."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, isfinite
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["minimise_bfgs"]

Objective: TypeAlias = Callable[[Tensor], tuple[float, Tensor]]
"""From a point to the value and gradient at it.  # (K,) -> , (K,)"""

DECREASE, CURVATURE = 1e-4, 0.9
"""Constants of the Wolfe conditions (Nocedal & Wright 2006, section 3.1)."""
TRIES = 25
"""Most evaluations in one line search."""
DONE = 1e-28
"""A decrement ``g^T H g`` below this share of the first counts as rounding."""
NOISE = 1e-14
"""Relative rounding error of a value."""


def minimise_bfgs(objective: Objective, H: Tensor, iterations: int) -> Tensor:
    """A point of lower value, by BFGS from zero with the initial inverse Hessian ``H``.

    ``d = -H g``, a step along it by the Wolfe conditions, ``H <- (I - r s y^T) H (I - r y s^T) + r s s^T``. Ends after
    ``iterations``, when ``g^T H g`` is rounding, or when no step lowers the value.

    Reference: Nocedal & Wright 2006, algorithm 6.1; line search by bisection: Lewis & Overton, Math. Programming 2013.
    # H: (K, K) -> (K,)
    """
    x = torch.zeros_like(H[0])
    f, g = objective(x)
    first = float(g @ H @ g)
    for _ in range(iterations):
        d = -(H @ g)
        descent = float(g @ d)
        if not (isfinite(f) and descent < -DONE * first):
            break
        found = _search(objective, x, d, f, descent)
        if found is None:
            break
        t, f, after = found
        s, y = t * d, after - g
        x, g = x + s, after
        H = _updated(H, s, y)
    return x


def _search(objective: Objective, x: Tensor, d: Tensor, f: float, descent: float) -> tuple[float, float, Tensor] | None:
    """A step length, and the value and gradient at its end; None if no step lowers the value.

    Values that differ by rounding are compared by their slopes (Hager & Zhang, SIAM J. Optim. 2005).
    """
    noise = NOISE * abs(f)
    low, high, t = 0.0, inf, 1.0
    best: tuple[float, float, Tensor] | None = None
    for _ in range(TRIES):
        value, g = objective(x + t * d)
        along = float(g @ d)
        lower = value <= f + DECREASE * t * descent or (abs(value - f) <= noise and along <= (2 * DECREASE - 1) * descent)
        if not (lower and isfinite(along)):
            high = t
        else:
            low, best = t, (t, value, g)
            if along >= CURVATURE * descent:
                break
        t = (low + high) / 2 if high < inf else 2 * low
    return best


def _updated(H: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """The BFGS update of ``H``; unchanged where ``s^T y`` is not positive."""
    sy = s @ y
    if not float(sy) > 1e-12 * float(s.norm() * y.norm()):
        return H
    V = torch.eye(len(s), dtype=s.dtype, device=s.device) - torch.outer(s, y) / sy
    new: Tensor = V @ H @ V.mT + torch.outer(s, s) / sy
    return (new + new.mT) / 2
