"""SENG: layer-wise natural gradient with a sketched empirical Fisher matrix of one batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from gradmaker.capture.sites import Site
from gradmaker.config import GradientConfig
from gradmaker.curvature import Curvature, FisherEmp
from gradmaker.options.checks import check_count
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import Sketched
from gradmaker.schedule import Schedule
from gradmaker.solvers import Gram
from gradmaker.triple import Triple

__all__ = ["SengGradientConfig", "SengGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class SengGradientConfig(GradientConfig):
    """SENG: ``P g = (F + damping)^-1 g`` for each layer, with the empirical Fisher matrix of the batch of a refresh.

    Without sketches, the default, this is exact; the authors use ``positions=16, coordinates=256, official=True``, see
    `gradmaker.representations.Sketched`. Parameters outside of layers get ``fallback``.

    Reference: Yang et al. 2021, "Sketch-based empirical natural gradient methods for deep learning", arXiv:2006.05924; defaults
    of the authors' code for CIFAR.
    """

    inapplicable = Sketched.inapplicable
    only_with: ClassVar[dict[str, dict[str, Any]]] = {"official": {"coordinates": bool}}

    damping: float = 0.05
    decay: float | None = 0.0
    """Only 0: rows of past batches would accumulate without bound."""
    curvature_interval: int | Schedule = 200
    preconditioner_interval: int | Schedule = 200
    fisher: Curvature = FisherEmp()
    """Which Fisher matrix: FisherEmp, FisherMC or FisherExact."""
    positions: int | None = None
    coordinates: int | None = None
    official: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("positions", "coordinates"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1)

    def inapplicable_options(self) -> dict[str, str]:
        """The seed has an effect where coordinates are sampled."""
        found = super().inapplicable_options()
        return {name: reason for name, reason in found.items() if self.coordinates is None or name != "seed"}

    def triple(self, site: Site) -> Triple | None:
        if site.kind == "generic":
            return None
        held = Sketched(positions=self.positions, coordinates=self.coordinates, official=self.official, seed=self.seed)
        return Triple(self.fisher, held, Gram(damping=self.damping))


@register("seng")
class SengGradientMaker(Preconditioned[SengGradientConfig]):
    """SENG as a gradient maker; see `SengGradientConfig`."""

    Config = SengGradientConfig
