"""K-BFGS's statistic: for each layer the inverses of an input and an output factor, by BFGS updates, never factorised.

``H_a`` (i, i) of the inputs' second moment, ``H_g`` (o, o) of the pre-activation Hessian, ``R`` sharing positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradmaker.capture.one_hot import OneHot
from gradmaker.curvature.evidence import Evidence, Outer, Pair
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.linalg.eigen import add_ridge, symmetrise
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.inner_products import member_dots
from gradmaker.linalg.mode_products import kronecker_product
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_choice, check_count, check_interval
from gradmaker.representations.base import Fold, Frame, Grain, average
from gradmaker.representations.memory import multiply, push, unfilled
from gradmaker.representations.roles import Compact, PreconditionsRows, Snapshots

__all__ = ["KronPairs", "bfgs_update_", "double_damping"]

SMALLEST = 1e-4
"""Least ``s^T y / (s^T s |y|)`` of a pair; others are skipped."""
UNDER_WAY = ("inputs", "counted", "examples")
"""Sums over the step that is under way: of inputs, of positions and of examples."""
WRITTEN = (*UNDER_WAY, "begun", "refused")
"""What the update by the pair of the inputs changes besides ``H_a``."""


def bfgs_update_(H: Tensor, s: Tensor, y: Tensor, accepted: Tensor) -> None:
    """``H <- (I - r s y^T) H (I - r y s^T) + r s s^T``, ``r = 1 / s^T y``, for the ``accepted`` members.

    As ``H + s u^T + u s^T``, ``u = (r^2 y^T H y + r) s / 2 - r H y``, which keeps a symmetric matrix exactly symmetric.

    Reference: Nocedal, Wright 2006, eq. 6.17.  # (B, d, d), (B, d), (B, d), (B,)
    """
    r = torch.where(accepted, 1 / member_dots(s, y).squeeze(1), 0.0)[:, None, None]
    s, y = (torch.where(accepted.unsqueeze(1), x, 0.0).unsqueeze(-1) for x in (s, y))
    Hy = H @ y
    u = (r * r * (y.mT @ Hy) + r) / 2 * s - r * Hy
    cross = s @ u.mT
    H.add_(cross + cross.mT)


def double_damping(s: Tensor, y: Tensor, Hy: Tensor, least: float, floor: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """``s^T y >= least y^T H y`` by moving ``s`` towards ``H y``, then ``s^T y >= floor s^T s`` by moving ``y`` towards ``s``.

    ``form``: ``powell`` moves ``y`` where the second bound is violated, ``shift`` always adds ``floor s`` to it. No move
    towards ``s`` reaches a floor above one: there ``powell`` moves ``y`` towards ``floor s``.

    Reference: Goldfarb, Ren, Bahamou, NeurIPS 2020, arXiv:2006.08877, section 4.2.  # s, y, Hy: (B, d); floor: (B,)
    """
    sy, yHy = member_dots(s, y), member_dots(y, Hy)
    share = torch.where(sy < least * yHy, (1 - least) * yHy / (yHy - sy), 1.0)
    s = share * s + (1 - share) * Hy
    sy, ss, low = member_dots(s, y), member_dots(s, s), floor.unsqueeze(1)
    if form == "shift":
        return s, y + low * s
    goal = low.clamp(min=1)
    share = torch.where(sy < low * ss, (goal - low) * ss / (goal * ss - sy), 1.0)
    return s, share * y + (1 - share) * goal * s


@dataclass(frozen=True)
class KronPairs(Compact, PreconditionsRows, Snapshots):
    """A preconditioner ``P G = H_g G H_a`` of BFGS matrices.

    ``H_a`` approximates the inverse of ``A + sqrt(damping R)``, ``A`` the average of ``sum_r mean_n a a^T``, and starts at the
    exact inverse of the first: each step updates it by the pair ``s = H_a mean(a)``, ``y = A_damped s`` (Hessian action), over
    all positions that its micro-batches counted. That update is made when the step is over: in a `snapshot`, and in the
    statistic when the next step begins. ``H_g`` starts at ``I`` and is updated by averages, with ``memory_decay``, of the
    layer's secants, doubly damped: ``s^T y >= 0.2 y^T H_g y`` and ``s^T y >= sqrt(damping / R) s^T s``.

    With ``pairs`` ``H_g`` is held as that many pairs, from ``I``, and so is ``H_a`` with ``limited="both"``. In ``C`` the
    damping is that of the product.

    Reference: Goldfarb, Ren, Bahamou, NeurIPS 2020, arXiv:2006.08877, algorithm 1; the authors' code (averages, limits).
    """

    takes: ClassVar[frozenset[Kind]] = kinds((Outer, "with_secants"), (Pair, "output_secant"))

    damping: float = 0.3
    pairs: int | None = None
    limited: Literal["outputs", "both"] = "outputs"
    memory_decay: float = 0.9
    least: float = 0.2
    form: Literal["powell", "shift"] = "powell"

    def __post_init__(self) -> None:
        check_interval("damping", self.damping, 0, inf)
        if self.pairs is not None:
            check_count("pairs", self.pairs, 1, hint=", or None for whole matrices")
        check_choice("limited", self.limited, ("outputs", "both"))
        for name in ("memory_decay", "least"):
            check_interval(name, getattr(self, name), 0, 1, closed=True)
        check_choice("form", self.form, ("powell", "shift"))

    @property
    def grain(self) -> Grain:
        return "layer"

    def largest_side(self, shape: tuple[int, ...]) -> int:
        """The longer side: a BFGS matrix has no diagonal form."""
        return max(shape)

    def init(self, frame: Frame) -> State:
        o, i = frame.shape
        state = {"A": frame.zeros(i, i), "A_mass": frame.zeros(), "positions": frame.zeros() + 1}
        state |= {"step": frame.zeros(o), "change": frame.zeros(o), "refused": frame.zeros(), "begun": frame.zeros()}
        state |= {"inputs": frame.zeros(i), "counted": frame.zeros(), "examples": frame.zeros()}  # of the step under way
        for name, d in (("left", o), ("right", i)):
            if not self._limits(name):
                state[name] = frame.unit(d)
            else:
                state |= {f"{name}_{key}": x for key, x in unfilled(frame, self.pairs or 0, d).items()}
        return state

    def _limits(self, side: str) -> bool:
        """Whether the matrix of a side is held as pairs."""
        return self.pairs is not None and (side == "left" or self.limited == "both")

    # ---------------------------------------------------------------- updates
    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        if isinstance(evidence, Outer):
            self._fold_inputs(state, evidence, fold)
        else:
            assert isinstance(evidence, Pair)
            self._fold_secant(state, evidence.v, evidence.cv)

    def _fold_inputs(self, state: State, evidence: Outer, fold: Fold) -> None:
        assert not isinstance(evidence.inputs, OneHot)
        if fold.mass > 0:  # the first evidence of a step
            self._update_inputs_(state)
        n, R = evidence.inputs.shape[1:3]
        state["examples"].add_(n)
        state["positions"].add_((R - state["positions"]) * n / state["examples"].clamp(min=1))
        evidence.add_input_moment_(state["A"], fold.beta, fold.share * R)
        fold.weigh_mean_(state["A_mass"], evidence.counted)
        state["inputs"].add_(evidence.total())
        state["counted"].add_(evidence.counted)

    def _update_inputs_(self, state: State) -> None:
        """Update by the inputs' pair of the step that is over, for members with counted positions, and reset its sums."""
        due = state["counted"] > 0
        first = due & (state["begun"] == 0)
        if not self._limits("right") and not bool((~first).all()):  # a host read: cheaper than an inverse a step
            begun = torch.cholesky_inverse(torch.linalg.cholesky_ex(symmetrise(self._damped_input(state)))[0])
            state["right"].copy_(torch.where(first[:, None, None], symmetrise(begun), state["right"]))
        a = average(state["inputs"], state["counted"])
        s = self._inverse(state, "right", a.unsqueeze(-1)).squeeze(-1)
        y = average((state["A"] @ s.unsqueeze(-1)).squeeze(-1), state["A_mass"])
        self._push(state, "right", s, y + self._input_ridge(state).unsqueeze(1) * s, due)
        state["begun"].masked_fill_(due, 1.0)
        for name in UNDER_WAY:
            state[name].zero_()

    def snapshot(self, state: State) -> State:
        """The statistic after the update by the inputs that were measured last."""
        if not all(name in state for name in UNDER_WAY):
            return dict(state)  # it is one already
        own = {k: v.clone() if k.startswith("right") or k in WRITTEN else v for k, v in state.items()}
        self._update_inputs_(own)
        return {k: v for k, v in own.items() if k not in UNDER_WAY}

    def _fold_secant(self, state: State, s: Tensor, y: Tensor) -> None:
        for name, new in (("step", s), ("change", y)):
            finite = torch.isfinite(new).all(1, keepdim=True) & torch.isfinite(s + y).all(1, keepdim=True)
            state[name].copy_(torch.where(finite, state[name].lerp(new, 1 - self.memory_decay), state[name]))
        s, y = state["step"], state["change"]
        floor = (self.damping / state["positions"]).sqrt()
        Hy = self._inverse(state, "left", y.unsqueeze(-1)).squeeze(-1)
        damped = double_damping(s, y, Hy, self.least, floor, self.form)
        self._push(state, "left", *damped, torch.ones_like(floor, dtype=torch.bool))

    def _push(self, state: State, side: str, s: Tensor, y: Tensor, due: Tensor) -> None:
        """Update the members that are due, where the curvature along ``s`` is finite and far enough from zero."""
        sy = member_dots(s, y)
        limit = SMALLEST * member_dots(s, s) * torch.linalg.vector_norm(y, dim=-1, keepdim=True) if side == "left" else 0 * sy
        accepted = ((sy > limit) & torch.isfinite(1 / sy)).squeeze(1)
        accepted = accepted & due
        state["refused"].add_(due & ~accepted)
        if not self._limits(side):
            bfgs_update_(state[side], s, y, accepted)
            return
        push(_pairs(state, side), s, y, accepted)

    def _damped_input(self, state: State) -> Tensor:
        """``A + sqrt(damping R) I``.  # (B, i, i)"""
        return add_ridge(average(state["A"], state["A_mass"]), self._input_ridge(state))

    def _input_ridge(self, state: State) -> Tensor:
        """``sqrt(damping R)``.  # (B,)"""
        return (self.damping * state["positions"]).sqrt()

    # ---------------------------------------------------------------- P and C
    def _inverse(self, state: State, side: str, X: Tensor) -> Tensor:
        """``H X``.  # (B, d, c)"""
        if not self._limits(side):
            return state[side] @ X
        return multiply(_pairs(state, side), torch.ones_like(X[:, 0, 0]), X)

    def apply(self, state: State, g: Tensor) -> Tensor:
        """``H_g G H_a``.  # (B, o, i)"""
        state = self.snapshot(state)
        return self._inverse(state, "right", self._inverse(state, "left", g).mT).mT

    def apply_rows(self, state: State, rows: FactoredGradient) -> FactoredGradient:
        state = self.snapshot(state)
        sides = zip(("left", "right"), (rows.g, rows.a), strict=True)
        return FactoredGradient(*(self._inverse(state, side, x.mT).mT for side, x in sides))

    def to_dense(self, state: State) -> Tensor:
        state = self.snapshot(state)
        return kronecker_product([torch.linalg.inv(self._formed(state, side)) for side in ("left", "right")])

    def matvec(self, state: State, v: Tensor) -> Tensor:
        state = self.snapshot(state)
        x = torch.linalg.solve(self._formed(state, "left"), v)
        image: Tensor = torch.linalg.solve(self._formed(state, "right"), x.mT).mT
        return image

    def _formed(self, state: State, side: str) -> Tensor:
        """``H`` as a matrix.  # (B, d, d)"""
        if not self._limits(side):
            return state[side]
        S = _pairs(state, side)["s"]
        eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device).expand(len(S), -1, -1)
        return symmetrise(self._inverse(state, side, eye))


def _pairs(state: State, side: str) -> State:
    """The pairs of one side, named as in `gradmaker.representations.memory`."""
    return {name: state[f"{side}_{name}"] for name in ("s", "y", "products", "newest")}
