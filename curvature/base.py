"""The curvature axis: which matrix is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from gradmaker.curvature.evidence import Evidence

if TYPE_CHECKING:
    from gradmaker.step import Step

__all__ = ["Curvature"]


class Curvature(ABC):
    """A source of evidence about one curvature matrix ``C`` of the loss that the user minimises.

    Subclasses are frozen dataclasses: equal curvatures of one maker are measured once.
    """

    gives: ClassVar[tuple[type[Evidence], ...]]
    """Evidence types that `measure` yields."""
    definite: ClassVar[bool] = True
    """Whether ``C`` is positive semidefinite by construction."""
    layerwise: ClassVar[bool] = True
    """Whether layer inputs and output gradients are captured."""

    asks: ClassVar[frozenset[str]] = frozenset()
    """What is kept for it: ``graph`` (of the loss), ``replay`` (of the pass), ``previous`` (the last batch and step)."""

    @property
    def rides(self) -> bool:
        """Whether the output gradients of the ordinary backward pass are all that is needed."""
        return False

    @property
    def of_passes(self) -> bool:
        """Whether it is measured for every pass (micro-batch), not once a step from the gradient."""
        return self.layerwise or bool(self.asks)

    def secants(self, step: Step) -> dict[str, Evidence]:
        """What ``step.previous`` has to say, by site, now that the weights have moved: for those that ask for ``previous``."""
        return {}

    @abstractmethod
    def measure(self, step: Step) -> Iterator[Mapping[str, Evidence]]:
        """The evidence of a step by site name, in one or several portions that add up."""
