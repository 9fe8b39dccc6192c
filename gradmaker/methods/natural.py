"""Natural gradients with dense blocks: of units, or of the whole model."""

from __future__ import annotations

from dataclasses import dataclass

from gradmaker.config import GradientConfig
from gradmaker.curvature import Curvature, FisherMC
from gradmaker.preconditioner import PreconditionedGradientMaker
from gradmaker.representations import Dense
from gradmaker.sites import Site
from gradmaker.solvers import Cholesky
from gradmaker.triple import Triple

__all__ = ["FullNaturalGradientConfig", "FullNaturalGradientMaker", "UnitNaturalGradientConfig", "UnitNaturalGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class UnitNaturalGradientConfig(GradientConfig):
    """Unit-wise natural gradient: ``P g_u = (F_u + damping)^-1 g_u`` for the incoming weights and bias of each unit ``u``.

    A unit of an embedding is the row of a token. Other parameters are units of one number each.

    Reference: Ollivier, Information and Inference 2015, arXiv:1303.0818, section 2.2.
    """

    fisher: Curvature = FisherMC(samples=1)
    """FisherMC, FisherExact or FisherEmp."""

    def triple(self, site: Site) -> Triple | None:
        return Triple(self.fisher, Dense(granularity="unit"), Cholesky(damping=self.damping))


class UnitNaturalGradientMaker(PreconditionedGradientMaker):
    """Unit-wise natural gradient as a gradient maker; see `UnitNaturalGradientConfig`."""

    Config = UnitNaturalGradientConfig


@dataclass(frozen=True, kw_only=True)
class FullNaturalGradientConfig(GradientConfig):
    """Natural gradient: ``P g = (F + damping)^-1 g`` with the Fisher matrix of all parameters.

    Reference: Amari, Neural Computation 1998.
    """

    fisher: Curvature = FisherMC(samples=1)
    """FisherMC, FisherExact or FisherEmp."""

    def triple(self, site: Site) -> Triple | None:
        return Triple(self.fisher, Dense(granularity="full"), Cholesky(damping=self.damping))


class FullNaturalGradientMaker(PreconditionedGradientMaker):
    """Natural gradient as a gradient maker; see `FullNaturalGradientConfig`."""

    Config = FullNaturalGradientConfig
