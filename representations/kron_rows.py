"""SKFAC's statistic: Kronecker factors of the newest batch, held as rows where these are fewer than the columns of a factor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradmaker.capture.one_hot import OneHot
from gradmaker.curvature.evidence import Evidence, Outer
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.linalg.mode_products import apply_factors, kronecker_product
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_choice, check_count
from gradmaker.representations.base import NEWEST_ALONE, NO_LIMIT, Fold, Frame, Grain, average
from gradmaker.representations.roles import ByExample, FactoredAxes, Unstacked

__all__ = ["KronRows"]


@dataclass(frozen=True)
class KronRows(FactoredAxes, ByExample, Unstacked):
    """`Kron`'s factors of the newest step alone: ``B = Y^T Y`` with the rows ``g``, ``A = X^T X`` with the rows ``a``.

    An average over steps would have many rows: ``decay`` has no effect. A factor with as many rows as columns is formed.
    ``reduction`` says how weight-sharing positions enter: ``sum`` takes the mean input and the summed gradient of an
    example (K-FAC-reduce: sums on both sides would be off by the square of the number of positions), ``subsample`` keeps
    ``positions`` of the counted ones, evenly spaced, to represent all of this example's, ``none`` keeps all (K-FAC-expand).

    Reference: Tang et al., CVPR 2021, "SKFAC: Training Neural Networks with Faster Kronecker-Factored Approximate Curvature".
    There the positions are drawn; a representation draws no random numbers.
    """

    takes: ClassVar[frozenset[Kind]] = kinds(Outer, (Outer, "inputs"))
    inapplicable = NEWEST_ALONE | NO_LIMIT

    reduction: Literal["sum", "subsample", "none"] = "sum"
    positions: int = 16
    """Positions that ``subsample`` keeps of an example."""
    wide_sides: Literal["rows", "diagonal"] = "rows"
    """Whether a side over ``max_dim`` is held by its rows all the same, or as a diagonal, as by `Kron`."""

    def __post_init__(self) -> None:
        check_choice("wide_sides", self.wide_sides, ("rows", "diagonal"))
        check_choice("reduction", self.reduction, ("sum", "subsample", "none"))
        check_count("positions", self.positions, 1)
        if self.wide_sides == "diagonal":
            object.__setattr__(self, "inapplicable", NEWEST_ALONE)

    @property
    def grain(self) -> Grain:
        return "layer"

    @property
    def groups(self) -> bool:
        return self.reduction != "none"

    def duplicate(self, state: State) -> State:
        """The same tensors: they are replaced, never written to."""
        return dict(state)

    def long_axes(self, shape: tuple[int, ...], max_dim: int) -> frozenset[int]:
        """None where rows serve long axes."""
        return frozenset() if self.wide_sides == "rows" else super().long_axes(shape, max_dim)

    def init(self, frame: Frame) -> State:
        names = zip(("left", "right"), frame.shape, strict=True)
        sides = {
            (f"{side}_diagonal" if axis in frame.diagonal else f"{side}_rows"): (
                frame.zeros(size) if axis in frame.diagonal else frame.zeros(0, size)
            )
            for axis, (side, size) in enumerate(names)
        }
        return {**sides, "left_mass": frame.zeros(), "right_mass": frame.zeros()}

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        assert isinstance(evidence, Outer)
        if fold.mass > 0:  # the first evidence of a step
            _drop_previous(state)
        evidence = self._reduced(evidence)
        inner, outer = ("left", "right") if evidence.transposed else ("right", "left")
        if evidence.kind == "inputs":
            _add_identity(state, outer, fold.share * evidence.counted)
        else:
            g = evidence.gradients.transpose(0, 1)  # (G, k, n, r, o)
            rows = g.reshape(len(g), -1, g.shape[-1])
            _append(state, outer, rows if fold.alpha == 1.0 else rows * fold.alpha**0.5)
            state[f"{outer}_mass"] = state[f"{outer}_mass"] + fold.mass
        if evidence.fresh:
            self._add_inputs(state, inner, evidence, fold.share)

    def _add_inputs(self, state: State, side: str, evidence: Outer, share: float) -> None:
        if isinstance(evidence.inputs, OneHot):
            state[f"{side}_diagonal"] = state[f"{side}_diagonal"].clone()
            evidence.add_input_moment_(state[f"{side}_diagonal"], 1.0, share)
        else:
            rows = _input_rows(evidence, evidence.inputs)
            _append(state, side, rows if share == 1.0 else rows * share**0.5)
        state[f"{side}_mass"] = state[f"{side}_mass"] + share * evidence.counted

    def _reduced(self, evidence: Outer) -> Outer:
        if isinstance(evidence.inputs, OneHot) or self.reduction == "none":
            return evidence
        if self.reduction == "sum":
            return evidence.reduced()
        return evidence if self.positions >= evidence.inputs.shape[2] else _subsample(evidence, evidence.inputs, self.positions)

    def to_dense(self, state: State) -> Tensor:
        return kronecker_product(self.factors(state))

    def matvec(self, state: State, v: Tensor) -> Tensor:
        return apply_factors(self.factors(state), v)

    # ---------------------------------------------------------------- RowFactored and Factored: rows, then columns
    def rows(self, state: State) -> list[tuple[Tensor, Tensor] | None]:
        """The rows of ``B`` and of ``A`` with their mass; None for a factor that is formed or diagonal.

        # (B, n, o), (B,) and (B, n, i), (B,)
        """
        found = []
        for side in ("left", "right"):
            X, mass = state.get(f"{side}_rows"), state[f"{side}_mass"]
            found.append(None if X is None else (X, torch.where(mass > 0, mass, 1.0)))
        return found

    def factor(self, state: State, axis: int) -> Tensor:
        """``B`` or ``A``, formed.  # (B, d, d), or (B, d) when diagonal"""
        side = ("left", "right")[axis]
        if (X := state.get(f"{side}_rows")) is not None:
            return average(X.mT @ X, state[f"{side}_mass"])
        held = next(state[f"{side}_{form}"] for form in ("factor", "diagonal") if f"{side}_{form}" in state)
        return average(held, state[f"{side}_mass"])

    def factors(self, state: State) -> list[Tensor]:
        """Both factors, formed.  # (B, o, o), (B, i, i)"""
        return [self.factor(state, 0), self.factor(state, 1)]

    def unfold(self, g: Tensor) -> Tensor:
        """The gradient itself.  # (B, o, i)"""
        return g

    def order(self, factors: int) -> float:
        """One: ``C`` is the product of the factors."""
        return 1


def _drop_previous(state: State) -> None:
    """Drop the factors of the previous step."""
    for side in ("left", "right"):
        held = next(state.pop(f"{side}_{form}") for form in ("rows", "factor", "diagonal") if f"{side}_{form}" in state)
        diagonal = held.ndim == 2
        state[f"{side}_diagonal" if diagonal else f"{side}_rows"] = torch.zeros_like(held) if diagonal else held[:, :0]
        state[f"{side}_mass"] = torch.zeros_like(state[f"{side}_mass"])


def _subsample(evidence: Outer, inputs: Tensor, most: int) -> Outer:
    """At most ``most`` of the ``c`` counted positions of an example, evenly spaced: each of ``k`` has the weight ``c / k``."""
    _, n, R, _ = inputs.shape
    w = inputs.new_ones(n, R) if evidence.weights is None else evidence.weights.to(inputs)
    c = w.sum(1, keepdim=True)  # (n, 1)
    k = c.clamp(max=most)
    order = w.argsort(dim=1, descending=True, stable=True)  # counted positions first, in their order
    j = torch.arange(most, dtype=w.dtype, device=w.device)
    at = (j * (c - 1) / (k - 1).clamp(min=1)).round().clamp(0, R - 1).long()
    kept = order.gather(1, at)  # (n, k)
    weights = torch.where(j < k, c / k.clamp(min=1), 0.0)
    rows = torch.arange(n, device=w.device).unsqueeze(1)
    gradients = evidence.gradients[:, :, rows, kept] * weights.sqrt().to(evidence.gradients).unsqueeze(-1)
    return replace(evidence, inputs=inputs[:, rows, kept], gradients=gradients, weights=weights)


def _add_identity(state: State, side: str, share: float | Tensor) -> None:
    """Add ``share I``, which is a mean over positions as the inputs' factor is: a diagonal, without rows."""
    rows = state.pop(f"{side}_rows", None)
    state[f"{side}_diagonal"] = (state[f"{side}_diagonal"] if rows is None else rows.sum(1)) + share
    state[f"{side}_mass"] = state[f"{side}_mass"] + share


def _append(state: State, side: str, rows: Tensor) -> None:
    """Add rows to a factor, which is formed once it has as many rows as columns; or to a diagonal."""
    if (diagonal := state.get(f"{side}_diagonal")) is not None:
        state[f"{side}_diagonal"] = diagonal + rows.square().sum(1)
        return
    if f"{side}_factor" in state:
        state[f"{side}_factor"] = state[f"{side}_factor"] + rows.mT @ rows
        return
    held = state.pop(f"{side}_rows")
    rows = torch.cat([held, rows], 1) if held.shape[1] else rows.contiguous()  # as a loaded one is
    formed = rows.shape[1] >= rows.shape[2]
    state[f"{side}_factor" if formed else f"{side}_rows"] = rows.mT @ rows if formed else rows


def _input_rows(evidence: Outer, inputs: Tensor) -> Tensor:
    """``X`` with ``X^T X = sum_nr a a^T`` over the counted positions, the bias as the last column.  # (G, n r, i)"""
    G, n, R, i = inputs.shape
    X = inputs.reshape(G, n * R, i)
    if evidence.bias:
        X = torch.cat([X, X.new_ones(G, n * R, 1)], -1)
    if evidence.weights is None:
        return X
    return X * evidence.weights.reshape(1, n * R, 1).to(X).sqrt()
