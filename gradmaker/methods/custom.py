"""Any legal triple of curvature, representation and solver, as a method."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gradmaker.capture.sites import Site
from gradmaker.config import COVERS_ALL, ONE_BLOCK, GradientConfig
from gradmaker.curvature import BatchGradient, Curvature
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import Diagonal, Representation
from gradmaker.representations.base import NEWEST_ALONE
from gradmaker.solvers import AnySolver, Division
from gradmaker.triple import Triple

__all__ = ["CustomGradientConfig", "CustomGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class CustomGradientConfig(GradientConfig):
    """A free triple: ``{method: custom, curvature: {...}, representation: {...}, solver: {...}}``."""

    damping: float | None = None
    """Replaces the damping of the solver; None keeps it."""
    inapplicable = COVERS_ALL

    curvature: Curvature = BatchGradient()
    representation: Representation = Diagonal()
    solver: AnySolver = Division()

    @property
    def per_tensor(self) -> bool:  # type: ignore[override]
        """Whether each parameter tensor is a site of its own."""
        return self.representation.grain == "tensor"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damping is not None:
            object.__setattr__(self, "solver", replace(self.solver, damping=self.damping))  # type: ignore[type-var]
        Triple(self.curvature, self.representation, self.solver)

    def inapplicable_options(self) -> dict[str, str]:
        """Also the options without effect at this granularity or with this solver."""
        found = super().inapplicable_options() | (ONE_BLOCK if self.representation.grain == "full" else {})
        if not hasattr(self.solver, "damping"):
            found["damping"] = f"{type(self.solver).__name__} has none; set that of the representation or of the curvature"
        if self.decay == 0 and found.items() >= NEWEST_ALONE.items():
            del found["decay"]  # zero means the newest batch alone, as this representation does
        return found

    def triple(self, site: Site) -> Triple | None:
        return Triple(self.curvature, self.representation, self.solver)


@register("custom")
class CustomGradientMaker(Preconditioned[CustomGradientConfig]):
    """A free triple as a gradient maker; see `CustomGradientConfig`."""

    Config = CustomGradientConfig
