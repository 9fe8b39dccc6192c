"""Truncated conjugate gradients of Hessian-free optimization: warm start, preconditioner, stopping rule, backtracking."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, inf
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradmaker.representations.base import State
from gradmaker.representations.implicit import MatrixFree
from gradmaker.solvers.base import Solver
from gradmaker.solvers.carried import carry, dot, keep_finite
from gradmaker.solvers.damping import check_interval
from gradmaker.solvers.levenberg_marquardt import LevenbergMarquardt

__all__ = ["TruncatedCG"]

GROWTH = 1.3
"""Iterates ``ceil(1.3^j)`` are kept for backtracking (Martens 2010, section 4.6)."""
SHRINK, SUFFICIENT, TRIES = 0.8, 1e-2, 60
"""Of the line search (the code of Martens 2010)."""


@dataclass(frozen=True, kw_only=True)
class TruncatedCG(Solver):
    """``P g = x`` with ``(C + lambda I) x = g`` solved as far as it pays, from ``x_0 = warm x_previous``.

    - ``phi(x) = x^T (C + lambda) x / 2 - x^T g``; stops at ``i > k = max(10, i / 10)`` when ``phi_i < 0`` and
      ``(phi_i - phi_(i-k)) / phi_i < k tolerance``, after ``iterations``, or, where ``C`` is indefinite, at the first direction
      ``p^T (C + lambda) p <= 0`` with what there is (``M^-1 g`` if nothing).
    - ``M = (D + lambda)^preconditioner``; ``D`` is the mean of the squared gradients of examples (their sum for a sum) where
      the curvature has measured it (``squares``), else the square of the gradient; 0 takes no preconditioner.
    - ``backtrack``: from the last iterate ``ceil(1.3^j)`` back to earlier ones as long as ``L(theta - x)`` falls.
    - ``adapt``: what changes ``lambda`` after every step, None leaves it.
    - ``line_search``: ``P g = eta x`` with the first ``eta`` of 1, 0.8, 0.8^2, ... for which
      ``L(theta - eta x) <= L(theta) - 0.01 eta g^T x``; none of 60 rejects the step, which is then zero and counted.

    The last three evaluate the loss on the batch of the step. A warm start that is worse than zero is dropped, so that
    ``phi(x) < 0`` and ``x`` descends. ``lambda`` follows ``x``, whatever ``eta``; the next start is the last iterate, whichever
    was taken.

    Reference: Martens, ICML 2010; Martens & Sutskever, 2012, "Training deep and recurrent networks with Hessian-free
    optimization", sections 20.5 and 20.8; Armijo, Pacific J. Math. 1966.
    """

    needs: ClassVar[type] = MatrixFree
    definite: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    damping: float = 1.0
    iterations: int = 250
    tolerance: float = 5e-4
    warm: float = 0.95
    preconditioner: float = 0.75
    backtrack: bool = True
    adapt: LevenbergMarquardt | None = LevenbergMarquardt()
    line_search: bool = True

    def __post_init__(self) -> None:
        check_interval("damping", self.damping, 0, inf)
        check_interval("iterations", self.iterations, 1, inf, closed=True)
        check_interval("tolerance", self.tolerance, 0, 1, closed=True)
        check_interval("warm", self.warm, 0, 1 + 1e-12, closed=True)
        check_interval("preconditioner", self.preconditioner, 0, 1 + 1e-12, closed=True)

    def prepare(self, representation: Any, state: State, previous: State | None) -> State:
        zero = representation.origin(state)
        none = torch.zeros(1, dtype=torch.int64, device=zero.device)
        return carry(
            representation, state, previous, {"solution": zero, "damping": zero[:, 0] + self.damping, "rejected": none}
        )

    def operator(self, representation: Any, state: State) -> Tensor:
        """The limit of many iterations, at the initial damping."""
        C = representation.to_dense(state)
        P: Tensor = torch.linalg.inv(C + self.damping * torch.eye(C.shape[-1], dtype=C.dtype, device=C.device))
        return P

    def solve(self, representation: Any, cache: State, g: Tensor) -> Tensor:
        damping = cache["damping"]
        M = self._preconditioner(representation, cache, g)

        def multiply(v: Tensor) -> Tensor:
            image: Tensor = representation.matvec(cache, v) + damping * v
            return image

        kept = self._iterates(multiply, g, M, self.warm * cache["solution"])
        x = _best(representation, cache, kept) if self.backtrack else kept[-1]
        x = keep_finite(cache, x, g / damping)
        cache["solution"] = torch.where(torch.isfinite(kept[-1]).all(), kept[-1], x)
        if self.adapt is not None:
            cache["damping"] = self._adapted(self.adapt, representation, cache, g, x)
        return _shortened(representation, cache, g, x) if self.line_search else x

    def _preconditioner(self, representation: Any, cache: State, g: Tensor) -> Tensor:
        if not self.preconditioner:
            return torch.ones_like(g)
        squares = representation.squares(cache)
        return ((g.square() if squares is None else squares.to(g.dtype)) + cache["damping"]) ** self.preconditioner

    def _iterates(self, multiply: Callable[[Tensor], Tensor], g: Tensor, M: Tensor, start: Tensor) -> list[Tensor]:
        """Those that are kept for backtracking, the last one last."""
        kept, values, due = [], [0.0], 1
        x = g / M  # where not even the first direction has positive curvature
        for i, (x, phi) in enumerate(_conjugate(multiply, g, M, _improving(multiply, g, start), self.iterations), 1):
            values.append(phi)
            if i >= due:
                kept.append(x)
                due = max(i + 1, ceil(due * GROWTH))
            k = max(10, ceil(i / 10))
            if i > k and phi < 0 and (phi - values[i - k]) / phi < k * self.tolerance:
                break
        return kept if kept and kept[-1] is x else [*kept, x]

    def _adapted(self, rule: LevenbergMarquardt, representation: Any, cache: State, g: Tensor, x: Tensor) -> Tensor:
        now, then = (representation.loss_at(cache, d) for d in (torch.zeros_like(x), -x))
        if now is None or then is None:
            return cache["damping"]
        predicted = dot(x, representation.matvec(cache, x)) / 2 - dot(x, g)
        return rule.adapt(cache["damping"], (then - now).double(), predicted)


def _improving(multiply: Callable[[Tensor], Tensor], g: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """A start and its residual: the given one where ``phi`` is negative, else zero."""
    if bool(start.any()):
        r = g - multiply(start)
        if dot(start, g + r) > 0:
            return start, r
    return torch.zeros_like(g), g


def _conjugate(
    multiply: Callable[[Tensor], Tensor], g: Tensor, M: Tensor, start: tuple[Tensor, Tensor], iterations: int
) -> Iterator[tuple[Tensor, float]]:
    """Preconditioned conjugate gradients: iterates with their ``phi``, until the curvature or the residual is used up."""
    x, r = start
    p = z = r / M
    rz = dot(r, z)
    least = torch.finfo(g.dtype).eps ** 2 * dot(g, g / M)
    for _ in range(iterations):
        Ap = multiply(p)
        curvature = dot(p, Ap)
        if not torch.isfinite(curvature):
            yield torch.full_like(x, torch.nan), torch.nan
            return
        if not (rz > least and curvature > 0):
            if x.any():
                yield x, float(-dot(x, g + r) / 2)
            return
        step = rz / curvature
        x, r = x + (step * p).to(x.dtype), r - (step * Ap).to(x.dtype)
        yield x, float(-dot(x, g + r) / 2)
        z = r / M
        before, rz = rz, dot(r, z)
        p = z + (rz / before * p).to(x.dtype)


def _best(representation: Any, cache: State, kept: list[Tensor]) -> Tensor:
    """From the last iterate back to earlier ones as long as the loss falls."""
    best = kept[-1]
    lowest = representation.loss_at(cache, -best)
    for x in reversed(kept[:-1]):
        if lowest is None:
            break
        loss = representation.loss_at(cache, -x)
        if not (loss < lowest or lowest.isnan()):
            break
        best, lowest = x, loss
    return best


def _shortened(representation: Any, cache: State, g: Tensor, x: Tensor) -> Tensor:
    """``eta x`` with Armijo's ``eta``; zero if there is none. All of ``x`` where the loss cannot be evaluated."""
    now = representation.loss_at(cache, torch.zeros_like(x))
    if now is None:
        return x
    slope, eta = dot(g, x), 1.0
    for _ in range(TRIES):
        then = representation.loss_at(cache, -eta * x)
        if then.double() <= now.double() - SUFFICIENT * eta * slope:
            return eta * x
        eta *= SHRINK
    cache["rejected"] = cache["rejected"] + 1
    return torch.zeros_like(x)
