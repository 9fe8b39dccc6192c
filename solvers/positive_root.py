"""Solver for representations that hold an inverse: positive roots of its factors, without a division."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.factors import conjugate
from gradmaker.linalg.finite import finite_members
from gradmaker.linalg.roots import Root, apply_roots, apply_roots_to_rows, converted_roots, in_parts, keep_roots
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_count
from gradmaker.representations.capabilities import Inverse
from gradmaker.solvers.base import PowerSolver
from gradmaker.solvers.definition import DefinedByAxes
from gradmaker.solvers.roles import AppliesRows, HeldInForms, Remade

__all__ = ["PositiveRoot"]


@dataclass(frozen=True, kw_only=True)
class PositiveRoot(PowerSolver[Inverse], DefinedByAxes[Inverse], AppliesRows[Inverse], HeldInForms[Inverse], Remade[Inverse]):
    """``C^power`` from ``(L_k + damping I)^(|power|/order)`` of every factor of ``C^-1 = (L_1 (x) ... (x) L_m)^(1/order)``.

    A block whose refreshes have all failed keeps its gradient.

    Reference: Mei, Moreno, Walters 2023, KrADagrad, arXiv:2305.19416, algorithm 2.
    """

    power: float = -0.5
    damping: float = 0.0
    interval: int | None = None
    """Number of steps that one refresh serves: for few, roots are held by their eigenvectors, not multiplied out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.interval is not None:
            check_count("interval", self.interval, 1)

    def _powers(self, representation: Inverse, spectra: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        """The spectra of the roots.  # each (B, d)"""
        power = abs(self.power) / representation.order(len(spectra))
        return [(s + self.damping) ** power for s, _ in spectra]

    def prepare(self, representation: Inverse, state: State, previous: State | None) -> State:
        spectra = representation.spectra(state)
        powers = self._powers(representation, spectra)
        shapes = [s if Q is None else Q for s, Q in spectra]
        parted = zip(spectra, powers, in_parts(self.interval, shapes), strict=True)
        roots: list[Root] = [
            (w, Q.contiguous()) if Q is not None and parts else _multiplied(w, Q) for (_, Q), w, parts in parted
        ]
        held = [x for x in (*state.values(), *powers) if x.is_floating_point()]
        finite = finite_members(*held)
        diagnosis = representation.report(state, spectra, self.damping)
        return keep_roots(roots, ~finite, previous, 1.0, diagnosis, by_columns=True)

    def axes(self, representation: Inverse, state: State) -> list[Tensor]:
        spectra = representation.spectra(state)
        return [_multiplied(w, Q) for w, (_, Q) in zip(self._powers(representation, spectra), spectra, strict=True)]

    def solve(self, representation: Inverse, cache: State, g: Tensor) -> Tensor:
        return apply_roots(cache, representation.unfold(g)).reshape(g.shape)

    def converted(self, saved: State, like: State) -> State:
        return converted_roots(saved, like)

    def solve_rows(self, representation: Inverse, cache: State, rows: FactoredGradient) -> FactoredGradient:
        return apply_roots_to_rows(cache, rows)


def _multiplied(w: Tensor, Q: Tensor | None) -> Tensor:
    """``Q diag(w) Q^T``, or the diagonal.  # (B, d, d) or (B, d)"""
    return w if Q is None else conjugate(Q, w)
