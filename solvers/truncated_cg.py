"""Truncated, preconditioned conjugate gradients of Hessian-free optimization, with warm start and backtracking."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, inf
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gradmaker.linalg.inner_products import double_dot
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_interval
from gradmaker.representations.implicit import MatrixFree
from gradmaker.solvers.base import Ask
from gradmaker.solvers.carried import carry
from gradmaker.solvers.definition import Defined
from gradmaker.solvers.layer_inverse import LayerInverse
from gradmaker.solvers.levenberg_marquardt import LevenbergMarquardt

__all__ = ["TruncatedCG"]

GROWTH = 1.3
"""Iterates ``ceil(1.3^j)`` are kept for backtracking (Martens 2010, section 4.6)."""
SHRINK, SUFFICIENT, TRIES = 0.8, 1e-2, 60
"""Constants of the line search (the code of Martens 2010)."""


@dataclass(frozen=True, kw_only=True)
class TruncatedCG(Defined[MatrixFree]):
    """``P g = x`` with ``(C + lambda I) x = g`` solved approximately, from ``x_0 = warm x_previous``.

    - ``phi(x) = x^T (C + lambda) x / 2 - x^T g``; stops at ``i > k = max(10, i / 10)`` when ``phi_i < 0`` and
      ``(phi_i - phi_(i-k)) / phi_i < k tolerance``, after ``iterations``, or, where ``C`` is indefinite, at the first direction
      ``p^T (C + lambda) p <= 0`` with the last iterate (``M^-1 g`` if there is none).
    - ``M = (D + lambda)^preconditioner``; ``D`` is the mean of squared per-example gradients (the sum, for a loss that is
      a sum) where the curvature measures it (``squares``), else the squared gradient; 0: no preconditioner. Where the
      curvature measures Kronecker factors (``factors``), ``M`` is their product, damped by the greater of ``lambda`` and
      ``factor_damping``; see `LayerInverse`.
    - ``backtrack``: from the last iterate ``ceil(1.3^j)`` back to earlier ones as long as ``L(theta - x)`` falls.
    - ``adapt``: the rule that changes ``lambda`` after every step; None: constant.
    - ``line_search``: ``P g = eta x`` with the first ``eta`` of 1, 0.8, 0.8^2, ... for which
      ``L(theta - eta x) <= L(theta) - 0.01 eta g^T x``; where none of 60 does, the step is zero and counted as rejected.

    The last three evaluate the loss on the batch of the step. A warm start that is worse than zero is dropped, so that
    ``phi(x) < 0`` and ``x`` descends. ``lambda`` is adapted to ``x``, whatever ``eta`` is; the next warm start is the last
    iterate, also where backtracking chose another.

    Reference: Martens, ICML 2010; Martens & Sutskever, 2012, "Training deep and recurrent networks with Hessian-free
    optimization", sections 20.5 and 20.8; Armijo, Pacific J. Math. 1966.
    """

    linear: ClassVar[bool] = False

    damping: float = 1.0
    iterations: int = 250
    tolerance: float = 5e-4
    warm: float = 0.95
    preconditioner: float = 0.75
    factor_damping: float = 1e-2
    backtrack: bool = True
    adapt: LevenbergMarquardt | None = LevenbergMarquardt()
    line_search: bool = True

    def __post_init__(self) -> None:
        check_interval("damping", self.damping, 0, inf)
        check_interval("iterations", self.iterations, 1, inf, closed=True)
        check_interval("tolerance", self.tolerance, 0, 1, closed=True)
        check_interval("warm", self.warm, 0, 1 + 1e-12, closed=True)
        check_interval("preconditioner", self.preconditioner, 0, 1 + 1e-12, closed=True)
        check_interval("factor_damping", self.factor_damping, 0, inf)

    @property
    def asks(self) -> frozenset[Ask]:
        return frozenset[Ask](("steady", "factors", "squares") if self.preconditioner else ("steady", "factors"))

    def prepare(self, representation: MatrixFree, state: State, previous: State | None) -> State:
        zero = representation.origin(state)
        none = torch.zeros(1, dtype=torch.int64, device=zero.device)
        return carry(
            representation, state, previous, {"solution": zero, "damping": zero[:, 0] + self.damping, "rejected": none}
        )

    def operator(self, representation: MatrixFree, state: State) -> Tensor:
        """``P`` of converged conjugate gradients, at the initial damping."""
        C = representation.to_dense(state)
        P: Tensor = torch.linalg.inv(C + self.damping * torch.eye(C.shape[-1], dtype=C.dtype, device=C.device))
        return P

    def equation(self, representation: MatrixFree, state: State, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return representation.matvec(state, x) + self.damping * x, g

    def limit(self) -> TruncatedCG:
        exact = replace(self, tolerance=0.0, warm=0.0, preconditioner=0.0, iterations=max(self.iterations, 50))
        return replace(exact, backtrack=False, adapt=None, line_search=False)

    def solve(self, representation: MatrixFree, cache: State, g: Tensor) -> Tensor:
        damping, losses = cache["damping"], _Losses(representation, cache)

        def multiply(v: Tensor) -> Tensor:
            image: Tensor = representation.matvec(cache, v) + damping * v
            return image

        kept = self._iterates(multiply, g, self._preconditioner(representation, cache, g), self.warm * cache["solution"])
        last, chosen = kept[-1], _best(losses, kept) if self.backtrack else kept[-1]
        if not _finite(chosen.x):
            chosen = _Iterate(g / damping, torch.nan)  # no predicted decrease: the damping grows
            cache["failures"] = cache["failures"] + 1
        cache["solution"] = last.x if _finite(last.x) else chosen.x
        if self.adapt is not None:
            cache["damping"] = self._adapted(self.adapt, damping, losses, chosen)
        return _shortened(losses, cache, g, chosen.x) if self.line_search else chosen.x

    def _preconditioner(self, representation: MatrixFree, cache: State, g: Tensor) -> Callable[[Tensor], Tensor]:
        """``r -> M^-1 r``."""
        if batches := representation.layers(cache):
            return LayerInverse(batches, max(float(cache["damping"]), self.factor_damping))
        if not self.preconditioner:
            return lambda r: r
        squares = representation.squares(cache)
        M = ((g.square() if squares is None else squares.to(g.dtype)) + cache["damping"]) ** self.preconditioner
        inverse: Tensor = 1 / M
        return inverse.mul

    def _iterates(
        self, multiply: Callable[[Tensor], Tensor], g: Tensor, invert: Callable[[Tensor], Tensor], start: Tensor
    ) -> list[_Iterate]:
        """The iterates for backtracking, in order, with the final one."""
        kept, values, due = [], [0.0], 1
        now: _Iterate | None = None
        for i, now in enumerate(_conjugate(multiply, g, invert, _initial(multiply, g, start), self.iterations), 1):
            values.append(now.phi)
            if i >= due:
                kept.append(now)
                due = max(i + 1, ceil(due * GROWTH))
            k = max(10, ceil(i / 10))
            if i > k and now.phi < 0 and (now.phi - values[i - k]) / now.phi < k * self.tolerance:
                break
        if now is None:  # the first direction has no positive curvature
            x = invert(g)
            now = _Iterate(x, float(double_dot(x, multiply(x)) / 2 - double_dot(x, g)))
        return kept if kept and kept[-1] is now else [*kept, now]

    def _adapted(self, rule: LevenbergMarquardt, damping: Tensor, losses: _Losses, chosen: _Iterate) -> Tensor:
        now, then = losses.now, losses.at(chosen.x)
        if now is None or then is None:
            return damping
        predicted = chosen.phi - damping.double() * double_dot(chosen.x, chosen.x) / 2
        return rule.adapt(damping, (then - now).double(), predicted)


class _Iterate(NamedTuple):
    """An iterate of conjugate gradients and its ``phi``."""

    x: Tensor
    phi: float


class _Losses:
    """Losses of the batch at displaced weights; each is evaluated once."""

    def __init__(self, representation: MatrixFree, cache: State) -> None:
        self._evaluate: Callable[[Tensor], Tensor | None] = partial(representation.loss_at, cache)
        self._origin = torch.zeros_like(cache["solution"])
        self._known: list[tuple[Tensor, Tensor | None]] = []

    @property
    def now(self) -> Tensor | None:
        """``L(theta)``; None where it cannot be evaluated."""
        return self.at(self._origin)

    def at(self, x: Tensor) -> Tensor | None:
        """``L(theta - x)``."""
        for known, loss in self._known:
            if known is x:
                return loss
        self._known.append((x, self._evaluate(-x)))
        return self._known[-1][1]


def _initial(multiply: Callable[[Tensor], Tensor], g: Tensor, start: Tensor) -> tuple[Tensor, Tensor, float]:
    """The start, its residual and its ``phi``: the warm start where its ``phi`` is negative, else zero."""
    if bool(start.any()):
        r = g - multiply(start)
        if (phi := float(-double_dot(start, g + r) / 2)) < 0:
            return start, r, phi
    return torch.zeros_like(g), g, 0.0


def _conjugate(
    multiply: Callable[[Tensor], Tensor],
    g: Tensor,
    invert: Callable[[Tensor], Tensor],
    start: tuple[Tensor, Tensor, float],
    iterations: int,
) -> Iterator[_Iterate]:
    """Preconditioned conjugate gradients: yields iterates until the curvature is not positive or the residual is zero."""
    x, r, phi = start
    p = z = invert(r)
    rz = double_dot(r, z)
    least = torch.finfo(g.dtype).eps ** 2 * double_dot(g, invert(g))
    for _ in range(iterations):
        Ap = multiply(p)
        curvature = double_dot(p, Ap)
        if not torch.isfinite(curvature):
            yield _Iterate(torch.full_like(x, torch.nan), torch.nan)
            return
        if not (rz > least and curvature > 0):
            if x.any():
                yield _Iterate(x, phi)
            return
        step = rz / curvature
        x, r = x + (step * p).to(x.dtype), r - (step * Ap).to(x.dtype)
        phi -= float(step * rz) / 2
        yield _Iterate(x, phi)
        z = invert(r)
        before, rz = rz, double_dot(r, z)
        p = z + (rz / before * p).to(x.dtype)


def _finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def _best(losses: _Losses, kept: list[_Iterate]) -> _Iterate:
    """Backtracking: from the last iterate to earlier ones as long as the loss falls."""
    best = kept[-1]
    lowest = losses.at(best.x)
    for each in reversed(kept[:-1]):
        if lowest is None:
            break
        loss = losses.at(each.x)
        if loss is None or not (loss < lowest or lowest.isnan()):
            break
        best, lowest = each, loss
    return best


def _shortened(losses: _Losses, cache: State, g: Tensor, x: Tensor) -> Tensor:
    """``eta x`` by the Armijo rule; zero if no ``eta`` satisfies it. ``x`` itself where the loss cannot be evaluated."""
    now = losses.now
    if now is None:
        return x
    slope, eta = double_dot(g, x), 1.0
    for _ in range(TRIES):
        scaled = x if eta == 1.0 else eta * x
        then = losses.at(scaled)
        assert then is not None
        if then.double() <= now.double() - SUFFICIENT * eta * slope:
            return scaled
        eta *= SHRINK
    cache["rejected"] = cache["rejected"] + 1
    return torch.zeros_like(x)
