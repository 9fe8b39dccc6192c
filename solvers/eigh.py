"""Solver for powers of the damped curvature by eigendecompositions of its factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import get_args

from torch import Tensor

from gradmaker.linalg.damping import RIDGES, Mode, Placement, Split, damp, pi_ridges, ridge_unit
from gradmaker.linalg.diagnosis import described, diagnose, spectral_residual, unknown
from gradmaker.linalg.eigen import decompose, is_definite
from gradmaker.linalg.factored_gradient import FactoredGradient, transform_rows
from gradmaker.linalg.factors import conjugate, dense, identity, transpose
from gradmaker.linalg.fallbacks import Factorisation, Parts, factorise, is_empty, keep_previous, scalars
from gradmaker.linalg.finite import finite_members
from gradmaker.linalg.mode_products import apply_factors, kronecker_product
from gradmaker.linalg.powers import along_axes, axis_power, axis_spectrum, outer
from gradmaker.linalg.roots import Root, apply_roots, apply_roots_to_rows, converted_roots, in_parts, keep_roots
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_choice, check_count
from gradmaker.representations.capabilities import Factored
from gradmaker.representations.roles import widen
from gradmaker.solvers.base import spectral_power
from gradmaker.solvers.definition import Defined
from gradmaker.solvers.factor_solver import FactorSolver
from gradmaker.solvers.roles import AppliesRows, HeldInForms, Remade

__all__ = ["Decomposition", "Eigh"]


class Decomposition(Factorisation):
    """Parts ``(s, Q)``, or ``(s,)`` for a diagonal. No ridge: the spectrum is damped afterwards."""

    larger_ridges = 0
    one_triangle = True

    def matrix(self, A: Tensor, ridge: Tensor) -> tuple[Parts, Tensor]:
        s, Q, ok = decompose(A)
        return (s.clamp(min=0), Q), ok & is_definite(s)

    def diagonal(self, a: Tensor, ridge: Tensor) -> tuple[Parts, Tensor]:
        return (a.clamp(min=0),), is_definite(a)

    last_resort = matrix


@dataclass(frozen=True, kw_only=True)
class Eigh(FactorSolver[Factored], Defined[Factored], AppliesRows[Factored], HeldInForms[Factored], Remade[Factored]):
    """``(C + lambda I)^power`` for any negative power, with ``C = (Q_1 S_1 Q_1^T (x) Q_2 S_2 Q_2^T)^(1/order)``.

    - ``split="exact"``: ``Q [((S_1 (x) S_2)^(1/order) + lambda)^power * (Q^T g)]``, two products a factor and step;
      ``placement="after"`` adds the damping to the power, ``(C^|power| + lambda)^-1``, in units of ``C^|power|``;
    - ``"pi"``, ``"each"``: ``(F_k + r_k I)^(power/order)``, multiplied out to one matrix a factor.

    ``mode`` is the unit of ``damping``, see `gradmaker.linalg.damping`: from the spectrum of ``C``, with ``each`` from that of
    each factor; ``pi`` has ridges only. Negative eigenvalues count as zero. A block whose refreshes have
    all failed gets ``damping^power g``, the result for zero curvature; where the mode gives no scale, it keeps its gradient.

    Reference: George et al., NeurIPS 2018, arXiv:1806.03884, section 3; Gupta, Koren, Singer 2018, arXiv:1802.09568.
    """

    split: Split = "exact"
    mode: Mode = "absolute"
    placement: Placement = "before"
    interval: int | None = None
    """Number of steps that one refresh serves: for few, roots are held by their eigenvectors, not multiplied out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("split", self.split, get_args(Split))
        if self.interval is not None:
            check_count("interval", self.interval, 1)
        check_choice("mode", self.mode, RIDGES if self.split == "pi" else get_args(Mode))
        check_choice("placement", self.placement, get_args(Placement) if self.split == "exact" else ("before",))

    def prepare(self, representation: Factored, state: State, previous: State | None) -> State:
        factors = representation.factors(state)
        return self.prepare_factors(factors, representation.order(len(factors)), previous)

    def prepare_factors(self, held: Sequence[Tensor], order: float, previous: State | None) -> State:
        factors = scalars(held)
        results, failed, retries = factorise(Decomposition(), factors, [F.new_zeros(F.shape[:1]) for F in factors])
        power = -1.0 if self.placement == "after" else self.power
        gain = self.damping**power if self.mode == "absolute" and self.damping else 1.0
        if self.split == "exact":
            return self._keep_exact(factors, (results, failed, retries), previous, order, gain)
        spectra = [parts[0] for parts in results]
        damped, ridges = self._damped(factors, spectra, order)
        powers = [s ** (self.power / order) for s in damped]
        found = [spectral_residual(*each) for each in zip(factors, results, damped, strict=True)]
        parted = in_parts(self.interval, factors)
        roots = [_root(results.pop(0), w, parts) for w, parts in zip(powers, parted, strict=True)]  # eigenvectors are freed
        diagnosis = diagnose(described(found, ridges), [s.amax(-1) for s in spectra], retries)
        return keep_roots(roots, _add_infinite(failed, powers), previous, gain, diagnosis, is_empty(factors))

    def _damped(self, factors: Sequence[Tensor], spectra: Sequence[Tensor], order: float) -> tuple[list[Tensor], list[Tensor]]:
        """The damped spectrum of each factor, and the ridges for the diagnosis."""
        tops = [s.amax(-1) for s in spectra]
        if self.split == "each":
            damped = [damp(s, self.damping, self.mode) for s in spectra]
            return damped, [self.damping * ridge_unit(self.mode, *each) for each in zip(tops, map(_mean, spectra), strict=True)]
        m = len(spectra)  # damping^(order/m) in units of C = (F_1 (x) ... (x) F_m)^(1/order)
        units = [ridge_unit(self.mode, *each) for each in zip(tops, map(_mean, spectra), strict=True)]
        ridges = pi_ridges(factors, self.damping ** (order / m) * prod(u ** (1 / m) for u in units))
        return [s + r.unsqueeze(-1) for s, r in zip(spectra, ridges, strict=True)], ridges

    def _keep_exact(
        self,
        factors: Sequence[Tensor],
        found: tuple[list[Parts], Tensor, Tensor],
        previous: State | None,
        order: float,
        gain: float,
    ) -> State:
        results, failed, retries = found
        spectrum = _outer([parts[0] ** (1 / order) for parts in results])  # of C: (B, d_1, ..., d_m)
        power = self.power
        if self.placement == "after":
            spectrum, power = spectrum**-power, -1.0
        new = {"scale": damp(spectrum, self.damping, self.mode) ** power}
        new.update({f"basis_{k}": parts[1] for k, parts in enumerate(results) if len(parts) == 2})
        default = {name: identity(x) for name, x in new.items() if name != "scale"}
        default["scale"] = spectrum.new_tensor(gain)
        residuals = [spectral_residual(F, parts, None) for F, parts in zip(factors, results, strict=True)]
        flat = spectrum.flatten(1)
        ridges = [self.damping * ridge_unit(self.mode, flat.amax(-1), _mean(flat))] * len(factors)
        new["diagnosis"] = diagnose(described(residuals, ridges), [parts[0].amax(-1) for parts in results], retries)
        default["diagnosis"] = unknown(new["diagnosis"])
        return keep_previous(new, _add_infinite(failed, [new["scale"]]), previous, default, is_empty(factors))

    def operator(self, representation: Factored, state: State) -> Tensor:
        if self.split == "exact":
            C, power = representation.to_dense(state), self.power
            if self.placement == "after":
                C, power = spectral_power(C, 0.0, -power), -1.0
            return spectral_power(C, self.damping, power, self.mode)
        return widen(representation, state, kronecker_product([dense(X) for X in self._axes(representation, state)]))

    def _axes(self, representation: Factored, state: State) -> list[Tensor]:
        """The Kronecker factors of ``P``, with ``split`` other than ``exact``."""
        factors = representation.factors(state)
        order = representation.order(len(factors))
        if self.split == "each":
            return [axis_power(F, self.damping, self.power / order, self.mode) for F in factors]
        ridges = self._damped(factors, [axis_spectrum(F)[0] for F in factors], order)[1]
        return [axis_power(F, r.unsqueeze(-1), self.power / order) for F, r in zip(factors, ridges, strict=True)]

    def equation(self, representation: Factored, state: State, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.split != "exact":
            return x, along_axes(self._axes(representation, state), representation.unfold(g)).reshape(g.shape)
        factors = representation.factors(state)
        spectra, bases = zip(*map(axis_spectrum, factors), strict=True)
        C, power = outer(spectra) ** (1 / representation.order(len(factors))), self.power
        if self.placement == "after":
            C, power = C**-power, -1.0
        scale = damp(C, self.damping, self.mode) ** power
        rotated = along_axes([None if Q is None else transpose(Q) for Q in bases], representation.unfold(g))
        scaled = rotated * scale.reshape(*scale.shape, *[1] * (rotated.ndim - scale.ndim))
        return x, along_axes(bases, scaled).reshape(g.shape)

    def solve(self, representation: Factored, cache: State, g: Tensor) -> Tensor:
        if self.split != "exact":
            return apply_roots(cache, representation.unfold(g)).reshape(g.shape)
        bases = [cache.get(f"basis_{k}") for k in range(cache["scale"].ndim - 1)]  # None for a diagonal axis
        rotated = apply_factors([None if Q is None else transpose(Q) for Q in bases], representation.unfold(g))
        scale = cache["scale"].reshape(*cache["scale"].shape, *[1] * (rotated.ndim - cache["scale"].ndim))
        return apply_factors(bases, rotated * scale).reshape(g.shape)

    def converted(self, saved: State, like: State) -> State:
        return converted_roots(saved, like)

    def solve_rows(self, representation: Factored, cache: State, rows: FactoredGradient) -> FactoredGradient | Tensor:
        if self.split != "exact":
            return apply_roots_to_rows(cache, rows)
        bases = [cache.get(f"basis_{k}") for k in range(cache["scale"].ndim - 1)]
        rotated = transform_rows([None if Q is None else transpose(Q) for Q in bases], rows).form()
        scale = cache["scale"].reshape(*cache["scale"].shape, *[1] * (rotated.ndim - cache["scale"].ndim))
        return apply_factors(bases, rotated * scale)


def _outer(spectra: Sequence[Tensor]) -> Tensor:
    """``s_1 (x) s_2 (x) ...`` with an axis for each.  # (B, d_1, ..., d_m)"""
    out, *rest = spectra
    for s in rest:
        out = out.unsqueeze(-1) * s.view(s.shape[0], *[1] * (out.ndim - 1), -1)
    return out


def _mean(s: Tensor) -> Tensor:
    return s.mean(-1)


def _root(parts: Parts, w: Tensor, parted: bool) -> Root:
    """``Q diag(w) Q^T``, its parts, or the diagonal."""
    if len(parts) == 1:
        return w
    return (w, parts[1]) if parted else conjugate(parts[1], w)


def _add_infinite(failed: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Also mark members that overflowed: a singular matrix without damping.  # (B,)"""
    return failed | ~finite_members(*tensors)
