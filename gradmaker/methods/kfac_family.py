"""What K-FAC and its relatives have in common: the Fisher matrix, biases, norm layers, the schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from gradmaker.capture.sites import Site
from gradmaker.curvature import Curvature, FisherMC
from gradmaker.methods.trust_region import TrustRegionGradientConfig
from gradmaker.options.checks import check_choice
from gradmaker.representations import Dense
from gradmaker.schedule import Schedule
from gradmaker.solvers import Cholesky
from gradmaker.triple import Triple

__all__ = ["KroneckerGradientConfig"]


@dataclass(frozen=True, kw_only=True)
class KroneckerGradientConfig(TrustRegionGradientConfig, ABC):
    """Options of K-FAC and its relatives. Norm layers get their exact 2 x 2 blocks, what is not a layer ``fallback``."""

    damping: float = 1e-3
    fisher: Curvature = FisherMC(samples=1)
    """FisherMC, FisherExact, FisherEmp, FisherForward; the last one leaves out the output factors (FOOF)."""
    bias: Literal["joint", "separate"] = "joint"
    """Whether a bias is one more input of its layer's block, or a block of its own."""
    wide_sides: Literal["diagonal", "blocks"] = "diagonal"
    """What is held of the factor of a side over ``max_dim``: its diagonal, or blocks of at most that size along it."""
    curvature_interval: int | Schedule = 10
    preconditioner_interval: int | Schedule = 10
    warmup_steps: int = 100
    """Fresh factors while they change fast: with stale ones the tenfold learning rate diverges on small problems."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("bias", self.bias, ["joint", "separate"])
        check_choice("wide_sides", self.wide_sides, ["diagonal", "blocks"])

    @property
    def joint_bias(self) -> bool:  # type: ignore[override]
        """Whether weight and bias share a block."""
        return self.bias == "joint"

    @abstractmethod
    def layer(self, site: Site) -> Triple:
        """The parts for a linear map or a lookup table."""

    def unit_wise(self, site: Site) -> bool:
        """Whether a site gets its exact blocks: a norm layer, where the Fisher matrix has rows."""
        return site.kind == "scale" and {*self.fisher.gives} <= {*Dense.takes}

    def triple(self, site: Site) -> Triple | None:
        if site.kind == "generic":
            return None
        if self.unit_wise(site):
            return Triple(self.fisher, Dense(granularity="unit"), Cholesky(damping=self.damping))
        return self.layer(site)
