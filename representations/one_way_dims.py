"""CASPR-adaptive's factors: each axis is measured after the axes before it are whitened, and not the other way round.

Letters: ``S_k`` the statistic of axis ``k``, ``X_k`` its inverse square root as of the last refresh, ``d_k`` its length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, get_args

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Evidence, Gradient
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.linalg.diagnosis import COLUMNS
from gradmaker.linalg.factor_roots import ROOTINGS, FactorRoot
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.factors import for_members
from gradmaker.linalg.mode_products import add_product_, apply_factors, kronecker_product, mode_matrix
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_choice, check_interval, check_kind
from gradmaker.representations.base import Fold, Frame, Grain
from gradmaker.representations.roles import FactoredAxes, FoldsRows, OwnOrder, SlowTensors

__all__ = ["OneWayDims"]

RIDGE = COLUMNS.index("damping")
HELD = ("failures", "failing", "diagnosis")
"""Entries of the state that describe the last refresh, beside the roots."""


@dataclass(frozen=True)
class OneWayDims(FactoredAxes, FoldsRows, OwnOrder, SlowTensors):
    """CASPR-adaptive's factors: ``C ~ S_1 (x) ... (x) S_m`` with one-way whitening.

    ``S_k <- b c_k S_k + (1 - b) mat_k(G_k) mat_k(G_k)^T / (d_1 ... d_(k-1))``.

    ``G_k = G x_1 X_1 ... x_(k-1) X_(k-1)`` with ``X_j = (S_j + damping lambda_max(S_j) I)^(-1/2)`` as of the last refresh,
    which comes after the gradient of its step. For a matrix the rows come first, as ``G G^T``, and the columns are measured in
    whitened rows: the result for the transposed parameter differs. A refresh changes the whitening that the history of later
    axes was measured in; ``c_k = prod_(j<k) tr(X_j F_j X_j) / d_j`` rescales it, with ``F_j`` the matrix of which ``X_j`` was
    the root before (``c_k`` is one on steps without a refresh). ``S_1`` starts at ``start I``, the others at ``later I`` and
    all ``X`` at ``I``; there is no bias correction.

    Roots from a few gradients, which lack rank, amplify what they whiten, and a sum never forgets that: without ``at_once`` the
    step of the first gradient has no refresh. Where a root fails, the block keeps all roots of the previous refresh, and
    ``failures`` counts it. ``root`` chooses how roots are computed.

    Reference: Duvvuri, Dhillon & Hsieh 2024, submission ``caspr_adaptive`` to AlgoPerf v0.5 (matrices; more axes are ours).
    """

    takes: ClassVar[frozenset[Kind]] = kinds(Gradient)

    at_once: bool = True
    damping: float = 1e-6
    start: float = 1e-6
    later: float = 1.0
    root: FactorRoot = "eigh"

    def __post_init__(self) -> None:
        check_kind("at_once", self.at_once, bool)
        check_interval("damping", self.damping, 0, float("inf"), closed=True)
        for name in ("start", "later"):
            check_interval(name, getattr(self, name), 0, float("inf"))
        check_choice("root", self.root, get_args(FactorRoot))

    @property
    def grain(self) -> Grain:
        return "tensor"

    def init(self, frame: Frame) -> State:
        shape = frame.shape or (1,)
        none = torch.zeros(frame.stack, dtype=torch.int64, device=frame.device)
        state = {"failures": none, "failing": none.clone()}
        state["diagnosis"] = frame.zeros(len(shape), len(COLUMNS))
        for axis, size in enumerate(shape):
            unit = frame.zeros(size) + 1  # a 1 x 1 matrix is held as a diagonal
            if size > 1 and axis not in frame.diagonal:
                unit = frame.unit(size)
            state[f"root_{axis}"] = unit
            state[f"factor_{axis}"] = unit * (self.later if axis else self.start)
            if axis + 1 < len(shape):
                state[f"rooted_{axis}"] = state[f"factor_{axis}"] * (1 + self.damping)
        return state

    def slow(self, state: State) -> frozenset[str]:
        """The roots that are measured through, and what they are the roots of."""
        return frozenset(name for name in state if name.startswith(("root_", "rooted_")))

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        assert isinstance(evidence, Gradient)
        G, before = self.unfold(evidence.gradient), 1
        for axis in self._axes(state):
            x, S = mode_matrix(G, axis), state[f"factor_{axis}"]
            add_product_(S, x, x.mT, fold.beta, fold.alpha / before)
            if axis + 1 < len(self._axes(state)):
                G, before = apply_factors([*[None] * axis, state[f"root_{axis}"]], G), before * S.shape[-1]
        self._refresh_if_due(state, fold)

    def update_rows(self, state: State, rows: FactoredGradient, fold: Fold) -> None:
        whitened = replace(rows, g=apply_factors([None, state["root_0"]], rows.g))
        add_product_(state["factor_0"], *rows.moment_halves(0), fold.beta, fold.alpha)
        add_product_(state["factor_1"], *whitened.moment_halves(1), fold.beta, fold.alpha / rows.shape[1])
        self._refresh_if_due(state, fold)

    def _refresh_if_due(self, state: State, fold: Fold) -> None:
        if fold.refresh and (self.at_once or not fold.first):
            self.refresh(state)

    def refresh(self, state: State) -> None:
        """Compute the roots of the present statistics; then rescale the history of later axes to them."""
        axes = self._axes(state)
        statistics = [state[f"factor_{axis}"] for axis in axes]
        new = ROOTINGS[self.root](self.damping).prepare_factors(statistics, 1, self.rooted(state))
        failed = new["failures"] > state["failures"]
        change = torch.ones_like(new["diagnosis"][:, 0, 0])  # (B,)
        for axis in axes:
            S, X = state[f"factor_{axis}"], new[f"root_{axis}"]
            damped = _damped(S, new["diagnosis"][:, axis, RIDGE])
            S.mul_(for_members(change, S))
            if (before := state.get(f"rooted_{axis}")) is not None:
                change = torch.where(failed, 1.0, change * _overlap(X, before))
                before.copy_(torch.where(for_members(failed, S), before, damped))
        for name, value in new.items():
            state[name].copy_(value)

    def _axes(self, state: State) -> range:
        return range(sum(name.startswith("root_") for name in state))

    def to_dense(self, state: State) -> Tensor:
        """``C`` as of the last refresh, with the ridge; the identity before the first.  # (B, P, P)"""
        return kronecker_product(self._covariances(state))

    def matvec(self, state: State, v: Tensor) -> Tensor:
        return apply_factors(self._covariances(state), self.unfold(v)).reshape(v.shape)

    def _covariances(self, state: State) -> list[Tensor]:
        """``X_k^-2``.  # each (B, d_k, d_k) or (B, d_k)"""
        roots = [state[f"root_{axis}"] for axis in self._axes(state)]
        inverses = [1 / X if X.ndim == 2 else torch.linalg.inv(X) for X in roots]
        return [R.square() if R.ndim == 2 else R @ R.mT for R in inverses]

    # ---------------------------------------------------------------- Rooted
    def rooted(self, state: State) -> State:
        """``X_k`` and the diagnosis of their last refresh.  # root_k: (B, d_k, d_k) or (B, d_k)"""
        return {name: x for name, x in state.items() if name.startswith("root_") or name in HELD}

    def unfold(self, g: Tensor) -> Tensor:
        """The gradient itself; a scalar parameter is a vector of length one.  # (B, d_1, ..., d_m)"""
        return g if g.ndim > 1 else g.unsqueeze(1)


def _damped(S: Tensor, ridge: Tensor) -> Tensor:
    """``S + ridge I``.  # (B, d, d) or (B, d), (B,)"""
    if S.ndim == 2:
        return S + ridge.unsqueeze(-1)
    return S + ridge[:, None, None] * torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)


def _overlap(X: Tensor, F: Tensor) -> Tensor:
    """``tr(X F X) / d``, which is one for ``X = F^(-1/2)``.  # (B,)"""
    if X.ndim == 2:
        return (X.square() * F).mean(-1)
    return ((F @ X) * X).sum((-2, -1)) / X.shape[-1]
