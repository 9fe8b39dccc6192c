"""Powers of a curvature whose eigenbasis is held: rotate, scale, rotate back."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmaker.linalg.diagnosis import unknown
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.factors import identity, transpose
from gradmaker.linalg.fallbacks import keep_previous
from gradmaker.linalg.finite import finite_members
from gradmaker.linalg.mode_products import apply_factors
from gradmaker.linalg.powers import along_axes
from gradmaker.linalg.rotation import coordinates
from gradmaker.linalg.state import State
from gradmaker.representations.capabilities import Rotated
from gradmaker.solvers.base import PowerSolver, spectral_power
from gradmaker.solvers.definition import Defined
from gradmaker.solvers.roles import AveragesInBasis, Remade

__all__ = ["Rotate", "RotatingSolver"]


@dataclass(frozen=True, kw_only=True)
class RotatingSolver(PowerSolver[Rotated], AveragesInBasis[Rotated], Remade[Rotated], Defined[Rotated]):
    """``P g = Q [scale * (Q^T g)]`` with the basis that the representation holds.

    A member that fails keeps the basis of its previous scale: a stale ``P`` stays whole.
    """

    @property
    @abstractmethod
    def gain(self) -> float:
        """The scale of a block that fails before it ever succeeded."""

    @abstractmethod
    def scale(self, representation: Rotated, state: State) -> Tensor:
        """A factor for each direction of the basis.  # (B, *shape)"""

    @abstractmethod
    def divisor(self, representation: Rotated, state: State) -> Tensor:
        """What a direction is divided by, spelt out once more to check `scale` against.  # (B, *shape)"""

    def prepare(self, representation: Rotated, state: State, previous: State | None) -> State:
        bases = {f"basis_{k}": Q for k, Q in enumerate(representation.bases(state)) if Q is not None}
        turned = {name: Q for name, Q in bases.items() if previous is None or Q is not previous[name]}
        new = {"scale": self.scale(representation, state), **bases}
        failed = ~finite_members(new["scale"], *turned.values())
        default = {name: identity(Q) for name, Q in bases.items()} if previous is None else {}
        default["scale"] = new["scale"].new_tensor(self.gain)
        if "diagnosis" in state:
            new["diagnosis"], default["diagnosis"] = state["diagnosis"], unknown(state["diagnosis"])
        return keep_previous(new, failed, previous, default, read=bool(turned))

    def equation(self, representation: Rotated, state: State, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x = Q ((Q^T g) / divisor)``."""
        bases = representation.bases(state)
        rotated = along_axes([None if Q is None else transpose(Q) for Q in bases], representation.unfold(g))
        return x, along_axes(bases, rotated / self.divisor(representation, state)).reshape(g.shape)

    def solve(self, representation: Rotated, cache: State, g: Tensor) -> Tensor:
        return self.solve_coordinates(cache, coordinates(self.bases(cache), representation.unfold(g))).reshape(g.shape)

    def solve_rows(self, representation: Rotated, cache: State, rows: FactoredGradient) -> Tensor:
        return self.solve_coordinates(cache, coordinates(self.bases(cache), rows))

    def coordinates(self, representation: Rotated, cache: State, g: Tensor | FactoredGradient) -> Tensor:
        return coordinates(self.bases(cache), g if isinstance(g, FactoredGradient) else representation.unfold(g))

    def solve_coordinates(self, cache: State, x: Tensor) -> Tensor:
        scaled = [x * cache["scale"]]
        del x
        return apply_factors(self.bases(cache), scaled.pop())  # the first product releases it

    def bases(self, cache: State) -> list[Tensor | None]:
        return [cache.get(f"basis_{k}") for k in range(cache["scale"].ndim - 1)]


@dataclass(frozen=True, kw_only=True)
class Rotate(RotatingSolver):
    """``P g = Q [(s + damping)^power * (Q^T g)]`` with the basis and the spectrum that the representation holds.

    The damping is exact: it is added to the spectrum. A block that fails before it ever succeeded gets ``damping^power g``,
    what a zero curvature would give.

    Reference: George et al., NeurIPS 2018, arXiv:1806.03884, algorithm 1.
    """

    @property
    def gain(self) -> float:
        return self.damping**self.power if self.damping else 1.0

    def scale(self, representation: Rotated, state: State) -> Tensor:
        s: Tensor = representation.spectrum(state)
        return s.clamp(min=0).add_(self.damping).pow_(self.power)

    def divisor(self, representation: Rotated, state: State) -> Tensor:
        s: Tensor = representation.spectrum(state)
        return torch.pow(s.clamp(min=0) + self.damping, abs(self.power))

    def operator(self, representation: Rotated, state: State) -> Tensor:
        return spectral_power(representation.to_dense(state), self.damping, self.power)
