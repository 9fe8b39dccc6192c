"""Powers of damped curvature through eigendecompositions of its factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from gradmaker.representations.base import Factored, State
from gradmaker.representations.kronecker import apply_factors
from gradmaker.solvers.base import Solver, kronecker_power, spectral_power
from gradmaker.solvers.damping import Split, check_choice, check_interval, equal_ridges, pi_ridges
from gradmaker.solvers.diagnosis import described, diagnose, unknown
from gradmaker.solvers.ladder import Factorisation, Parts, ascend, scalars, settle
from gradmaker.solvers.roots import apply_roots, settle_roots
from gradmaker.solvers.spectrum import decompose, is_definite

__all__ = ["Decomposition", "Eigh"]


class Decomposition(Factorisation):
    """Parts ``(s, Q)``, or ``(s,)`` for a diagonal. No ridge: the spectrum is damped afterwards, where it costs nothing."""

    rungs = 0

    def matrix(self, A: Tensor, ridge: Tensor) -> tuple[Parts, Tensor]:
        s, Q, ok = decompose(A)
        return (s.clamp(min=0), Q), ok & is_definite(s)

    def diagonal(self, a: Tensor, ridge: Tensor) -> tuple[Parts, Tensor]:
        return (a.clamp(min=0),), is_definite(a)

    last_resort = matrix


@dataclass(frozen=True, kw_only=True)
class Eigh(Solver):
    """``(C + lambda I)^power`` for any negative power, with ``C = (Q_1 S_1 Q_1^T (x) Q_2 S_2 Q_2^T)^(1/order)``.

    - ``split="exact"``: ``Q [((S_1 (x) S_2)^(1/order) + lambda)^power * (Q^T g)]``, two products a factor and step;
    - ``"pi"``, ``"each"``: ``(F_k + r_k I)^(power/order)``, collapsed to one matrix a factor.

    With ``relative``, ``lambda`` is ``damping`` times the largest eigenvalue of ``C`` (of each factor for ``each``). Negative
    eigenvalues count as zero. A block that fails before it ever succeeded gets ``damping^power g``, what a zero curvature would
    give; with relative damping, which leaves no scale for it, it keeps its gradient.

    Reference: George et al., NeurIPS 2018, arXiv:1806.03884, section 3; Gupta, Koren, Singer 2018, arXiv:1802.09568.
    """

    needs: ClassVar[type] = Factored
    definite: ClassVar[bool] = True

    power: float = -1.0
    damping: float = 1e-3
    split: Split = "exact"
    relative: bool = False

    def __post_init__(self) -> None:
        check_interval("power", self.power, -inf, 0)
        check_interval("damping", self.damping, 0, inf, closed=True)
        check_choice("split", self.split, get_args(Split))

    @property
    def exponent(self) -> float:
        return self.power

    def prepare(self, representation: Any, state: State, previous: State | None) -> State:
        factors = scalars(representation.factors(state))
        order = representation.order(len(factors))
        results, lost, rungs = ascend(Decomposition(), factors, [F.new_zeros(F.shape[:1]) for F in factors])
        gain = 1.0 if self.relative or not self.damping else self.damping**self.power
        if self.split == "exact":
            return self._settle_exact(factors, (results, lost, rungs), previous, order, gain)
        largest = [parts[0].amax(-1) for parts in results]
        ridges = self._ridges(factors, largest, order)
        roots = [_power(parts, r, self.power / order) for parts, r in zip(results, ridges, strict=True)]
        found = [_residual(*each) for each in zip(factors, results, ridges, strict=True)]
        diagnosis = diagnose(described(found, ridges), largest, rungs)
        return settle_roots(roots, _add_infinite(lost, roots), previous, gain, diagnosis)

    def _ridges(self, factors: Sequence[Tensor], largest: Sequence[Tensor], order: float) -> list[Tensor]:
        if self.split == "each":
            if self.relative:
                return [self.damping * top for top in largest]
            return equal_ridges(factors, self.damping)
        m = len(factors)
        share: Tensor | float = self.damping ** (order / m)
        if self.relative:  # lambda^(order/m), where lambda = damping (prod_k lambda_max(F_k))^(1/order)
            share = share * prod(top ** (1 / m) for top in largest)
        return pi_ridges(factors, share)

    def _settle_exact(
        self,
        factors: Sequence[Tensor],
        found: tuple[list[Parts], Tensor, Tensor],
        previous: State | None,
        order: float,
        gain: float,
    ) -> State:
        results, lost, rungs = found
        spectrum = _outer([parts[0] ** (1 / order) for parts in results])  # of C: (B, d_1, ..., d_m)
        damping: Tensor | float = self.damping
        if self.relative:
            damping = damping * spectrum.amax(tuple(range(1, spectrum.ndim)), keepdim=True)
        new = {"scale": (spectrum + damping) ** self.power}
        new.update({f"basis_{k}": parts[1] for k, parts in enumerate(results) if len(parts) == 2})
        default = {name: torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) for name, x in new.items() if name != "scale"}
        default["scale"] = spectrum.new_tensor(gain)
        residuals = [_residual(F, parts, None) for F, parts in zip(factors, results, strict=True)]
        ridges = [(torch.zeros_like(spectrum) + damping).flatten(1)[:, 0]] * len(factors)
        new["diagnosis"] = diagnose(described(residuals, ridges), [parts[0].amax(-1) for parts in results], rungs)
        default["diagnosis"] = unknown(new["diagnosis"])
        return settle(new, _add_infinite(lost, [new["scale"]]), previous, default)

    def operator(self, representation: Any, state: State) -> Tensor:
        factors = representation.factors(state)
        if self.split != "exact":
            largest = [(F if F.ndim == 2 else torch.linalg.eigvalsh(F)).amax(-1) for F in factors]
            order = representation.order(len(factors))
            powered = kronecker_power(factors, self._ridges(factors, largest, order), self.power / order)
            P: Tensor = representation.widen(state, powered)
            return P
        C = representation.to_dense(state)
        top = torch.linalg.eigvalsh(C).amax(-1, keepdim=True) if self.relative else 1.0
        return spectral_power(C, self.damping * top, self.power)

    def solve(self, representation: Any, cache: State, g: Tensor) -> Tensor:
        if self.split != "exact":
            return apply_roots(representation, cache, g)
        bases = [cache.get(f"basis_{k}") for k in range(cache["scale"].ndim - 1)]  # None for a diagonal axis
        rotated = apply_factors([None if Q is None else Q.mT for Q in bases], representation.unfold(g))
        scale = cache["scale"].reshape(*cache["scale"].shape, *[1] * (rotated.ndim - cache["scale"].ndim))
        return apply_factors(bases, rotated * scale).reshape(g.shape)


def _outer(spectra: Sequence[Tensor]) -> Tensor:
    """``s_1 (x) s_2 (x) ...`` with an axis for each.  # (B, d_1, ..., d_m)"""
    out, *rest = spectra
    for s in rest:
        out = out.unsqueeze(-1) * s.view(s.shape[0], *[1] * (out.ndim - 1), -1)
    return out


def _power(parts: Parts, ridge: Tensor, exponent: float) -> Tensor:
    """``Q (S + ridge)^exponent Q^T``, or the diagonal.  # (B, d, d) or (B, d)"""
    damped = (parts[0] + ridge.unsqueeze(-1)) ** exponent
    return (parts[1] * damped.unsqueeze(-2)) @ parts[1].mT if len(parts) == 2 else damped


def _residual(F: Tensor, parts: Parts, ridge: Tensor | None) -> Tensor:
    """``max|W^T (F + ridge) W - I|``, ``W = Q (S + ridge)^(-1/2)``: that of ``A X^p`` for any real ``p``.  # (B,)

    Without a ridge, which belongs to the product of the factors then, ``max|Q^T F Q - S| / max S``.
    """
    if len(parts) == 1:
        return F.new_zeros(F.shape[:1])
    s, Q = parts
    product = Q.mT @ F @ Q
    if ridge is None:
        error = (product - torch.diag_embed(s)).abs().amax((-2, -1))
        return (error / s.amax(-1)).nan_to_num(0.0)
    w = (s + ridge.unsqueeze(-1)).rsqrt()
    scaled = w.unsqueeze(-1) * (product + torch.diag_embed(ridge.unsqueeze(-1).expand_as(s))) * w.unsqueeze(-2)
    eye = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    return (scaled - eye).abs().amax((-2, -1))


def _add_infinite(lost: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Members that overflowed are lost too: no damping on a singular matrix.  # (B,)"""
    for x in tensors:
        lost = lost | ~torch.isfinite(x).flatten(1).all(1)
    return lost
