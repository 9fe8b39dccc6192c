"""Elementwise division: the solver for a diagonal curvature matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradmaker.linalg.fallbacks import keep_previous
from gradmaker.linalg.state import State
from gradmaker.representations.capabilities import Elementwise
from gradmaker.solvers.base import PowerSolver
from gradmaker.solvers.definition import Defined

__all__ = ["Division"]


@dataclass(frozen=True, kw_only=True)
class Division(PowerSolver[Elementwise], Defined[Elementwise]):
    """``P g = g / (d^|power| + damping)``: the damping is added after the root, as Adam and AdaGrad do.

    A block whose refreshes have all failed gets ``g / damping``, the result for zero curvature.

    Reference: Kingma, Ba, ICLR 2015, arXiv:1412.6980, algorithm 1; Duchi, Hazan, Singer, JMLR 2011, figure 1.
    """

    undamped: ClassVar[bool] = False

    damping: float = 1e-8

    def prepare(self, representation: Elementwise, state: State, previous: State | None) -> State:
        d = representation.diagonal(state)
        root = d.clamp(min=0)
        denominator = (root.sqrt_() if self.power == -0.5 else root.pow_(abs(self.power))).add_(self.damping)
        failed = ~torch.isfinite(denominator.reshape(d.shape[0], -1).sum(1))  # one pass; an elementwise mask takes three
        return keep_previous({"denominator": denominator}, failed, previous, {"denominator": d.new_tensor(self.damping)})

    def operator(self, representation: Elementwise, state: State) -> Tensor:
        d = representation.diagonal(state)
        d = d.reshape(d.shape[0], -1)
        return torch.diag_embed(1 / (d ** abs(self.power) + self.damping))

    def equation(self, representation: Elementwise, state: State, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * (representation.diagonal(state) ** abs(self.power) + self.damping), g

    def solve(self, representation: Elementwise, cache: State, g: Tensor) -> Tensor:
        return g / cache["denominator"]
