"""The weights of the newest gradient, for methods that need nothing else of the curvature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Evidence, Gradient
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.linalg.state import State
from gradmaker.representations.base import NEWEST_ALONE, NO_LIMIT, Fold, Frame, Grain
from gradmaker.representations.capabilities import Multiplies
from gradmaker.representations.roles import Compact, PerStep

__all__ = ["Placed", "Position"]

_NOW = "the weights change with every step, and so does what is measured of them"


@runtime_checkable
class Placed(Multiplies, Protocol):
    """The weights at which the gradient was taken."""

    def weights(self, state: State) -> Tensor:
        """All weights as one vector.  # (1, P)"""


@dataclass(frozen=True)
class Position(PerStep, Compact):
    """The weights of the newest gradient, as one vector. Nothing is held of ``C``: `to_dense` is ``I``."""

    takes: ClassVar[frozenset[Kind]] = kinds((Gradient, "located"))
    inapplicable = (
        NEWEST_ALONE | NO_LIMIT | dict.fromkeys(("curvature_interval", "preconditioner_interval", "warmup_steps"), _NOW)
    )

    @property
    def grain(self) -> Grain:
        return "full"

    def init(self, frame: Frame) -> State:
        return {"weights": frame.zeros(*frame.shape)}

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        if not isinstance(evidence, Gradient) or evidence.weights is None:
            raise TypeError("Position: expected Gradient evidence of the kind 'located'; verify() has none for it")
        state["weights"].copy_(evidence.weights)

    def weights(self, state: State) -> Tensor:
        return state["weights"]

    def to_dense(self, state: State) -> Tensor:
        w = state["weights"]
        return torch.eye(w.shape[1], dtype=w.dtype, device=w.device).unsqueeze(0)

    def matvec(self, state: State, v: Tensor) -> Tensor:
        return v
