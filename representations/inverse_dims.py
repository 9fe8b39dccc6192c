"""KrAD's statistic: the inverse of each axis' factor, updated directly from the gradient.

Letters: ``H_k`` the statistic of axis ``k``, ``L_k = H_k^-1``, ``X = mat_k(G)``, ``C_k`` an array with ``C_k C_k^T = L_k``.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Evidence, Gradient
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.linalg.diagnosis import described, diagnose, singular_residual, spectral_residual
from gradmaker.linalg.eigen import decompose_again, largest_eigenvalue, symmetrise
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.finite import finite_members
from gradmaker.linalg.mode_products import apply_factors, kronecker_product, mode_matrix
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_choice, check_interval
from gradmaker.representations.base import Fold, Frame, Grain
from gradmaker.representations.inverse_arrays import array_spectrum, array_update_
from gradmaker.representations.roles import FactoredAxes, FoldsRows

__all__ = ["PATIENCE", "Denominator", "InverseDims", "krad_update", "warn_if_unmoved"]

Denominator: TypeAlias = Literal["exact", "tr", "fro", "op", "d-tr"]
PATIENCE = 100
"""Number of gradients after which an inverse that has hardly changed is reported."""


def krad_update(L: Tensor, X: Tensor, denominator: Denominator) -> Tensor:
    """``L - L S L / den``, ``S = X X^T``: Woodbury's ``(L^-1 + S)^-1`` with a number in place of its inner inverse.

    ``den``: ``tr`` 1 + tr(L S); ``fro`` 1 + |S L|_F; ``op`` 1 + lambda_max(L S); ``d-tr`` d (1 + tr(L S)). Any ``den`` of at
    least ``op`` gives ``(L^-1 + S)^-1 <= L' <= L``, with equality for ``tr`` and ``op`` where ``S`` has rank one.

    Reference: Mei, Moreno, Walters 2023, KrADagrad, arXiv:2305.19416, algorithm 1.  # (B, d, d), (B, d, c) -> (B, d, d)
    """
    Y = L @ X
    size = _size(X, Y, denominator)
    den = L.shape[-1] * (1 + size) if denominator == "d-tr" else 1 + size
    return symmetrise(L - Y @ Y.mT / den[:, None, None])


def _size(X: Tensor, Y: Tensor, denominator: Denominator) -> Tensor:
    """The trace, norm or eigenvalue in the ``den`` of `krad_update`.  X, Y = L X: (B, d, c) -> (B,)"""
    if denominator == "fro":
        out: Tensor = torch.linalg.matrix_norm(X @ Y.mT)
        return out
    if denominator == "op":
        top = largest_eigenvalue(X.mT @ Y) if X.shape[-1] <= X.shape[-2] else torch.linalg.eigvals(X @ Y.mT).abs().amax(-1)
        return top.nan_to_num(0)  # zero gradients
    return (X * Y).sum((-2, -1))


def warn_if_unmoved(unmoved: Tensor, advice: str) -> None:
    """Warn where the inverse of a member is still at its start.  # (B,)"""
    if not bool((~unmoved).all()):  # a host read
        warnings.warn(
            f"preconditioner inactive: after {PATIENCE} gradients the held inverse still is the multiple of the identity it "
            f"began with, and the step a multiple of the plain gradient: {advice}",
            stacklevel=2,
        )


@dataclass(frozen=True)
class InverseDims(FactoredAxes, FoldsRows):
    """KrAD's inverse factors: ``C^-1 ~ (L_1 (x) ... (x) L_m)^(1/m)``, ``L_k`` at least the inverse of Shampoo's ``H_k + e I``.

    ``denominator="exact"`` holds an array and is Shampoo in exact arithmetic, without the loss of digits; the others are the
    scalar forms of `krad_update`, over-estimates of the inverse (``tr``: by ten after 40 gradients, ``d-tr`` by 290). ``d-tr``
    takes at most ``1/d`` off an eigenvalue in a step; an inverse that has not moved after `PATIENCE` gradients warns.
    ``ridge`` is ``e``; with ``relative`` it is multiplied by the average eigenvalue of the first gradient's statistic.
    ``unit`` gives a new gradient the weight one in a running average, as published; otherwise it is one minus the decay.

    Reference: Mei, Moreno, Walters 2023, KrADagrad, arXiv:2305.19416.
    """

    takes: ClassVar[frozenset[Kind]] = kinds(Gradient)

    denominator: Denominator = "exact"
    ridge: float = 1e-6
    relative: bool = True
    unit: bool = False

    def __post_init__(self) -> None:
        check_choice("denominator", self.denominator, get_args(Denominator))
        check_interval("ridge", self.ridge, 0, inf)

    @property
    def grain(self) -> Grain:
        return "tensor"

    def init(self, frame: Frame) -> State:
        state = {}
        for axis, size in enumerate(frame.shape or (1,)):
            state[f"inverse_{axis}"] = frame.zeros(size) if axis in frame.diagonal else frame.zeros(size, size)
        self._restart(state)
        return state

    def _restart(self, state: State) -> None:
        """Reset to the state before any gradient."""
        start = (1 / self.ridge) ** 0.5 if self.denominator == "exact" else 1 / self.ridge
        for L in state.values():
            if L.ndim == 2:
                L.fill_(1 / self.ridge)
            else:
                L.zero_().diagonal(dim1=-2, dim2=-1).fill_(start)

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        """``beta = 0`` resets first: the inverse is then that of the newest statistic and the ridge."""
        assert isinstance(evidence, Gradient)
        G = self.unfold(evidence.gradient)
        self._update(state, [mode_matrix(G, axis) for axis in range(G.ndim - 1)], fold)

    def update_rows(self, state: State, rows: FactoredGradient, fold: Fold) -> None:
        self._update(state, [rows.columns(axis) for axis in (0, 1)], fold)

    def _update(self, state: State, unfoldings: list[Tensor], fold: Fold) -> None:
        """Update by ``X_k X_k^T = mat_k(G) mat_k(G)^T`` of each axis.  unfoldings: ``X_k``, each (B, d, c)"""
        if fold.beta == 0:
            self._restart(state)
        for axis, x in enumerate(unfoldings):
            L = state[f"inverse_{axis}"]
            if self.relative and fold.begins and (fold.first or fold.beta == 0):
                self._rescale(L, x)
            self._update_(L, x if self.unit else x * fold.alpha**0.5, fold.beta or 1.0)  # with 0 the state was reset
        if self.denominator != "exact" and fold.index + 1 == PATIENCE and fold.begins and fold.beta > 0:
            share = 1.0 if self.unit else fold.alpha**0.5
            warn_if_unmoved(self._unmoved(state, [x * share for x in unfoldings]), "denominator='exact' follows them")

    def _rescale(self, L: Tensor, x: Tensor) -> None:
        """Set the start to the scale of the first gradient; a zero gradient has none."""
        mean = x.square().sum((-2, -1)) / x.shape[1]
        scale = torch.where(mean > 0, 1 / mean, 1.0)
        L.mul_((scale**0.5 if L.ndim == 3 and self.denominator == "exact" else scale).view(-1, *[1] * (L.ndim - 1)))

    def _unmoved(self, state: State, unfoldings: list[Tensor]) -> Tensor:
        """Whether no axis has a condition of two, and ``tr(L S) > d``, where an inverse that holds ``S`` has less.  # (B,)"""
        found = [torch.zeros(len(unfoldings[0]), dtype=torch.bool, device=unfoldings[0].device)]
        for axis, (s, _) in enumerate(self.spectra(state)):
            if s.shape[-1] > 1:
                L, x = state[f"inverse_{axis}"], unfoldings[axis]
                size = (x * (L.unsqueeze(-1) * x if L.ndim == 2 else L @ x)).sum((-2, -1))
                found.append((s.amax(-1) < 2 * s.amin(-1)) & (size > s.shape[-1]))
        return torch.stack(found[1:] or found).all(0)

    def _update_(self, L: Tensor, x: Tensor, beta: float) -> None:
        """Update the statistic of an axis in place."""
        if L.ndim == 2:
            L.div_(beta)
            L.div_(1 + L * x.square().sum(-1))
        elif self.denominator == "exact":
            array_update_(L, x, beta**-0.5)
        else:
            L.copy_(krad_update(L / beta, x, self.denominator))

    def to_dense(self, state: State) -> Tensor:
        return kronecker_product(self._covariances(state))

    def matvec(self, state: State, v: Tensor) -> Tensor:
        return apply_factors(self._covariances(state), self.unfold(v)).reshape(v.shape)

    def _covariances(self, state: State) -> list[Tensor]:
        """``L_k^(-1/m)``.  # each (B, d, d) or (B, d)"""
        spectra = self.spectra(state)
        power = -1 / self.order(len(spectra))
        return [s**power if Q is None else (Q * s.unsqueeze(-2) ** power) @ Q.mT for s, Q in spectra]

    # ---------------------------------------------------------------- Inverse
    def spectra(self, state: State) -> list[tuple[Tensor, Tensor | None]]:
        """Eigenpairs of ``L_k``; None as the basis of a diagonal.  # (B, d), (B, d, d)"""
        return [self._spectrum(state[f"inverse_{axis}"]) for axis in range(sum(k.startswith("inverse_") for k in state))]

    def report(self, state: State, spectra: list[tuple[Tensor, Tensor | None]], damping: float) -> Tensor:
        """The residuals of the roots of ``L_k + damping I``, in units of ``L_k``; retries are not counted.  # (B, m, 5)"""
        found = []
        for axis, (s, Q) in enumerate(spectra):
            L, damped = state[f"inverse_{axis}"], s + damping
            if Q is None or self.denominator != "exact":
                found.append(spectral_residual(L, (s,) if Q is None else (s, Q), damped))
            else:
                found.append(singular_residual(L.mT, (s.sqrt(), Q), damped))
        ridges = [torch.full_like(e, damping) for e in found]
        retries = torch.zeros(len(found), len(spectra[0][0]), device=found[0].device)
        return diagnose(described(found, ridges), [s.amax(-1) for s, _ in spectra], retries)

    def _spectrum(self, L: Tensor) -> tuple[Tensor, Tensor | None]:
        if L.ndim == 2:
            return L, None
        finite = finite_members(L)
        broken = L.device.type != "cpu" or not bool(finite.all())  # a host read is free on a CPU, a copy is not
        safe = torch.where(finite[:, None, None], L, 0.0) if broken else L
        if self.denominator == "exact":
            return array_spectrum(safe)
        s, Q, ok, _ = decompose_again(safe)
        return torch.where(ok.unsqueeze(-1), s.clamp(min=0), torch.nan), Q

    def unfold(self, g: Tensor) -> Tensor:
        """The gradient itself; a scalar parameter is a vector of length one.  # (B, d_1, ..., d_m)"""
        return g if g.ndim > 1 else g.unsqueeze(1)

    def order(self, factors: int) -> float:
        """The number of axes."""
        return factors
