"""Solver for representations that hold an inverse: positive roots of its factors, without a division."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.finite import finite_members
from gradmaker.linalg.roots import apply_roots, apply_roots_to_rows, keep_roots
from gradmaker.linalg.state import State
from gradmaker.representations.capabilities import Inverse
from gradmaker.solvers.base import PowerSolver
from gradmaker.solvers.definition import DefinedByAxes
from gradmaker.solvers.roles import AppliesRows

__all__ = ["PositiveRoot"]


@dataclass(frozen=True, kw_only=True)
class PositiveRoot(PowerSolver[Inverse], DefinedByAxes[Inverse], AppliesRows[Inverse]):
    """``C^power`` from ``(L_k + damping I)^(|power|/order)`` of every factor of ``C^-1 = (L_1 (x) ... (x) L_m)^(1/order)``.

    A block whose refreshes have all failed keeps its gradient.

    Reference: Mei, Moreno, Walters 2023, KrADagrad, arXiv:2305.19416, algorithm 2.
    """

    power: float = -0.5
    damping: float = 0.0

    def _roots(self, representation: Inverse, spectra: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        power = abs(self.power) / representation.order(len(spectra))
        powered = [((s + self.damping) ** power, Q) for s, Q in spectra]
        return [s if Q is None else (Q * s.unsqueeze(-2)) @ Q.mT for s, Q in powered]

    def prepare(self, representation: Inverse, state: State, previous: State | None) -> State:
        spectra = representation.spectra(state)
        roots = self._roots(representation, spectra)
        held = [x for x in (*state.values(), *roots) if x.is_floating_point()]
        finite = finite_members(*held)
        return keep_roots(roots, ~finite, previous, 1.0, representation.report(state, spectra, self.damping))

    def axes(self, representation: Inverse, state: State) -> list[Tensor]:
        return self._roots(representation, representation.spectra(state))

    def solve(self, representation: Inverse, cache: State, g: Tensor) -> Tensor:
        return apply_roots(cache, representation.unfold(g)).reshape(g.shape)

    def solve_rows(self, representation: Inverse, cache: State, rows: FactoredGradient) -> FactoredGradient:
        return apply_roots_to_rows(cache, rows)
