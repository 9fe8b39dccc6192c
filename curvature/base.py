"""The curvature axis: which matrix is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, TypeAlias

from gradmaker.curvature.evidence import Evidence, Kind, check_kinds
from gradmaker.curvature.step import Step

__all__ = ["NO_CALLS", "NO_DRAWS", "NO_OUTPUTS", "NO_REDUCTION", "Curvature", "Need"]

NO_CALLS = dict.fromkeys(
    ("self_check", "batch_axis"), "calls of layers and the examples in them are not looked at; Fisher matrices are made of them"
)
NO_DRAWS = {"seed": "nothing is drawn at random here; sampled targets and probes are what a seed is for"}
NO_OUTPUTS = {"likelihood": "this curvature needs none; FisherMC and FisherExact are those of a likelihood"}
NO_REDUCTION = {"loss_reduction": "only FisherEmp reads it; a likelihood has its own, as in Categorical(reduction='sum')"}

Need: TypeAlias = Literal["calls", "main_backward", "examples", "outputs", "graph", "replay", "previous"]
"""What a curvature is measured on:

- ``calls``: the inputs and output gradients of its sites' layers;
- ``main_backward``: these alone, and output gradients of no other backward pass than the ordinary one;
- ``examples``: which rows of a pass are one example's;
- ``outputs``: what the loss is a function of;
- ``graph``: that of the loss; ``replay``: the pass, to be made again; ``previous``: the last measured batch and step.
"""


class Curvature(ABC):
    """A source of evidence about one curvature matrix ``C`` of the loss that the user minimises.

    Subclasses are frozen dataclasses: equal curvatures of one maker are measured once.
    """

    gives: ClassVar[frozenset[Kind]]
    """The evidence that `measure` yields, by class and kind, as `kinds` makes it."""
    definite: ClassVar[bool] = True
    """Whether ``C`` is positive semidefinite by construction."""
    layerwise: ClassVar[bool] = True
    """Whether the evidence is that of layers: it speaks of their inputs and output gradients."""
    inapplicable: ClassVar[dict[str, str]] = {}
    """Options of a config that say nothing to this curvature, with the reason and a way out: configs refuse them."""

    def __init_subclass__(cls) -> None:
        check_kinds(cls, "gives")

    @property
    def needs(self) -> frozenset[Need]:
        """What is recorded, kept or found out of a pass for it; of layers their calls."""
        return frozenset({"calls"}) if self.layerwise else frozenset()

    @property
    def of_passes(self) -> bool:
        """Whether it is measured for every pass (micro-batch), not once a step from the gradient."""
        return bool(self.needs)

    @abstractmethod
    def measure(self, step: Step) -> Iterator[Mapping[str, Evidence]]:
        """The evidence of a step by site name, in one or several chunks that add up."""
