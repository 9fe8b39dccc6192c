"""Diagonals of the curvature from probes ``(v, H v)``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Evidence, Pair
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_choice
from gradmaker.representations.base import NO_LIMIT, Fold, Frame, Grain, Representation, average

__all__ = ["ProbeDiagonal"]


@dataclass(frozen=True)
class ProbeDiagonal(Representation):
    """A diagonal from probes: of ``|H|`` by the lengths of rows, ``sqrt(mean (H v)^2)``, or ``|diag H|``, ``|mean v * H v|``.

    The means are over all probes; ``E (H v)^2 = diag(H^2)``. ``signed`` takes the absolute value after averaging:
    ``E|v * H v|`` is larger than ``|E[v * H v]|``. ``spatial`` replaces ``|H v|`` by its mean over the kernel (axes from the
    third on) before the square. All probes of all micro-batches count, by their weight; without a decay all steps count alike.

    Reference: Dauphin, de Vries, Bengio, NeurIPS 2015, arXiv:1502.04390, eq. 10 (squares); Yao et al., AAAI 2021,
    arXiv:2006.00719, eq. 10 (kernels); Bekas, Kokiopoulou, Saad 2007 (signed).
    """

    takes: ClassVar[frozenset[Kind]] = kinds(Pair)
    inapplicable = NO_LIMIT

    statistic: Literal["squares", "signed"] = "squares"
    spatial: bool = False

    def __post_init__(self) -> None:
        check_choice("statistic", self.statistic, ("squares", "signed"))

    @property
    def grain(self) -> Grain:
        return "tensor"

    def init(self, frame: Frame) -> State:
        return {"diagonal": frame.zeros(*frame.shape), "mass": frame.zeros()}

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        assert isinstance(evidence, Pair)
        diagonal = state["diagonal"].mul_(fold.beta)
        if self.statistic == "signed":
            diagonal.add_(self._smooth(evidence.v * evidence.cv), alpha=fold.alpha)
        else:
            D = self._smooth(evidence.cv.abs())
            diagonal.addcmul_(D, D, value=fold.alpha)
        fold.weigh_mean_(state["mass"], 1.0)

    def _smooth(self, x: Tensor) -> Tensor:
        if not self.spatial or x.ndim < 4:
            return x
        return x.mean(tuple(range(3, x.ndim)), keepdim=True).expand_as(x)

    def diagonal(self, state: State) -> Tensor:
        """The diagonal.  # (B, *shape)"""
        mean = average(state["diagonal"], state["mass"])
        return mean.abs() if self.statistic == "signed" else mean.sqrt()

    def to_dense(self, state: State) -> Tensor:
        d = self.diagonal(state)
        return torch.diag_embed(d.reshape(d.shape[0], -1))

    def matvec(self, state: State, v: Tensor) -> Tensor:
        return self.diagonal(state) * v
