"""What length a preconditioned gradient is given: its own, the gradient's, or that of another method (grafting)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Gradient
from gradmaker.representations.base import Fold, Frame, State
from gradmaker.representations.diagonal import Diagonal

__all__ = ["NORMS", "Graft", "Keep", "Norm"]


class Norm(ABC):
    """A rule that rescales each block's preconditioned gradient ``U`` to ``U |V| / |U|``."""

    def init(self, frame: Frame) -> State:
        """Whatever the rule has to remember."""
        return {}

    @abstractmethod
    def target(self, state: State, g: Tensor, raw: Tensor) -> Tensor:
        """``V``: what the length is taken from.  # (B, *shape)"""

    def rescale(self, state: State, value: Tensor, g: Tensor, raw: Tensor) -> Tensor:
        """``U |V| / |U|`` for each block; a zero gradient stays zero."""
        target = self.target(state, g, raw)
        own = torch.linalg.vector_norm(value.flatten(1), dim=1)
        wanted = torch.linalg.vector_norm(target.flatten(1), dim=1)
        scale = torch.where(own > 0, wanted / own, torch.zeros_like(own))
        return value * scale.reshape(-1, *[1] * (value.ndim - 1))


@dataclass(frozen=True)
class Keep(Norm):
    """The length of the gradient itself."""

    def target(self, state: State, g: Tensor, raw: Tensor) -> Tensor:
        return g


@dataclass(frozen=True)
class Graft(Norm):
    """The length of an element-wise method's step: AdaGrad (``decay=None``) or Adam.

    Reference: Agarwal et al., 2020, arXiv:2002.11803; Anil et al., 2020, arXiv:2002.09018, section 3.
    """

    decay: float | None
    damping: float

    def init(self, frame: Frame) -> State:
        return Diagonal().init(frame)

    def target(self, state: State, g: Tensor, raw: Tensor) -> Tensor:
        if self.decay is None:
            fold = Fold(1.0, 1.0, 1.0, summed=True)
        else:
            fold = Fold(self.decay, 1 - self.decay, 1 - self.decay)
        Diagonal().update(state, Gradient(raw), fold)
        return g / (Diagonal().diagonal(state).sqrt() + self.damping)


NORMS: dict[str, Norm | None] = {
    "none": None,
    "keep": Keep(),
    "adagrad": Graft(None, 1e-10),
    "adam": Graft(0.999, 1e-8),
}
