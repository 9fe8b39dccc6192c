"""One-sided factors: the second moment of a matrix's rows, the same for every column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Evidence, Gradient
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.mode_products import add_product_
from gradmaker.linalg.state import State
from gradmaker.linalg.writes import Writer, at_once
from gradmaker.representations.base import NEWEST_ALONE, Fold, Frame, Grain, average
from gradmaker.representations.roles import FactoredAxes, FoldsLast, FoldsRows, widen

__all__ = ["OneSided", "ZeroHistory"]


@dataclass(frozen=True)
class OneSided(FactoredAxes, FoldsRows):
    """One-sided Shampoo: ``C ~ L (x) I`` with ``L = sum G G^T``; ``G`` is a tensor with all axes but the first flattened.

    `gradmaker.capture.shapes.ShapePolicy` chooses which side is first. ``C <= r L (x) I`` holds for the true ``C``, with ``r``
    the largest rank of a gradient.

    Reference: Xie et al., 2025, arXiv:2502.10273 (one-sided Shampoo); An et al., 2025, arXiv:2503.20762 (ASGO).
    """

    takes: ClassVar[frozenset[Kind]] = kinds(Gradient)

    @property
    def grain(self) -> Grain:
        return "tensor"

    def init(self, frame: Frame) -> State:
        rows, *rest = frame.shape or (1,)
        factor = frame.zeros(rows) if 0 in frame.diagonal else frame.zeros(rows, rows)
        columns = torch.Size(rest).numel()
        return {"factor": factor, "columns": frame.zeros(columns, 0), "mass": frame.zeros()}  # an empty tensor keeps the size

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        assert isinstance(evidence, Gradient)
        G = self.unfold(evidence.gradient)
        add_product_(state["factor"], G, G.mT, fold.beta, fold.alpha)
        fold.weigh_(state["mass"])

    def update_rows(self, state: State, rows: FactoredGradient, fold: Fold) -> None:
        add_product_(state["factor"], *rows.moment_halves(0), fold.beta, fold.alpha)
        fold.weigh_(state["mass"])

    def to_dense(self, state: State) -> Tensor:
        (L,) = self.factors(state)
        return widen(self, state, torch.diag_embed(L) if L.ndim == 2 else L)

    def unfactored(self, state: State) -> int:
        """The number ``n`` of columns.  # of G: (d, n)"""
        return state["columns"].shape[1]

    def matvec(self, state: State, v: Tensor) -> Tensor:
        (L,) = self.factors(state)
        rows = self.unfold(v)
        return (L.unsqueeze(-1) * rows if L.ndim == 2 else L @ rows).reshape(v.shape)

    # ---------------------------------------------------------------- Factored: one factor
    def factors(self, state: State) -> list[Tensor]:
        """``L``, bias-corrected.  # [(B, d, d)]"""
        return [average(state["factor"], state["mass"])]

    def unfold(self, g: Tensor) -> Tensor:
        """The gradient as a matrix.  # (B, d, n)"""
        return g.reshape(len(g), *(g.shape[1:2] or (1,)), -1)

    def order(self, factors: int) -> float:
        """One: the factor is ``C``."""
        return 1


@dataclass(frozen=True)
class ZeroHistory(OneSided, FoldsLast):
    """``C = (G G^T) (x) I`` of the newest gradient: one-sided Shampoo without an average, whatever ``decay`` is.

    Reference: Bernstein, Newhouse 2024, "Old optimizer, new norm", arXiv:2409.20325, proposition 5.
    """

    inapplicable = NEWEST_ALONE

    def init(self, frame: Frame) -> State:
        """The newest gradient itself: a solver may need no matrix of its rows."""
        rows, *rest = frame.shape or (1,)
        wide = frame.zeros(int(0 in frame.diagonal), 0)  # an empty tensor keeps whether a factor is a diagonal
        return {"gradient": frame.zeros(rows, torch.Size(rest).numel()), "wide": wide}

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        self.fold(state, evidence, fold, at_once)

    def update_rows(self, state: State, rows: FactoredGradient, fold: Fold) -> None:
        self.fold(state, rows, fold, at_once)

    def fold(self, state: State, evidence: Evidence | FactoredGradient, fold: Fold, write: Writer) -> None:
        if isinstance(evidence, FactoredGradient):
            write(torch.bmm, evidence.g.mT, evidence.a, out=state["gradient"])
            return
        assert isinstance(evidence, Gradient)
        write(state["gradient"].copy_, self.unfold(evidence.gradient))

    def settle(self, state: State) -> None:
        """The newest gradient has no mass."""

    def unfactored(self, state: State) -> int:
        return state["gradient"].shape[2]

    def factors(self, state: State) -> list[Tensor]:
        G = state["gradient"]
        return [G.square().sum(-1) if state["wide"].shape[1] else self.newest(state)]

    def newest(self, state: State) -> Tensor:
        """``G G^T``.  # (B, d, d)"""
        G = state["gradient"]
        return G @ G.mT
