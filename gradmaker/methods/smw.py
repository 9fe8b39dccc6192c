"""SMW-NG and SMW-GN: the Fisher or Gauss-Newton matrix of one batch, inverted by the Woodbury identity."""

from __future__ import annotations

from dataclasses import dataclass

from gradmaker.capture.sites import Site
from gradmaker.config import ONE_BLOCK, GradientConfig
from gradmaker.curvature import Curvature, FisherEmp, FisherExact
from gradmaker.options.checks import check_count
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import Rows
from gradmaker.solvers import Gram
from gradmaker.triple import Triple

__all__ = ["SmwGaussNewtonGradientConfig", "SmwGaussNewtonGradientMaker", "SmwNaturalGradientConfig", "SmwNaturalGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class SmwNaturalGradientConfig(GradientConfig):
    """SMW-NG: ``P g = (F + damping)^-1 g`` with the empirical Fisher matrix of the batch, in one block for all layers.

    ``P g = (g - J^T (J J^T + damping)^-1 J g) / damping``, the Woodbury identity, where ``J J^T`` comes from inputs and
    output gradients. Parameters outside of layers get ``fallback``.

    Reference: Ren & Goldfarb 2019, "Efficient subsampled Gauss-Newton and natural gradient methods for training neural
    networks", arXiv:1906.02353, section 3.
    """

    inapplicable = Rows.inapplicable | ONE_BLOCK

    damping: float = 1e-3
    """Of order one for a loss of order one. The authors adapt it; here the user can."""
    decay: float | None = 0.0
    """Only 0: rows of past batches would accumulate without bound."""
    fisher: Curvature = FisherEmp()
    """Which Fisher matrix: FisherEmp, FisherMC or FisherExact."""
    max_rows: int = 8192
    """Most rows (examples times cotangents) of a batch; more are an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("max_rows", self.max_rows, 1)

    def triple(self, site: Site) -> Triple | None:
        if site.kind == "generic":
            return None
        return Triple(self.fisher, Rows(max_rows=self.max_rows), Gram(damping=self.damping))


@register("smw_ng")
class SmwNaturalGradientMaker(Preconditioned[SmwNaturalGradientConfig]):
    """SMW-NG as a gradient maker; see `SmwNaturalGradientConfig`."""

    Config = SmwNaturalGradientConfig


@dataclass(frozen=True, kw_only=True)
class SmwGaussNewtonGradientConfig(SmwNaturalGradientConfig):
    """SMW-GN: `SmwNaturalGradientConfig` with the Gauss-Newton matrix, a row for each example and output.

    Reference: Ren & Goldfarb 2019, arXiv:1906.02353, section 3.
    """

    fisher: Curvature = FisherExact()


@register("smw_gn")
class SmwGaussNewtonGradientMaker(Preconditioned[SmwGaussNewtonGradientConfig]):
    """SMW-GN as a gradient maker; see `SmwGaussNewtonGradientConfig`."""

    Config = SmwGaussNewtonGradientConfig
