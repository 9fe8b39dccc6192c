"""The curvature axis: which matrix is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from gradmaker.curvature.evidence import Evidence, Kind

if TYPE_CHECKING:
    from gradmaker.capture.sites import Site
    from gradmaker.curvature.step import Step

__all__ = ["NO_CALLS", "NO_DRAWS", "NO_OUTPUTS", "NO_REDUCTION", "Curvature"]

NO_CALLS = dict.fromkeys(
    ("self_check", "batch_axis"), "calls of layers and the examples in them are not looked at; Fisher matrices are made of them"
)
NO_DRAWS = {"seed": "nothing is drawn at random here; sampled targets and probes are what a seed is for"}
NO_OUTPUTS = {"likelihood": "this curvature needs none; FisherMC and FisherExact are those of a likelihood"}
NO_REDUCTION = {"loss_reduction": "only FisherEmp reads it; a likelihood has its own, as in Categorical(reduction='sum')"}


class Curvature(ABC):
    """A source of evidence about one curvature matrix ``C`` of the loss that the user minimises.

    Subclasses are frozen dataclasses: equal curvatures of one maker are measured once.
    """

    gives: ClassVar[frozenset[Kind]]
    """Evidence types that `measure` yields."""
    definite: ClassVar[bool] = True
    """Whether ``C`` is positive semidefinite by construction."""
    layerwise: ClassVar[bool] = True
    """Whether the evidence is that of layers: it speaks of their inputs and output gradients."""

    of_outputs: ClassVar[bool] = False
    """Whether products have to know what the loss is a function of."""

    inapplicable: ClassVar[dict[str, str]] = {}
    """Options of a config that say nothing to this curvature, with the reason and a way out: configs refuse them."""

    @property
    def asks(self) -> frozenset[str]:
        """What is kept for it: ``graph`` (of the loss), ``replay`` (of the pass), ``previous`` (the last batch and step)."""
        return frozenset()

    @property
    def recorded(self) -> bool:
        """Whether layer inputs and output gradients are captured."""
        return self.layerwise

    @property
    def steady(self) -> bool:
        """Whether it is one and the same matrix throughout a solve."""
        return True

    @property
    def auxiliary(self) -> tuple[str, ...]:
        """What is measured beside the curvature, for solvers that use it."""
        return ()

    @property
    def uses_main_backward(self) -> bool:
        """Whether the output gradients of the ordinary backward pass are all that is needed."""
        return False

    @property
    def groups(self) -> bool:
        """Whether the matrix depends on which rows of a pass are one example's."""
        return False

    @property
    def pooled(self) -> bool:
        """Whether the pairs of a step's micro-batches add up to one, of its loss: accumulated at its end, by `complete`."""
        return False

    @property
    def of_passes(self) -> bool:
        """Whether it is measured for every pass (micro-batch), not once a step from the gradient."""
        return self.layerwise or bool(self.asks)

    def watches(self, model: nn.Module) -> Iterable[nn.Module]:
        """Modules whose calls it needs besides those of its sites."""
        return ()

    def secants(self, step: Step) -> dict[str, Evidence]:
        """What ``step.previous`` has to say, by site, now that the weights have moved: for those that ask for ``previous``."""
        return {}

    def secant_shape(self, site: Site) -> tuple[int, ...]:
        """Of both tensors of a pair of `secants`."""
        return site.shape

    def complete(self, step: Step, chunks: Sequence[Mapping[str, Evidence]]) -> Iterator[Mapping[str, Evidence]]:
        """What the statistics accumulate at the end of a step, from what its micro-batches make together: if it is `pooled`."""
        yield from chunks

    @abstractmethod
    def measure(self, step: Step) -> Iterator[Mapping[str, Evidence]]:
        """The evidence of a step by site name, in one or several chunks that add up."""
