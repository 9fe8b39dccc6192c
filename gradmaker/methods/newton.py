"""Newton's method with a dense or diagonal Hessian."""

from __future__ import annotations

from dataclasses import dataclass

from gradmaker.capture.sites import Site
from gradmaker.config import COVERS_ALL, ONE_BLOCK, GradientConfig
from gradmaker.curvature import Curvature, Hessian
from gradmaker.options.checks import check_choice
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import Dense, Diagonal
from gradmaker.solvers import (
    LU,
    AbsoluteDivision,
    AbsoluteEigh,
    SignedDivision,
)
from gradmaker.triple import Triple

__all__ = ["NewtonGradientConfig", "NewtonGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class NewtonGradientConfig(GradientConfig):
    """Newton: ``P g = (|H| + damping)^-1 g``, or ``(H + damping)^-1 g``, with the Hessian of the batch or its running average.

    A step takes one Hessian-vector product for each parameter of the model.

    Reference: Dauphin et al., NeurIPS 2014, arXiv:1406.2572, section 5, for the absolute value; Becker & LeCun 1988
    for the diagonal.
    """

    inapplicable = COVERS_ALL

    damping: float = 1e-2
    decay: float | None = 0.0
    granularity: str = "full"
    """The blocks: full, layer or diagonal."""
    absolute: bool = True
    """Whether to take absolute values of eigenvalues (or of diagonal entries); else a step may ascend."""
    curvature: Curvature = Hessian()
    """The matrix: Hessian or GaussNewton."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("granularity", self.granularity, ["full", "layer", "diagonal"])

    def inapplicable_options(self) -> dict[str, str]:
        """Also the options without effect at this granularity."""
        held = {"full": ONE_BLOCK, "diagonal": Diagonal.inapplicable}
        return super().inapplicable_options() | held.get(self.granularity, {})

    def triple(self, site: Site) -> Triple | None:
        if self.granularity == "diagonal":
            division = AbsoluteDivision(damping=self.damping) if self.absolute else SignedDivision(damping=self.damping)
            return Triple(self.curvature, Diagonal(granularity="layer"), division)
        solver = AbsoluteEigh(damping=self.damping) if self.absolute else LU(damping=self.damping)
        return Triple(self.curvature, Dense(granularity="full" if self.granularity == "full" else "layer"), solver)


@register("newton")
class NewtonGradientMaker(Preconditioned[NewtonGradientConfig]):
    """Newton's method as a gradient maker; see `NewtonGradientConfig`."""

    Config = NewtonGradientConfig
