"""The practical Neumann optimizer: a Neumann series summed over steps, from gradients at displaced weights."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from gradmaker.linalg.state import State
from gradmaker.options.checks import check_interval
from gradmaker.representations.position import Placed
from gradmaker.solvers.base import Ask
from gradmaker.solvers.carried import carry
from gradmaker.solvers.definition import Defined

__all__ = ["DisplacedNeumann"]

NEAR = 1e-8
"""Distance to the average weights, over ``sqrt P``, below which the regularizer is zero."""


@dataclass(frozen=True, kw_only=True)
class DisplacedNeumann(Defined[Placed]):
    """``P g = d - mu m / rate`` with ``m <- mu m - rate d``: a step of the learning rate ``rate`` moves by ``mu m - rate d``.

    ``grad f(w + rate m) = g + rate H m`` to first order, so that gradients at weights displaced by ``m`` sum to the Neumann
    series of ``H^-1 g``. With ``v`` the average of the weights, ``v <- w + average (v - w)``, and ``r = |w - v|``:

    - ``d = g + (alpha r^2 - beta / r^2) (w - v) / r``, without the second term where ``w`` and ``v`` nearly coincide;
    - ``mu_t = min(peak, 1 - 1 / (1 + t))``;
    - a reset at the first step, and again after ``period, 2 period, 4 period, ...`` steps: ``m = -rate g``, ``d = g``.

    Before the first reset, ``plain`` steps use the gradient itself. ``beta`` None is ``1e-5 P``. The weights without the
    displacement ``mu m`` are the result of the method.

    Reference: Krishnan, Xiao & Saurous, ICLR 2018, arXiv:1712.03298, algorithm 2; the paper does not say that weights
    move at a reset too, nor where the periods begin.
    """

    linear: ClassVar[bool] = False

    rate: float = 0.1
    alpha: float = 1e-7
    beta: float | None = None
    average: float = 0.99
    peak: float = 0.9
    period: int = 1000
    plain: int = 0

    def __post_init__(self) -> None:
        check_interval("rate", self.rate, 0, inf)
        check_interval("alpha", self.alpha, 0, inf, closed=True)
        if self.beta is not None:
            check_interval("beta", self.beta, 0, inf, closed=True)
        check_interval("average", self.average, 0, 1, closed=True)
        check_interval("peak", self.peak, 0, 1, closed=True)
        check_interval("period", self.period, 1, inf, closed=True)
        check_interval("plain", self.plain, 0, inf, closed=True)

    @property
    def asks(self) -> frozenset[Ask]:
        return frozenset[Ask](("steady",))

    def prepare(self, representation: Placed, state: State, previous: State | None) -> State:
        w = representation.weights(state)
        count = torch.zeros(1, dtype=torch.int64, device=w.device)
        initial = {"m": torch.zeros_like(w), "average": w.clone(), "mu": w.new_zeros(1), "count": count}
        return carry(representation, state, previous, {**initial, "reset": count.clone(), "period": count + self.period})

    def operator(self, representation: Placed, state: State) -> Tensor:
        """``P`` of the first step, which is a reset: ``(1 + mu_1) I``."""
        P: Tensor = (1.0 if self.plain else 1 + min(self.peak, 0.5)) * representation.to_dense(state)
        return P

    def equation(self, representation: Placed, state: State, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """``P g`` of the first step."""
        return x, (1.0 if self.plain else 1 + min(self.peak, 0.5)) * g

    def solve(self, representation: Placed, cache: State, g: Tensor) -> Tensor:
        w, t = representation.weights(cache), cache["count"] + 1 - self.plain
        begun, reset = t >= 1, t - 1 == cache["reset"]
        cache["average"] = torch.where(t > 1, w + self.average * (cache["average"] - w), w)
        mu = torch.where(begun, (1 - 1 / (1 + t.clamp(min=0)).to(g.dtype)).clamp(max=self.peak), 0.0)
        d = g + torch.where(reset, torch.zeros_like(g), self._regularizer(w - cache["average"]))
        cache["m"] = torch.where(begun, torch.where(reset, 0.0, mu) * cache["m"] - self.rate * d, torch.zeros_like(g))
        cache["mu"], cache["count"] = mu, cache["count"] + 1
        cache["reset"] = torch.where(reset, cache["reset"] + cache["period"], cache["reset"])
        cache["period"] = torch.where(reset, 2 * cache["period"], cache["period"])
        return d - mu / self.rate * cache["m"]

    def _regularizer(self, offset: Tensor) -> Tensor:
        """``(alpha r^2 - beta / r^2) (w - v) / r`` for the offset ``w - v``.  # (1, P)"""
        size = offset.shape[1]
        r = offset.norm()
        apart = r >= NEAR * size**0.5
        r = torch.where(apart, r, 1.0)
        beta = 1e-5 * size if self.beta is None else self.beta
        return torch.where(apart, (self.alpha * r - beta / r**3) * offset, torch.zeros_like(offset))
