"""The diagonal of the curvature: one number for each parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Evidence, Gradient, Outer
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.curvature.products import Product
from gradmaker.linalg.matrix_from_products import form_diagonal
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_choice
from gradmaker.representations.base import NO_LIMIT, Fold, Frame, Grain, average
from gradmaker.representations.roles import Additive

__all__ = ["Diagonal"]


@dataclass(frozen=True)
class Diagonal(Additive):
    """The diagonal of ``C``: ``d = sum_N J_N * J_N``.

    Of examples (``granularity="layer"``) it is the diagonal of a Fisher matrix, of mini-batch gradients (``"tensor"``) the
    second moment of AdaGrad and Adam.

    Reference: Duchi, Hazan, Singer, JMLR 2011, section 1.1; Kingma, Ba, ICLR 2015, arXiv:1412.6980, algorithm 1.
    """

    takes: ClassVar[frozenset[Kind]] = kinds(Outer, Gradient, Product)
    inapplicable = NO_LIMIT

    granularity: Literal["tensor", "layer"] = "tensor"

    def __post_init__(self) -> None:
        check_choice("granularity", self.granularity, ("tensor", "layer"))

    @property
    def grain(self) -> Grain:
        return self.granularity

    def init(self, frame: Frame) -> State:
        return {"diagonal": frame.zeros(*frame.shape), "mass": frame.zeros()}

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        diagonal = state["diagonal"].mul_(fold.beta)
        if isinstance(evidence, Gradient):
            diagonal.addcmul_(evidence.gradient, evidence.gradient, value=fold.alpha)
        elif isinstance(evidence, Product):
            diagonal.add_(form_diagonal(evidence.matvec, diagonal), alpha=fold.alpha)
        else:
            assert isinstance(evidence, Outer)
            diagonal.add_(evidence.squares(), alpha=fold.alpha)
        fold.weigh_(state["mass"])

    def diagonal(self, state: State) -> Tensor:
        """The diagonal, bias-corrected.  # (B, *shape)"""
        return average(state["diagonal"], state["mass"])

    def to_dense(self, state: State) -> Tensor:
        d = self.diagonal(state)
        return torch.diag_embed(d.reshape(d.shape[0], -1))

    def matvec(self, state: State, v: Tensor) -> Tensor:
        return self.diagonal(state) * v
