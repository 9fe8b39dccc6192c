"""Division in an eigenbasis: Adam's rule on rotated gradients."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradmaker.representations.base import Rotated, State
from gradmaker.representations.kronecker import apply_factors
from gradmaker.solvers.base import Solver
from gradmaker.solvers.damping import check_interval
from gradmaker.solvers.ladder import settle

__all__ = ["RotatedDivision"]


@dataclass(frozen=True, kw_only=True)
class RotatedDivision(Solver):
    """``P g = Q [(Q^T g) / (s^|power| + damping)]``: the damping is added after the root, as Adam does.

    With ``raw`` it is added before the bias correction of ``s``, as SOAP's code does: ``damping / mass^|power|``. A block whose
    spectrum has taken in nothing gets zero; one that fails before it ever succeeded ``g / damping``.

    Reference: Vyas et al., ICLR 2025, arXiv:2409.11321, algorithm 3.
    """

    needs: ClassVar[type] = Rotated
    definite: ClassVar[bool] = True

    power: float = -0.5
    damping: float = 1e-8
    raw: bool = False

    def __post_init__(self) -> None:
        check_interval("power", self.power, -inf, 0)
        check_interval("damping", self.damping, 0, inf)

    @property
    def exponent(self) -> float:
        return self.power

    def _scale(self, representation: Any, state: State) -> Tensor:
        s = representation.spectrum(state)
        mass = state["mass"].view(-1, *[1] * (s.ndim - 1))
        share = torch.where(mass > 0, mass, 1.0) ** abs(self.power) if self.raw else 1.0
        return torch.where(mass > 0, 1 / (s.clamp(min=0) ** abs(self.power) + self.damping / share), 0.0)

    def prepare(self, representation: Any, state: State, previous: State | None) -> State:
        bases = {f"basis_{k}": Q for k, Q in enumerate(representation.bases(state)) if Q is not None}
        new = {"scale": self._scale(representation, state), **bases}
        lost = ~torch.stack([torch.isfinite(x).flatten(1).all(1) for x in new.values()]).all(0)
        default = {name: torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device) for name, Q in bases.items()}
        default["scale"] = new["scale"].new_tensor(1 / self.damping)
        return settle(new, lost, previous, default)

    def operator(self, representation: Any, state: State) -> Tensor:
        scale = self._scale(representation, state)
        Q: Tensor | None = None
        for k, basis in enumerate(representation.bases(state)):
            d = scale.shape[k + 1]
            own = torch.eye(d, dtype=scale.dtype, device=scale.device).expand(len(scale), d, d) if basis is None else basis
            Q = own if Q is None else torch.einsum("bij,bkl->bikjl", Q, own).reshape(len(own), Q.shape[1] * d, -1)
        assert Q is not None
        return (Q * scale.flatten(1).unsqueeze(-2)) @ Q.mT

    def solve(self, representation: Any, cache: State, g: Tensor) -> Tensor:
        bases = [cache.get(f"basis_{k}") for k in range(cache["scale"].ndim - 1)]  # None for an axis in the unit basis
        rotated = apply_factors([None if Q is None else Q.mT for Q in bases], representation.unfold(g))
        return apply_factors(bases, rotated * cache["scale"]).reshape(g.shape)
