"""Natural gradient with dense Fisher blocks (units, layers, or the whole model), or with the diagonal."""

from __future__ import annotations

from dataclasses import dataclass

from gradmaker.capture.sites import Site
from gradmaker.config import COVERS_ALL, ONE_BLOCK, GradientConfig
from gradmaker.curvature import Curvature, FisherMC
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import Dense, Diagonal
from gradmaker.solvers import Cholesky, Division
from gradmaker.triple import Triple

__all__ = [
    "DiagonalNaturalGradientConfig",
    "DiagonalNaturalGradientMaker",
    "FullNaturalGradientConfig",
    "FullNaturalGradientMaker",
    "LayerNaturalGradientConfig",
    "LayerNaturalGradientMaker",
    "UnitNaturalGradientConfig",
    "UnitNaturalGradientMaker",
]


@dataclass(frozen=True, kw_only=True)
class UnitNaturalGradientConfig(GradientConfig):
    """Unit-wise natural gradient: ``P g_u = (F_u + damping)^-1 g_u`` for the incoming weights and bias of each unit ``u``.

    A unit of an embedding is the row of a token. Every entry of other parameters is a unit. The quasi-diagonal form, with three
    numbers for each weight, is `fang` with its default structure.

    Reference: Ollivier, Information and Inference 2015, arXiv:1303.0818, section 2.2.
    """

    inapplicable = COVERS_ALL

    damping: float = 1e-3
    fisher: Curvature = FisherMC(samples=1)
    """Which Fisher matrix: FisherMC, FisherExact or FisherEmp."""

    def triple(self, site: Site) -> Triple | None:
        return Triple(self.fisher, Dense(granularity="unit"), Cholesky(damping=self.damping, interval=self.steps_of_refresh))


@register("unit_ng")
class UnitNaturalGradientMaker(Preconditioned[UnitNaturalGradientConfig]):
    """Unit-wise natural gradient as a gradient maker; see `UnitNaturalGradientConfig`."""

    Config = UnitNaturalGradientConfig


@dataclass(frozen=True, kw_only=True)
class FullNaturalGradientConfig(GradientConfig):
    """Natural gradient: ``P g = (F + damping)^-1 g`` with the Fisher matrix of all parameters.

    Reference: Amari, Neural Computation 1998.
    """

    inapplicable = COVERS_ALL | ONE_BLOCK

    damping: float = 1e-3
    fisher: Curvature = FisherMC(samples=1)
    """Which Fisher matrix: FisherMC, FisherExact or FisherEmp."""

    def triple(self, site: Site) -> Triple | None:
        return Triple(self.fisher, Dense(granularity="full"), Cholesky(damping=self.damping, interval=self.steps_of_refresh))


@register("full_ng")
class FullNaturalGradientMaker(Preconditioned[FullNaturalGradientConfig]):
    """Natural gradient as a gradient maker; see `FullNaturalGradientConfig`."""

    Config = FullNaturalGradientConfig


@dataclass(frozen=True, kw_only=True)
class LayerNaturalGradientConfig(GradientConfig):
    """Layer-wise natural gradient: ``P g_l = (F_l + damping)^-1 g_l`` with the dense Fisher block of each layer ``l``.

    Reference: Amari, Neural Computation 1998, for the matrix; its block diagonal as in Martens & Grosse, ICML 2015,
    arXiv:1503.05671, section 4.1.
    """

    inapplicable = COVERS_ALL

    damping: float = 1e-3
    fisher: Curvature = FisherMC(samples=1)
    """Which Fisher matrix: FisherMC, FisherExact or FisherEmp."""

    def triple(self, site: Site) -> Triple | None:
        return Triple(self.fisher, Dense(granularity="layer"), Cholesky(damping=self.damping, interval=self.steps_of_refresh))


@register("layer_ng")
class LayerNaturalGradientMaker(Preconditioned[LayerNaturalGradientConfig]):
    """Layer-wise natural gradient as a gradient maker; see `LayerNaturalGradientConfig`."""

    Config = LayerNaturalGradientConfig


@dataclass(frozen=True, kw_only=True)
class DiagonalNaturalGradientConfig(GradientConfig):
    """Diagonal natural gradient: ``P g = g / (diag(F) + damping)``, ``diag(F)`` from squared per-example gradients.

    Reference: Becker & LeCun 1988 for the diagonal Gauss-Newton matrix; Martens, JMLR 2020, arXiv:1412.1193, section 11.
    """

    inapplicable = Diagonal.inapplicable | COVERS_ALL

    damping: float = 1e-3
    fisher: Curvature = FisherMC(samples=1)
    """Which Fisher matrix: FisherMC, FisherExact or FisherEmp."""

    def triple(self, site: Site) -> Triple | None:
        return Triple(self.fisher, Diagonal(granularity="layer"), Division(power=-1.0, damping=self.damping))


@register("diag_ng")
class DiagonalNaturalGradientMaker(Preconditioned[DiagonalNaturalGradientConfig]):
    """Diagonal natural gradient as a gradient maker; see `DiagonalNaturalGradientConfig`."""

    Config = DiagonalNaturalGradientConfig
