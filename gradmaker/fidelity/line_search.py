"""The least loss along a direction."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, isfinite

__all__ = ["best_step"]

DOUBLINGS = 20
"""Changes of the step by a factor of two at most, in either direction."""


def best_step(loss: Callable[[float], float], start: float, at_zero: float) -> tuple[float, float]:
    """The largest decrease ``L(0) - L(η)`` and its ``η``: by factors of two from a start, then at the vertex of a parabola.

    Zero at ``η = 0`` if no step on the way decreases the loss.
    """
    if start == 0 or not isfinite(start):
        return 0.0, 0.0
    known: dict[float, float] = {}

    def at(step: float) -> float:
        if step not in known:
            value = loss(step)
            known[step] = value if isfinite(value) else inf
        return known[step]

    step = start
    factor = 2.0 if at(2 * start) < at(start) else 0.5
    for _ in range(DOUBLINGS):
        if at(factor * step) < at(step) or at(step) >= at_zero > at(factor * step):
            step *= factor
        elif factor < 1 and at(step) >= at_zero:
            step *= factor  # too long so far
        else:
            break
    vertex = _vertex([(x, at(x)) for x in (step / 2, step, 2 * step)])
    if vertex is not None:
        at(vertex)
    best = min(known, key=lambda x: known[x])
    return (at_zero - known[best], best) if known[best] < at_zero else (0.0, 0.0)


def _vertex(points: list[tuple[float, float]]) -> float | None:
    """The lowest point of the parabola through three points; None if it has none."""
    (a, fa), (b, fb), (c, fc) = points
    upper = (b - a) ** 2 * (fb - fc) - (b - c) ** 2 * (fb - fa)
    lower = (b - a) * (fb - fc) - (b - c) * (fb - fa)
    if lower == 0 or not isfinite(upper / lower):
        return None
    x = b - upper / (2 * lower)
    return x if min(a, c) < x < max(a, c) else None
