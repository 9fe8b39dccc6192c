"""A solver: division of a block by the mean of its diagonal."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradmaker import register
from gradmaker.linalg.fallbacks import keep_previous
from gradmaker.representations import Elementwise, State
from gradmaker.solvers.base import PowerSolver


@register
@dataclass(frozen=True, kw_only=True)
class BlockDivision(PowerSolver[Elementwise]):
    """``P g = g / (m^|power| + damping)`` with ``m = mean(diag C)``: one step size for a whole block.

    Reference: Zhang et al., ICLR 2025, arXiv:2406.16793, section 2 (Adam-mini).
    """

    undamped: ClassVar[bool] = False
    damping: float = 1e-8

    def prepare(self, representation: Elementwise, state: State, previous: State | None) -> State:
        m = representation.diagonal(state).flatten(1).mean(1)
        divisor = {"divisor": m.clamp(min=0) ** -self.power + self.damping}
        zero = {"divisor": m.new_tensor(self.damping)}  # what a block that never succeeded is divided by
        return keep_previous(divisor, ~torch.isfinite(divisor["divisor"]), previous, zero)

    def solve(self, representation: Elementwise, cache: State, g: Tensor) -> Tensor:
        return g / cache["divisor"].view(-1, *[1] * (g.ndim - 1))

    def operator(self, representation: Elementwise, state: State) -> Tensor:
        C = representation.to_dense(state)  # (B, P, P)
        m = C.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1)
        return torch.eye(C.shape[-1], dtype=C.dtype, device=C.device) / (m**-self.power + self.damping)
