"""Division in an eigenbasis: Adam's rule on rotated gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradmaker.linalg.factors import for_members
from gradmaker.linalg.mode_products import kronecker_product
from gradmaker.linalg.state import State
from gradmaker.representations.capabilities import Rotated
from gradmaker.solvers.rotate import RotatingSolver

__all__ = ["RotatedDivision"]


@dataclass(frozen=True, kw_only=True)
class RotatedDivision(RotatingSolver):
    """``P g = Q [(Q^T g) / (s^|power| + damping)]``: the damping is added after the root, as Adam does.

    With ``raw`` it is added before the bias correction of ``s``, as SOAP's code does: ``damping / mass^|power|``. A block whose
    spectrum has accumulated nothing gets zero; one that fails before it ever succeeded ``g / damping``.

    Reference: Vyas et al., ICLR 2025, arXiv:2409.11321, algorithm 3.
    """

    undamped: ClassVar[bool] = False

    power: float = -0.5
    damping: float = 1e-8
    raw: bool = False

    @property
    def gain(self) -> float:
        return 1 / self.damping

    def scale(self, representation: Rotated, state: State) -> Tensor:
        s = representation.spectrum(state)
        mass = for_members(state["mass"], s)
        share = torch.where(mass > 0, mass, 1.0) ** abs(self.power) if self.raw else torch.ones_like(mass)
        root = s.clamp(min=0).pow_(abs(self.power))
        return root.add_(torch.where(mass > 0, self.damping / share, torch.inf)).reciprocal_()

    def divisor(self, representation: Rotated, state: State) -> Tensor:
        s, mass = representation.spectrum(state), state["mass"]
        share = torch.where(mass > 0, mass, 1.0) ** abs(self.power) if self.raw else torch.ones_like(mass)
        damped = torch.pow(s.clamp(min=0), abs(self.power)) + (self.damping / share).view(-1, *[1] * (s.ndim - 1))
        return torch.where((mass > 0).view(-1, *[1] * (s.ndim - 1)), damped, torch.inf)

    def operator(self, representation: Rotated, state: State) -> Tensor:
        scale = 1 / self.divisor(representation, state)
        bases = zip(representation.bases(state), scale.shape[1:], strict=True)
        Q = kronecker_product([scale.new_ones(len(scale), d) if basis is None else basis for basis, d in bases])
        return (Q * scale.flatten(1).unsqueeze(-2)) @ Q.mT
