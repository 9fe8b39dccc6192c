"""Dense blocks: the curvature matrix itself, of the model, a layer or a unit."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

from torch import Tensor

from gradmaker.curvature.evidence import Evidence, Gradient, Joint, Outer
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.curvature.products import Product
from gradmaker.linalg.matrix_from_products import form_blocks
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_choice
from gradmaker.representations.base import Fold, Frame, Grain, average
from gradmaker.representations.roles import Additive, WholeLayers

__all__ = ["Dense"]


@dataclass(frozen=True)
class Dense(WholeLayers, Additive):
    """The whole matrix of every block, ``C = sum_N vec(J_N) vec(J_N)^T``.

    ``full`` is the exact natural gradient; ``layer`` its block diagonal, with one block for all groups of a convolution and all
    channels of a norm layer; ``unit`` has one block for each output unit.

    Reference: Amari, Neural Computation 1998, 10(2); for units Ollivier, Information and Inference 2015, arXiv:1303.0818.
    """

    takes: ClassVar[frozenset[Kind]] = kinds(Outer, Joint, Gradient, Product)

    granularity: Literal["full", "layer", "unit"] = "layer"

    def __post_init__(self) -> None:
        check_choice("granularity", self.granularity, ("full", "layer", "unit"))

    @property
    def grain(self) -> Grain:
        return self.granularity

    def init(self, frame: Frame) -> State:
        P = prod(frame.shape)
        return {"matrix": frame.zeros(P, P), "mass": frame.zeros()}

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        matrix = state["matrix"]
        fold.weigh_(state["mass"])
        if isinstance(evidence, Product):
            matrix.mul_(fold.beta).add_(form_blocks(evidence.matvec, matrix), alpha=fold.alpha)
            return
        rows = evidence.rows()
        # With units, the G o members of this slice are the rows of G groups: one reshape serves every granularity.
        J = rows.reshape(rows.shape[0], *matrix.shape[:2]).transpose(0, 1)  # (B, N, P)
        matrix.baddbmm_(J.mT, J, beta=fold.beta, alpha=fold.alpha)

    def to_dense(self, state: State) -> Tensor:
        return average(state["matrix"], state["mass"])

    def matvec(self, state: State, v: Tensor) -> Tensor:
        product = state["matrix"] @ v.reshape(v.shape[0], -1, 1)
        return average(product, state["mass"]).reshape(v.shape)

    # ---------------------------------------------------------------- Factored: one factor
    def factors(self, state: State) -> list[Tensor]:
        """The matrix, bias-corrected.  # [(B, P, P)]"""
        return [self.to_dense(state)]

    def unfold(self, g: Tensor) -> Tensor:
        """The gradient as a vector.  # (B, P)"""
        return g.reshape(g.shape[0], -1)

    def order(self, factors: int) -> float:
        """One: the factor is ``C``."""
        return 1
