"""What some curvatures do besides being measured; the library asks for it by these classes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from gradmaker.capture.sites import Site
from gradmaker.curvature.base import Curvature
from gradmaker.curvature.evidence import Evidence, Pair
from gradmaker.curvature.step import Step

__all__ = ["OfProducts", "OfSecants", "Pooled", "Watching"]


class Watching(Curvature):
    """It needs calls of modules besides those of its sites."""

    @abstractmethod
    def watches(self, model: nn.Module) -> Iterable[nn.Module]:
        """These modules."""


class Pooled(Curvature):
    """The pairs of a step's micro-batches add up to one, of its loss, which the statistics accumulate at its end."""

    @abstractmethod
    def complete(self, step: Step, chunks: Sequence[Mapping[str, Pair]]) -> Iterator[Mapping[str, Evidence]]:
        """What the statistics accumulate.  chunks: sums over the micro-batches"""


class OfSecants(Curvature):
    """Its evidence compares the last measured step with itself, seen again when the weights have moved: needs ``previous``."""

    @abstractmethod
    def secants(self, step: Step) -> dict[str, Evidence]:
        """Of ``step.previous``, by site, with the weights as they are now."""

    @abstractmethod
    def empty_secant(self, site: Site, dtype: torch.dtype, device: torch.device) -> Pair:
        """A pair of zeros, in the shapes of those of `secants`."""


class OfProducts(Curvature):
    """Its evidence multiplies vectors throughout a solve."""

    @property
    def steady(self) -> bool:
        """Whether it is one and the same matrix throughout a solve."""
        return True

    @property
    def auxiliary(self) -> tuple[str, ...]:
        """What is measured beside the products, for solvers that read it."""
        return ()
