"""The base class of curvatures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, TypeAlias

from gradmaker.curvature.evidence import Evidence
from gradmaker.curvature.evidence_kinds import Kind, check_kinds
from gradmaker.curvature.step import Step

__all__ = ["NO_CALLS", "NO_DRAWS", "NO_OUTPUTS", "NO_REDUCTION", "Curvature", "Need"]

NO_CALLS = dict.fromkeys(
    ("self_check", "batch_axis"), "this curvature reads no calls of layers and no examples; Fisher matrices are made of them"
)
NO_DRAWS = {"seed": "this curvature draws no random numbers; sampled targets and probes do"}
NO_OUTPUTS = {"likelihood": "this curvature needs none; FisherMC and FisherExact are those of a likelihood"}
NO_REDUCTION = {"loss_reduction": "only FisherEmp reads it; a likelihood has its own, as in Categorical(reduction='sum')"}

Need: TypeAlias = Literal["calls", "main_backward", "examples", "outputs", "graph", "replay", "previous"]
"""What a curvature needs of a pass:

- ``calls``: the inputs and output gradients of its sites' layers;
- ``main_backward``: the calls alone, with the output gradients of the ordinary backward pass and of no other;
- ``examples``: which rows of a pass belong to which example;
- ``outputs``: the tensors that the loss is a function of;
- ``graph``: the autograd graph of the loss; ``replay``: another evaluation of the pass; ``previous``: the last measured step.
"""


class Curvature(ABC):
    """A way to measure one curvature matrix ``C`` of the loss that the user minimises.

    Subclasses are frozen dataclasses: a maker measures equal curvatures once.
    """

    gives: ClassVar[frozenset[Kind]]
    """The evidence that `measure` yields: classes and kinds, made by `kinds`."""
    definite: ClassVar[bool] = True
    """Whether ``C`` is positive semidefinite by construction."""
    layerwise: ClassVar[bool] = True
    """Whether the evidence is made of the inputs and output gradients of layers."""
    by_rows: ClassVar[bool] = False
    """Whether `measure` gives the gradient of a block by its rows where `Step.rows` has them."""
    by_parts: ClassVar[bool] = False
    """Whether the evidence of the parts of a batch makes up that of the batch, so that ranks measure each their own part."""
    inapplicable: ClassVar[dict[str, str]] = {}
    """Options of a config without effect on this curvature, each with the reason and an alternative: configs refuse them."""

    def __init_subclass__(cls) -> None:
        check_kinds(cls, "gives")

    @property
    def needs(self) -> frozenset[Need]:
        """What has to be recorded or kept of a pass; by default the calls of layers, if the evidence is made of them."""
        return frozenset({"calls"}) if self.layerwise else frozenset()

    @property
    def of_passes(self) -> bool:
        """Whether every pass (micro-batch) is measured; otherwise the gradient is, once a step."""
        return bool(self.needs)

    @abstractmethod
    def measure(self, step: Step) -> Iterator[Mapping[str, Evidence]]:
        """Yields the evidence of a step by site name, in one or several chunks that add up."""
