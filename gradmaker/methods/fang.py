"""FANG: a sparse approximation of the inverse Fisher matrix, by local regressions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from gradmaker.capture.sites import Site
from gradmaker.config import COVERS_ALL, GradientConfig
from gradmaker.curvature import Curvature, FisherMC
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import GaussianGraph
from gradmaker.representations.gaussian_graph import Parents
from gradmaker.solvers import LocalRegression
from gradmaker.triple import Triple

__all__ = ["FangGradientConfig", "FangGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class FangGradientConfig(GradientConfig):
    """FANG: ``P = (I - S)^T diag(1 / d) (I - S)``, the inverse of a directed Gaussian model of each layer's gradients.

    With ``structure="bias"``, the default, every weight is regressed on the bias of its unit: this is the
    quasi-diagonal natural gradient of Ollivier, which has no other name here. ``"full"`` is `layer_ng`; for other parents see
    `GaussianGraph`. Units without a bias, and parameters that are in no layer, get the diagonal.

    Reference: Grosse & Salakhutdinov, ICML 2015, section 4; Ollivier, Information and Inference 2015, arXiv:1303.0818,
    section 2.2.
    """

    inapplicable = COVERS_ALL

    damping: float = 1e-3
    fisher: Curvature = FisherMC(samples=1)
    """Which Fisher matrix: FisherMC, FisherExact or FisherEmp."""
    structure: Literal["bias", "full"] | Parents | Callable[[tuple[int, ...]], Sequence[Sequence[int]]] = "bias"
    """The parents of every entry of a layer's block, see `GaussianGraph`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        GaussianGraph(self.structure)

    def inapplicable_options(self) -> dict[str, str]:
        """Also the options without effect for this structure."""
        return super().inapplicable_options() | GaussianGraph(self.structure).inapplicable

    def triple(self, site: Site) -> Triple | None:
        return Triple(self.fisher, GaussianGraph(self.structure), LocalRegression(damping=self.damping))


@register("fang")
class FangGradientMaker(Preconditioned[FangGradientConfig]):
    """FANG, and with its default structure the quasi-diagonal natural gradient; see `FangGradientConfig`."""

    Config = FangGradientConfig
