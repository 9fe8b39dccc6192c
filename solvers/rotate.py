"""Powers of a curvature whose eigenbasis is held: rotate, scale, rotate back."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradmaker.representations.base import Rotated, State
from gradmaker.representations.kronecker import apply_factors
from gradmaker.solvers.base import Solver, spectral_power
from gradmaker.solvers.damping import check_interval
from gradmaker.solvers.ladder import settle

__all__ = ["Rotate"]


@dataclass(frozen=True, kw_only=True)
class Rotate(Solver):
    """``P g = Q [(s + damping)^power * (Q^T g)]`` with the basis and the spectrum that the representation holds.

    The damping is exact: it is added to the spectrum. The cache copies the basis, so that a stale preconditioner stays whole.
    A block that fails before it ever succeeded gets ``damping^power g``, what a zero curvature would give.

    Reference: George et al., NeurIPS 2018, arXiv:1806.03884, algorithm 1.
    """

    needs: ClassVar[type] = Rotated
    definite: ClassVar[bool] = True

    power: float = -1.0
    damping: float = 1e-3

    def __post_init__(self) -> None:
        check_interval("power", self.power, -inf, 0)
        check_interval("damping", self.damping, 0, inf, closed=True)

    @property
    def exponent(self) -> float:
        return self.power

    def prepare(self, representation: Any, state: State, previous: State | None) -> State:
        bases = {f"basis_{k}": Q for k, Q in enumerate(representation.bases(state)) if Q is not None}
        new = {"scale": (representation.spectrum(state).clamp(min=0) + self.damping) ** self.power, **bases}
        lost = ~torch.stack([torch.isfinite(x).flatten(1).all(1) for x in new.values()]).all(0)
        default = {name: torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device) for name, Q in bases.items()}
        default["scale"] = new["scale"].new_tensor(self.damping**self.power if self.damping else 1.0)
        return settle(new, lost, previous, default)

    def operator(self, representation: Any, state: State) -> Tensor:
        return spectral_power(representation.to_dense(state), self.damping, self.power)

    def solve(self, representation: Any, cache: State, g: Tensor) -> Tensor:
        bases = [cache.get(f"basis_{k}") for k in range(cache["scale"].ndim - 1)]  # None for an axis in the unit basis
        rotated = apply_factors([None if Q is None else Q.mT for Q in bases], representation.unfold(g))
        return apply_factors(bases, rotated * cache["scale"]).reshape(g.shape)
