"""SKFAC: K-FAC with factors of the newest batch, inverted by the Woodbury identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from gradmaker.capture.sites import Site
from gradmaker.methods.kfac_family import KroneckerGradientConfig
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import KronRows
from gradmaker.representations.base import NO_LIMIT
from gradmaker.solvers import FactorWoodbury
from gradmaker.triple import Triple

__all__ = ["SkfacGradientConfig", "SkfacGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class SkfacGradientConfig(KroneckerGradientConfig):
    """SKFAC: K-FAC's factors of the newest batch alone, inverted by the Woodbury identity from their few rows.

    ``reduction`` reduces the weight-sharing positions first; see `KronRows`. Norm layers use the newest batch alone too.

    Reference: Tang et al., CVPR 2021, "SKFAC: Training Neural Networks with Faster Kronecker-Factored Approximate Curvature".
    """

    inapplicable = NO_LIMIT | {"wide_sides": "wide factors are held by their rows"}
    only_with: ClassVar[dict[str, dict[str, Any]]] = {"positions": {"reduction": "subsample"}}

    decay: float | None = 0.0
    reduction: Literal["sum", "subsample", "none"] = "sum"
    positions: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay != 0.0:
            raise ValueError(f"decay={self.decay!r}: SKFAC uses the newest batch alone: expected 0.0; kfac averages")

    def layer(self, site: Site) -> Triple:
        representation = KronRows(reduction=self.reduction, positions=self.positions)
        return Triple(self.fisher, representation, FactorWoodbury(damping=self.damping))


@register("skfac")
class SkfacGradientMaker(Preconditioned[SkfacGradientConfig]):
    """SKFAC as a gradient maker; see `SkfacGradientConfig`."""

    Config = SkfacGradientConfig
