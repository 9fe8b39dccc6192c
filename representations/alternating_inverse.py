"""KrADagrad's statistic: a Kronecker product for the inverse of the whole covariance, of which each step updates one factor.

Letters: ``L_k`` the factor of axis ``k``, ``P_k = L_k^(1/2)`` as of its last refresh, ``m`` the number of axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isqrt
from typing import ClassVar

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Evidence, Gradient
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.linalg.diagnosis import COLUMNS, renew_row, spectral_residual
from gradmaker.linalg.eigen import decompose_again, symmetrise
from gradmaker.linalg.fallbacks import count_failures
from gradmaker.linalg.mode_products import apply_factors, mode_matrix
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_count, check_interval
from gradmaker.representations.base import Fold, Frame
from gradmaker.representations.held_spectra import HeldSpectra
from gradmaker.representations.inverse_dims import PATIENCE, krad_update, warn_if_unmoved
from gradmaker.representations.roles import OwnOrder, Renewal, Renewed

__all__ = ["ONE_AXIS", "AlternatingInverse", "scheduled_axis"]

ROOT, USED = ("values_", "basis_"), "used_"

ONE_AXIS = "decay=0: expected a decay above 0, or None for a sum; each step updates one axis, and would forget all others"


def scheduled_axis(step: int, shape: tuple[int, ...]) -> int:
    """The axis that a step updates: in rounds at first, then each axis once between two squares, and the longest otherwise."""
    m = len(shape)
    if step < m * m:
        return step % m
    since = step - isqrt(step) ** 2
    return since if since < m else shape.index(max(shape))


@dataclass(frozen=True)
class AlternatingInverse(HeldSpectra, OwnOrder, Renewed):
    """KrADagrad's inverse covariance, held jointly: ``C^-1 ~ L_1 (x) ... (x) L_m``; each step updates one ``L_k``.

    ``G_w = G x_(i != k) P_i``, ``L_k <- L_k - L_k S L_k / (1 + |L_k S|_F)`` with ``S = mat_k(G_w) mat_k(G_w)^T``: at least
    ``g g^T / (r (1 + tr))`` is added to the implied covariance, ``r`` the rank. ``damping`` is that of the covariance to
    first order, ``L - damping L^2 / (1 + damping lambda_max(L))``, kept positive by the division. ``start=None`` begins with
    ``L_k = I``, as published, which small gradients hardly change; a number begins with the inverse of that many mean squares
    of the first gradient, split evenly over the axes. A refresh computes the roots ``P_k`` anew.

    ``published`` follows the authors' release exactly: ``L - damping L^2``, whatever its sign, and ``P g`` uses ``G_w``, so
    that of a refresh it sees the root of axis ``k`` alone, and before ``plain`` gradients not even that.

    Reference: Mei, Moreno, Walters 2023, KrADagrad, arXiv:2305.19416.
    """

    takes: ClassVar[frozenset[Kind]] = kinds(Gradient)
    exponent: ClassVar[int] = -1

    damping: float = 1e-8
    start: float | None = 1.0
    published: bool = False
    plain: int = 0

    def __post_init__(self) -> None:
        check_interval("damping", self.damping, 0, inf, closed=True)
        if self.start is not None:
            check_interval("start", self.start, 0, inf, hint=", or None")
        check_count("plain", self.plain, 0)
        if self.plain and not self.published:
            raise ValueError(f"plain={self.plain!r}: expected 0 beside published=False")

    @property
    def renewal(self) -> Renewal:
        """As published, the applied roots change between refreshes."""
        return "measurement" if self.published else "refresh"

    def init(self, frame: Frame) -> State:
        none = torch.zeros(frame.stack, dtype=torch.int64, device=frame.device)
        state = {"failures": none, "failing": none.clone()}
        for axis, size in enumerate(frame.shape or (1,)):
            state[f"values_{axis}"] = frame.zeros(size) + 1
            state[f"inverse_{axis}"] = frame.zeros(size) + 1
            if axis not in frame.diagonal:
                state[f"inverse_{axis}"] = frame.unit(size)
                state[f"basis_{axis}"] = frame.unit(size)
        state["diagnosis"] = frame.zeros(len(frame.shape or (1,)), len(COLUMNS))
        held = [name for name in state if name.startswith(ROOT)] if self.published else []
        return state | {USED + name: state[name].clone() for name in held}

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        assert isinstance(evidence, Gradient)
        if fold.beta == 0:
            raise ValueError(ONE_AXIS)
        G = self.unfold(evidence.gradient)
        shape = tuple(G.shape[1:])
        if fold.first and fold.begins and self.start is not None:
            self._set_scale(state, self.start * G.flatten(1).square().mean(1))
        axis = scheduled_axis(fold.index, shape)
        whiteners = [None if k == axis else self.power(state, k, 0.5) for k in range(len(shape))]
        L = state[f"inverse_{axis}"]
        L.copy_(self._updated(L, mode_matrix(apply_factors(whiteners, G), axis), fold.beta))
        self._copy_roots(state, [k for k in range(len(shape)) if k != axis])
        if fold.refresh:
            self.refresh(state)
        self._copy_roots(state, [axis])
        if self.published and fold.index < self.plain:
            state[f"{USED}values_{axis}"].fill_(1)
        if fold.index + 1 == PATIENCE and fold.begins and self.start is None:
            low = torch.stack([state[f"values_{k}"].amin(-1) for k in self.axes(state)]).amin(0)
            warn_if_unmoved(low > 0.5, "start=1.0 begins at the scale of the first gradient")

    def _copy_roots(self, state: State, axes: list[int]) -> None:
        """Copy the current roots of these axes to the ones that are applied as published."""
        for name in (f"{USED}{kind}{k}" for kind in ROOT for k in axes):
            if name in state:
                state[name].copy_(state[name.removeprefix(USED)])

    def _set_scale(self, state: State, variance: Tensor) -> None:
        """Start at ``L_1 (x) ... = I / variance``; a zero gradient sets no scale.  # (B,)"""
        axes = self.axes(state)
        share = torch.where(variance > 0, variance, 1.0) ** (-1 / len(axes))
        for tensor in (state[f"{name}_{axis}"] for axis in axes for name in ("values", "inverse")):
            tensor.mul_(share.view(-1, *[1] * (tensor.ndim - 1)))

    def _updated(self, L: Tensor, x: Tensor, beta: float) -> Tensor:
        L = L / beta
        if L.ndim == 2:
            s = x.square().sum(-1)
            top = 0.0 if self.published else L.amax(-1, keepdim=True)
            L = L - self.damping * L.square() / (1 + self.damping * top)
            out: Tensor = L - L.square() * s / (1 + torch.linalg.vector_norm(L * s, dim=-1, keepdim=True))
            return out
        if self.damping:
            top = torch.linalg.matrix_norm(L, ord=float("inf"))[:, None, None]  # at least lambda_max
            L = symmetrise(L - self.damping * (L @ L) / (1 + self.damping * (0.0 if self.published else top)))
        return krad_update(L, x, "fro")

    def refresh(self, state: State) -> None:
        failed = torch.zeros_like(state["failing"], dtype=torch.bool)
        for axis in self.axes(state):
            L, held = state[f"inverse_{axis}"], state[f"values_{axis}"]
            finite = torch.isfinite(L).flatten(1).all(1)
            if L.ndim == 2:
                held.copy_(torch.where(finite[:, None], L, held))
                failed |= ~finite
                continue
            s, Q, ok, retries = decompose_again(torch.where(finite[:, None, None], L, 0.0))
            ok = ok & finite
            s = s.clamp(min=0)
            error = spectral_residual(L, (s, Q), torch.where(s > 0, s, torch.inf))  # a root of zero is zero
            renew_row(state["diagnosis"], axis, ~ok, error, s.amax(-1), retries=retries)
            failed |= ~ok
            held.copy_(torch.where(ok[:, None], s, held))
            state[f"basis_{axis}"].copy_(torch.where(ok[:, None, None], Q, state[f"basis_{axis}"]))
        for name, value in count_failures(failed, state).items():
            state[name].copy_(value)

    def spectra(self, state: State) -> list[tuple[Tensor, Tensor | None]]:
        """The eigenpairs of ``L_k`` of the last refresh; with ``published`` the applied ones.  # (B, d), (B, d, d)"""
        used = USED if self.published else ""
        return [(state[f"{used}values_{axis}"], state.get(f"{used}basis_{axis}")) for axis in self.axes(state)]
