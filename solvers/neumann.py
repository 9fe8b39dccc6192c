"""Solver by the truncated Neumann series of the inverse."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from gradmaker.linalg.state import State
from gradmaker.options.checks import check_interval
from gradmaker.representations.implicit import MatrixFree
from gradmaker.solvers.base import Ask, InverseSolver
from gradmaker.solvers.carried import carry, keep_finite
from gradmaker.solvers.definition import Defined

__all__ = ["Neumann"]

MARGIN = 1.1
"""Factor on the result of a power iteration, which underestimates the largest eigenvalue."""


@dataclass(frozen=True, kw_only=True)
class Neumann(InverseSolver[MatrixFree], Defined[MatrixFree]):
    """``P g = eta sum_(j=0..terms) (I - eta C_lambda)^j g``, ``C_lambda = C + lambda I``, ``eta = 1 / scale``.

    By ``u_0 = g, u_j = g + u_(j-1) - eta C_lambda u_(j-1)``. The limit ``C_lambda^-1 g`` exists for ``0 < eta C_lambda < 2``;
    the truncated series is positive definite also where ``C_lambda`` is not. ``scale`` None takes 1.1 times the largest
    absolute eigenvalue, by power iteration. A series whose partial sums exceed ten times the bound of a convergent
    one is truncated there and counted as a failure.

    For a curvature that draws new examples for every product, ``P g`` is an unbiased estimate of the series with the mean
    curvature; ``repeats`` estimates are averaged. The power iteration then takes the largest norm of all its products.

    Reference: Agarwal, Bullins & Hazan, JMLR 2017, arXiv:1602.03943 (LiSSA); Krishnan, Xiao & Saurous, ICLR 2018,
    arXiv:1712.03298 (Neumann optimizer).
    """

    undamped: ClassVar[bool] = True
    linear: ClassVar[bool] = False

    terms: int = 50
    repeats: int = 1
    scale: float | None = None
    rounds: int = 10
    """Number of power iterations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_interval("terms", self.terms, 0, inf, closed=True)
        check_interval("repeats", self.repeats, 1, inf, closed=True)
        check_interval("rounds", self.rounds, 1, inf, closed=True)
        if self.scale is not None:
            check_interval("scale", self.scale, 0, inf)

    @property
    def asks(self) -> frozenset[Ask]:
        return frozenset()

    def prepare(self, representation: MatrixFree, state: State, previous: State | None) -> State:
        return carry(representation, state, previous, {})

    def operator(self, representation: MatrixFree, state: State) -> Tensor:
        """The truncated series, with ``eta`` from the exact largest eigenvalue."""
        C = representation.to_dense(state)
        eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device).expand_as(C)
        eta = 1 / (self.scale or MARGIN * torch.linalg.eigvalsh(C).abs().amax() + self.damping)
        P = eye
        for _ in range(self.terms):
            P = eye + P - eta * (C + self.damping * eye) @ P
        return eta * P

    def _scale(self, representation: MatrixFree, cache: State, g: Tensor) -> Tensor:
        """Upper estimate of the largest absolute eigenvalue of ``C_lambda``, by power iteration from ``g``.  # ()"""
        v, size = g, g.norm()
        largest = torch.zeros_like(size)
        for _ in range(self.rounds):
            v = representation.matvec(cache, v / torch.where(size > 0, size, 1.0))
            size = v.norm()
            largest = torch.maximum(largest, size)
        found = MARGIN * largest + self.damping
        return torch.where(found > 0, found, 1.0)

    def equation(self, representation: MatrixFree, state: State, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """``C_lambda x = g - (I - eta C_lambda)^(terms + 1) g``."""
        scale = self.scale or self._scale(representation, state, g)
        rest = g
        for _ in range(self.terms + 1):
            rest = rest - (representation.matvec(state, rest) + self.damping * rest) / scale
        return representation.matvec(state, x) + self.damping * x, g - rest

    def solve(self, representation: MatrixFree, cache: State, g: Tensor) -> Tensor:
        eta = 1 / (self.scale or self._scale(representation, cache, g))
        total = torch.zeros_like(g)
        for _ in range(self.repeats):
            total = total + self._series(representation, cache, g, eta)
        return keep_finite(cache, total * (eta / self.repeats), eta * g)

    def _series(self, representation: MatrixFree, cache: State, g: Tensor, eta: Tensor | float) -> Tensor:
        u, size = g, g.norm()
        for j in range(1, self.terms + 1):
            following = g + u - eta * (representation.matvec(cache, u) + self.damping * u)
            if not following.norm() <= 10 * (j + 1) * size:
                cache["failures"] = cache["failures"] + 1
                break
            u = following
        return u
