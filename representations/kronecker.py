"""Kronecker factors: of the inputs and outputs of a layer (KF-io), or one for each axis of a tensor (KF-dim).

A factor is a matrix (B, d, d), its diagonal (B, d), or tiled, see `gradmaker.linalg.factors`. ``vec`` is row-major
everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradmaker.capture.one_hot import OneHot
from gradmaker.curvature.evidence import Evidence, Gradient, Outer
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.curvature.products import Factors
from gradmaker.curvature.tied import Tied
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.factors import blocks, tile_width
from gradmaker.linalg.mode_products import add_product_, apply_factors, kronecker_product, mode_matrix
from gradmaker.linalg.nearest_product import nearest_product
from gradmaker.linalg.state import State
from gradmaker.linalg.writes import Writer, at_once
from gradmaker.options.checks import check_choice, check_interval
from gradmaker.representations.base import Fold, Frame, Grain, average, settle
from gradmaker.representations.roles import Additive, ByExample, FactoredAxes, FoldsLast, FoldsMoments, FoldsRows

__all__ = ["Kron", "KronDims"]


def _allocate(frame: Frame, axis: int, size: int, longest: int | None = None) -> Tensor:
    return frame.zeros(size) if axis in frame.diagonal else frame.zeros(size, tile_width(size, longest))


@dataclass(frozen=True)
class Kron(FactoredAxes, ByExample, FoldsMoments, FoldsLast, Additive):
    """K-FAC's factors of a layer: ``C ~ B (x) A``, ``B = sum_knr g g^T``, ``A = mean_nr a a^T``.

    ``sharing`` says how weight-sharing positions ``r`` enter: ``expand`` counts each as an example, ``reduce`` first averages
    the inputs and sums the gradients of an example. One-hot inputs stay expanded, so that ``A`` stays diagonal.
    ``wide_sides`` says what is held of the factor of a side over ``max_dim``: its diagonal, or blocks of at most that size.

    A table (V, d) that is looked up and is the weight of a head too has factors of both uses, those of the embedding
    ``A_1 (x) B_1`` and those of the head ``B_2 (x) A_2``, and ``C`` is the Kronecker product that is nearest to their sum.

    Reference: Martens, Grosse, ICML 2015, arXiv:1503.05671, eq. 16; Eschenhagen et al., NeurIPS 2023, arXiv:2311.00636. The
    sum for tied tables is our own; Van Loan & Pitsianis 1993 (nearest product).
    """

    takes: ClassVar[frozenset[Kind]] = kinds(Outer, Factors, (Outer, "inputs"), Tied)

    folds_twice: ClassVar[bool] = False  # a Cholesky factorisation takes two folds' time, and a decomposition twenty
    sharing: Literal["expand", "reduce"] = "expand"
    wide_sides: Literal["diagonal", "blocks"] = "diagonal"

    def __post_init__(self) -> None:
        check_choice("sharing", self.sharing, ("expand", "reduce"))
        check_choice("wide_sides", self.wide_sides, ("diagonal", "blocks"))

    @property
    def grain(self) -> Grain:
        return "layer"

    @property
    def groups(self) -> bool:
        return self.sharing == "reduce"

    def long_axes(self, shape: tuple[int, ...], max_dim: int) -> frozenset[int]:
        """The sides over ``max_dim``; none with blocks, which tile them instead."""
        return frozenset() if self.wide_sides == "blocks" else super().long_axes(shape, max_dim)

    def init(self, frame: Frame) -> State:
        rows, columns = frame.shape
        longest = frame.longest if self.wide_sides == "blocks" else None
        factors = {"left": _allocate(frame, 0, rows, longest), "right": _allocate(frame, 1, columns, longest)}
        own = {**factors, "left_mass": frame.zeros(), "right_mass": frame.zeros()}
        if not frame.tied:
            return own
        lookups = {"left": frame.zeros(rows), "right": torch.zeros_like(factors["right"])}  # one-hot: a diagonal
        masses = {"left_mass": frame.zeros(), "right_mass": frame.zeros()}
        return own | {f"lookup_{k}": v for k, v in (lookups | masses).items()}

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        if isinstance(evidence, Tied):
            fresh = any(part.fresh for part in evidence.parts)
            for part, own, inner in (
                (evidence.head, _of_heads(state), "right"),
                (evidence.lookup, _of_lookups(state), "left"),
            ):
                if part is not None:
                    self.fold(own, part, fold, at_once)
                else:
                    _fold_nothing(own, inner, fold, fresh)
            return
        self.fold(state, evidence, fold, at_once)

    def fold(self, state: State, evidence: Evidence | FactoredGradient, fold: Fold, write: Writer) -> None:
        """Fold the evidence of one use."""
        assert isinstance(evidence, (Outer, Factors))
        if self.sharing == "reduce" and isinstance(evidence, Outer) and not isinstance(evidence.inputs, OneHot):
            evidence = evidence.reduced()
        inner, outer = ("left", "right") if evidence.transposed else ("right", "left")
        inputs_alone = evidence.kind == "inputs"  # the identity is a mean too: it does not add up
        for rows, block in blocks(state[outer]):
            alpha = fold.share if inputs_alone else fold.alpha
            _of_outputs(evidence, rows).add_gradient_moment_(block, fold.beta, alpha, write)
        if inputs_alone:
            fold.weigh_mean_(state[f"{outer}_mass"], evidence.counted, write)
        else:
            fold.weigh_(state[f"{outer}_mass"], write)
        if evidence.fresh:
            for rows, block in blocks(state[inner]):
                _of_inputs(evidence, rows).add_input_moment_(block, fold.beta, fold.share, write)
            fold.weigh_mean_(state[f"{inner}_mass"], evidence.counted, write)

    def settle(self, state: State) -> None:
        for mass in (name for name in state if name.endswith("_mass")):
            settle(state[mass.removesuffix("_mass")], state[mass])

    def to_dense(self, state: State) -> Tensor:
        return kronecker_product(self.factors(state))

    def matvec(self, state: State, v: Tensor) -> Tensor:
        return apply_factors(self.factors(state), v)

    # ---------------------------------------------------------------- Factored: rows, then columns
    def factors(self, state: State) -> list[Tensor]:
        """The two factors, bias-corrected.  # (B, o, o), (B, i, i)"""
        if "lookup_left" not in state:
            return _averages(state)
        lookup, head = (_averages(own) for own in (_of_lookups(state), _of_heads(state)))
        return nearest_product((lookup[0], lookup[1]), (head[0], head[1]))

    def unfold(self, g: Tensor) -> Tensor:
        """The gradient itself.  # (B, o, i)"""
        return g

    def order(self, factors: int) -> float:
        """One: ``C`` is the product of the factors."""
        return 1


def _averages(state: State) -> list[Tensor]:
    return [average(state[side], state[f"{side}_mass"]) for side in ("left", "right")]


def _of_lookups(state: State) -> State:
    """The factors of a tied table as an embedding: views."""
    return {k.removeprefix("lookup_"): v for k, v in state.items() if k.startswith("lookup_")}


def _of_heads(state: State) -> State:
    """The factors of a tied table as a head: views."""
    return {k: v for k, v in state.items() if not k.startswith("lookup_")}


def _fold_nothing(state: State, inner: str, fold: Fold, fresh: bool) -> None:
    """Fold a use that a pass did not make: no curvature, and no positions.  inner: the side of the inputs"""
    outer = "left" if inner == "right" else "right"
    state[outer].mul_(fold.beta)
    fold.weigh_(state[f"{outer}_mass"])
    if fresh:
        state[inner].mul_(fold.beta)
        fold.weigh_mean_(state[f"{inner}_mass"], 0)


def _of_outputs(evidence: Outer | Factors, rows: slice) -> Outer | Factors:
    """The evidence of a slice of the outputs."""
    if isinstance(evidence, Factors):
        return replace(evidence, B=_cut(evidence.B, rows))
    return replace(evidence, gradients=evidence.gradients[..., rows])


def _of_inputs(evidence: Outer | Factors, rows: slice) -> Outer | Factors:
    """The evidence of a slice of the inputs; the bias is the last input."""
    if isinstance(evidence, Factors):
        return replace(evidence, A=_cut(evidence.A, rows))
    if isinstance(evidence.inputs, OneHot):  # a diagonal, which is never tiled
        return evidence
    if rows == slice(0, evidence.inputs.shape[-1] + evidence.bias):
        return evidence
    kept = evidence.inputs[..., rows]
    return replace(evidence, inputs=kept, bias=evidence.bias and rows.stop > evidence.inputs.shape[-1])


def _cut(F: Tensor, rows: slice) -> Tensor:
    """A block of a factor, or a slice of its diagonal.  # (G, d, d) or (G, d)"""
    return F[:, rows, rows] if F.ndim == 3 else F[:, rows]


@dataclass(frozen=True)
class KronDims(FactoredAxes, FoldsRows, FoldsLast):
    """Shampoo's factors, one for each axis: ``H_k = sum mat_k(G) mat_k(G)^T`` and ``C ~ (H_1 (x) ... (x) H_m)^(1/m)``.

    ``C = L (x) R / tr(L)`` (``exponent=1, balanced``) fits a covariance that is a Kronecker product better.

    Reference: Gupta, Koren, Singer, ICML 2018, arXiv:1802.09568, algorithm 2 and lemma 8; Morwani et al., 2024,
    arXiv:2406.17748 (exponent 1).
    """

    takes: ClassVar[frozenset[Kind]] = kinds(Gradient)

    exponent: float | None = None
    """Exponent of each factor in ``C``; None: ``1/m``. Shampoo's exponents are minus half of it."""
    balanced: bool = False
    """Whether ``C`` is divided by ``tr(H)^(m exponent - 1)``, which gives it the scale of a covariance for any exponent."""

    def __post_init__(self) -> None:
        if self.exponent is not None:
            check_interval("exponent", self.exponent, 0, inf, hint=", or None")

    @property
    def grain(self) -> Grain:
        return "tensor"

    def init(self, frame: Frame) -> State:
        shape = frame.shape or (1,)
        factors = {f"factor_{axis}": _allocate(frame, axis, size) for axis, size in enumerate(shape)}
        return {**factors, "mass": frame.zeros()}

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        self.fold(state, evidence, fold, at_once)

    def update_rows(self, state: State, rows: FactoredGradient, fold: Fold) -> None:
        self.fold(state, rows, fold, at_once)

    def fold(self, state: State, evidence: Evidence | FactoredGradient, fold: Fold, write: Writer) -> None:
        for axis, (X, Y) in enumerate(self._halves(evidence)):
            add_product_(state[f"factor_{axis}"], X, Y, fold.beta, fold.alpha, write)
        fold.weigh_(state["mass"], write)

    def _halves(self, evidence: Evidence | FactoredGradient) -> Iterator[tuple[Tensor, Tensor]]:
        """Two matrices for each axis, whose product is the moment along it."""
        if isinstance(evidence, FactoredGradient):
            yield from (evidence.moment_halves(axis) for axis in (0, 1))
            return
        assert isinstance(evidence, Gradient)
        G = self.unfold(evidence.gradient)
        for axis in range(G.ndim - 1):
            x = mode_matrix(G, axis)
            yield x, x.mT

    def settle(self, state: State) -> None:
        for name in (name for name in state if name != "mass"):
            total, mass = state[name], state["mass"].clone()
            settle(total, mass)
        state["mass"].copy_(state["mass"] > 0)

    def to_dense(self, state: State) -> Tensor:
        return kronecker_product(self._roots(state))

    def matvec(self, state: State, v: Tensor) -> Tensor:
        return apply_factors(self._roots(state), self.unfold(v)).reshape(v.shape)

    def _roots(self, state: State) -> list[Tensor]:
        """``H_k^(1/m)``."""
        factors = self.factors(state)
        return [_root(H, self.order(len(factors))) for H in factors]

    # ---------------------------------------------------------------- Factored: one factor for each axis
    def factors(self, state: State) -> list[Tensor]:
        """The factors, bias-corrected.  # (B, d_k, d_k)"""
        axes = sum(name.startswith("factor_") for name in state)
        found = [average(state[f"factor_{axis}"], state["mass"]) for axis in range(axes)]
        return _balance(found, 1 - self.order(axes) / axes) if self.balanced else found

    def unfold(self, g: Tensor) -> Tensor:
        """The gradient itself; a scalar parameter is a vector of length one.  # (B, d_1, ..., d_m)"""
        return g if g.ndim > 1 else g.unsqueeze(1)

    def order(self, factors: int) -> float:
        """The number of axes, unless an exponent is given."""
        return factors if self.exponent is None else 1 / self.exponent


def _balance(factors: list[Tensor], share: float) -> list[Tensor]:
    """``H_k / tr(H_k)^share``: the traces of all ``H_k`` are equal, that of the covariance.  # (B, d_k, d_k) or (B, d_k)"""
    traces = [F.sum(-1) if F.ndim == 2 else F.diagonal(dim1=-2, dim2=-1).sum(-1) for F in factors]
    scales = [torch.where(t > 0, t, 1.0) ** share for t in traces]
    return [F / c.view(-1, *[1] * (F.ndim - 1)) for F, c in zip(factors, scales, strict=True)]


def _root(H: Tensor, order: float) -> Tensor:
    """``H^(1/order)`` of a positive semidefinite factor."""
    if order == 1:
        return H
    if H.ndim == 2:
        return torch.pow(H.clamp(min=0), 1 / order)
    try:
        s, Q = torch.linalg.eigh(H)
    except RuntimeError:  # float32 LAPACK may not converge on factors with many equal eigenvalues
        s, Q = (x.to(H.dtype) for x in torch.linalg.eigh(H.double()))
    root: Tensor = (Q * torch.pow(s.clamp(min=0), 1 / order).unsqueeze(-2)) @ Q.mT
    return root
