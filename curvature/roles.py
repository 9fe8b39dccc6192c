"""Base classes of curvatures that need more than `measure`; the library recognises them by these classes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from gradmaker.capture.sites import Site
from gradmaker.curvature.base import Curvature
from gradmaker.curvature.evidence import Evidence, Pair
from gradmaker.curvature.products import Moments
from gradmaker.curvature.step import Step

__all__ = ["OfMoments", "OfProducts", "OfSecants", "Pooled", "Watching"]


class Watching(Curvature):
    """A curvature that needs calls of modules besides those of its sites."""

    @abstractmethod
    def watches(self, model: nn.Module) -> Iterable[nn.Module]:
        """The modules whose calls it needs. ValueError for a model that it does not support."""


class Pooled(Curvature):
    """A curvature whose pairs are summed over the micro-batches of a step before the statistics accumulate them."""

    @abstractmethod
    def complete(self, step: Step, chunks: Sequence[Mapping[str, Pair]]) -> Iterator[Mapping[str, Evidence]]:
        """Yields what the statistics accumulate.  chunks: the pairs, summed over the micro-batches"""


class OfSecants(Curvature):
    """A curvature of secants: it evaluates the last measured batch again after the weights have moved; needs ``previous``."""

    @abstractmethod
    def secants(self, step: Step) -> dict[str, Evidence]:
        """The secants of ``step.previous`` by site, with the weights as they are now."""

    @abstractmethod
    def empty_secant(self, site: Site, dtype: torch.dtype, device: torch.device) -> Pair:
        """A pair of zeros in the shapes of `secants`."""


class OfMoments(Curvature):
    """A curvature that is a function of sums over the examples: of several processes each measures its own `Moments`."""

    @abstractmethod
    def recursion(self, model: nn.Module, sites: Sequence[Site], moments: Moments) -> dict[str, Evidence]:
        """What the statistics accumulate.  moments: of all examples"""


class OfProducts(Curvature):
    """A curvature whose evidence is a matrix-vector product, which a solver calls throughout a solve."""

    @property
    def steady(self) -> bool:
        """Whether all products of a solve are those of one matrix."""
        return True

    @property
    def auxiliary(self) -> tuple[str, ...]:
        """Names of what is measured beside the products, for solvers that read it."""
        return ()
