"""Conjugate gradients: the solver for every representation, by products with vectors."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from gradmaker.linalg.fallbacks import keep_previous
from gradmaker.linalg.inner_products import member_dots
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_interval
from gradmaker.representations.capabilities import Multiplies
from gradmaker.representations.roles import Unstacked, snapshot
from gradmaker.solvers.base import InverseSolver, spectral_power
from gradmaker.solvers.definition import Defined

__all__ = ["CG"]


@dataclass(frozen=True, kw_only=True)
class CG(InverseSolver[Multiplies], Defined[Multiplies]):
    """``(C + damping I) x = g`` by conjugate gradients from ``x = 0``, with a stopping rule for each member of the stack.

    Stops at ``|r| <= tolerance |g|``, or where the curvature along the search direction is not positive. The cache is the
    statistic. A block whose refreshes have all failed gets ``g / damping``, the result for zero curvature.

    Reference: Hestenes, Stiefel 1952; Martens, ICML 2010, section 4 (Hessian-free optimization).
    """

    implicit: ClassVar[bool] = True

    iterations: int = 100
    tolerance: float = 1e-10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_interval("iterations", self.iterations, 1, inf, closed=True)
        check_interval("tolerance", self.tolerance, 0, 1)

    def prepare(self, representation: Multiplies, state: State, previous: State | None) -> State:
        finite = torch.stack([torch.isfinite(x).reshape(len(x), x[0].numel()).all(1) for x in state.values()]).all(0)
        cache = snapshot(representation, state)
        nothing = {name: x.new_zeros(()) for name, x in cache.items()}
        # The names and shapes of an unstacked state change from step to step.
        before = None if isinstance(representation, Unstacked) else previous
        cache.update(keep_previous(dict(cache), ~finite, before, nothing, read=before is not None))
        return cache

    def operator(self, representation: Multiplies, state: State) -> Tensor:
        return spectral_power(representation.to_dense(state), self.damping, -1.0)

    def equation(self, representation: Multiplies, state: State, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return representation.matvec(state, x) + self.damping * x, g

    def solve(self, representation: Multiplies, cache: State, g: Tensor) -> Tensor:
        size = g.abs().amax(tuple(range(1, g.ndim)), keepdim=True) if g.ndim > 1 else g.abs()
        size = torch.where(size > 0, size, 1.0)  # squares of small gradients would underflow
        x, r, p = torch.zeros_like(g), g / size, g / size
        rr = member_dots(r, r)
        goal = rr * self.tolerance**2
        active = rr > goal
        for _ in range(self.iterations):
            if g.device.type == "cpu" and not bool(active.any()):  # on another device the test would wait for it
                break
            Cp = representation.matvec(cache, p) + self.damping * p
            curvature = member_dots(p, Cp)
            active = active & (curvature > 0)
            step = torch.where(active, rr / curvature, 0.0)
            x, r = x + step * p, r - step * Cp
            rr_new = member_dots(r, r)
            active = active & (rr_new > goal)
            p = r + torch.where(active, rr_new / rr, 0.0) * p
            rr = rr_new
        return x * size
