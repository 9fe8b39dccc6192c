"""Grafting: the length of a preconditioned gradient is bounded, or taken from the gradient or another method's step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Gradient
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.state import State
from gradmaker.options.registry import Registry, register
from gradmaker.representations.base import Fold, Frame
from gradmaker.representations.diagonal import Diagonal

__all__ = ["GRAFTINGS", "Amplitude", "Graft", "Grafting", "Keep", "Sign"]


class Grafting(ABC):
    """A rule that rescales each block's preconditioned gradient ``U`` to ``U |V| / |U|``, unless it says otherwise."""

    by_rows: ClassVar[bool] = False
    """Whether `rescale_rows` does what `rescale` does: the rule has no state, and reads no entries of the gradient."""
    leads: ClassVar[bool] = False
    """Whether ``.grad`` holds ``V`` before ``start_step``; otherwise it keeps the plain gradient."""

    @property
    def decays(self) -> bool:
        """Whether the rule has a running average with a decay to choose."""
        return False

    def decaying(self, decay: float) -> Grafting:
        """The rule with this decay; unchanged where it has none."""
        return self

    def init(self, frame: Frame) -> State:
        """The state of the rule before the first step."""
        return {}

    @abstractmethod
    def target(self, state: State, g: Tensor, raw: Tensor) -> Tensor:
        """``V``, whose length the result gets.  # (B, *shape)"""

    def rescale(self, state: State, value: Tensor, g: Tensor, raw: Tensor) -> Tensor:
        """``U |V| / |U|`` for each block; a zero gradient stays zero."""
        target = self.target(state, g, raw)
        own = torch.linalg.vector_norm(value.reshape(len(value), -1), dim=1)
        wanted = torch.linalg.vector_norm(target.reshape(len(value), -1), dim=1)
        return _scaled(value, wanted, own)

    def rescale_rows(self, value: Tensor, g: FactoredGradient) -> Tensor:
        """`rescale` where the gradient is held by its rows, for a rule that is `by_rows`: to the length of the gradient."""
        return _scaled(value, g.length(), torch.linalg.vector_norm(value.flatten(1), dim=1))


def _scaled(value: Tensor, wanted: Tensor, own: Tensor) -> Tensor:
    """``U |V| / |U|``; zero stays zero.  # (B, *shape), (B,), (B,)"""
    scale = torch.where(own > 0, wanted / own, torch.zeros_like(own))
    return value * scale.reshape(-1, *[1] * (value.ndim - 1))


@dataclass(frozen=True)
class Keep(Grafting):
    """The length of the gradient itself."""

    by_rows: ClassVar[bool] = True

    def target(self, state: State, g: Tensor, raw: Tensor) -> Tensor:
        return g


@dataclass(frozen=True)
class Graft(Grafting):
    """The length of an element-wise method's step: AdaGrad (``decay=None``), Adam, or RMSProp (not ``corrected``).

    ``normalised`` divides each block's gradient by its length before it enters the second moment and the step.
    Before ``start_step``, ``.grad`` holds the element-wise step itself.

    Reference: Agarwal et al., 2020, arXiv:2002.11803; Anil et al., 2020, arXiv:2002.09018, section 3.
    """

    leads: ClassVar[bool] = True

    decay: float | None
    damping: float
    corrected: bool = True
    normalised: bool = False

    @property
    def decays(self) -> bool:
        return self.decay is not None

    def decaying(self, decay: float) -> Grafting:
        return replace(self, decay=decay) if self.decays else self

    def init(self, frame: Frame) -> State:
        return Diagonal().init(frame)

    def target(self, state: State, g: Tensor, raw: Tensor) -> Tensor:
        if self.decay is None:
            fold = Fold(1.0, 1.0, 1.0, summed=True)
        else:
            fold = Fold(self.decay, 1 - self.decay, 1 - self.decay, summed=not self.corrected)
        g, raw = (_unit(g), _unit(raw)) if self.normalised else (g, raw)
        Diagonal().update(state, Gradient(raw), fold)
        return g / (Diagonal().diagonal(state).sqrt() + self.damping)


@dataclass(frozen=True)
class Sign(Grafting):
    """The length of a step of plus or minus one for each element, ``sqrt(n)``: Google's SQRT_N."""

    def target(self, state: State, g: Tensor, raw: Tensor) -> Tensor:
        return g.sign()


@dataclass(frozen=True)
class Amplitude(Grafting):
    """A root mean square of at most ``mean``, then entries of at most ``largest`` in size: a whitened gradient has one.

    Reference: Li, psgd_torch (2025), whose defaults these are.
    """

    by_rows: ClassVar[bool] = True

    mean: float
    largest: float

    def target(self, state: State, g: Tensor, raw: Tensor) -> Tensor:
        return g

    def rescale(self, state: State, value: Tensor, g: Tensor, raw: Tensor) -> Tensor:
        size = value.reshape(len(value), -1).square().mean(1).sqrt()
        share = (self.mean / size).clamp(max=1.0).reshape(-1, *[1] * (value.ndim - 1))
        return (value * share).clamp_(-self.largest, self.largest)

    def rescale_rows(self, value: Tensor, g: FactoredGradient) -> Tensor:
        return self.rescale({}, value, value, value)


def _unit(g: Tensor) -> Tensor:
    """Each block divided by its length; zero stays zero.  # (B, *shape)"""
    length = torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1)
    return g / torch.where(length > 0, length, 1.0).reshape(-1, *[1] * (g.ndim - 1))


GRAFTINGS: Registry[Grafting] = Registry("grafting rule", Grafting, named=True, instances=True)
register("keep", Keep())
register("adagrad", Graft(None, 1e-10))
register("adam", Graft(0.999, 1e-8))
register("rmsprop", Graft(0.999, 1e-8, corrected=False))
register("rmsprop_normalised", Graft(0.999, 1e-8, corrected=False, normalised=True))
register("sqrtn", Sign())
register("amplitude", Amplitude(2.0, 10.0))
