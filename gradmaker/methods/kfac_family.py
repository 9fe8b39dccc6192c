"""Options that the methods of the K-FAC family share: Fisher matrix, biases, norm layers, intervals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from gradmaker.capture.sites import Site
from gradmaker.curvature import Curvature, FisherMC
from gradmaker.methods.trust_region import TrustRegionGradientConfig
from gradmaker.options.checks import check_choice, check_kind
from gradmaker.representations import Dense
from gradmaker.schedule import Schedule
from gradmaker.solvers import Cholesky
from gradmaker.triple import Triple

__all__ = ["KroneckerGradientConfig"]


@dataclass(frozen=True, kw_only=True)
class KroneckerGradientConfig(TrustRegionGradientConfig, ABC):
    """Options of the K-FAC family. Norm layers get exact 2 x 2 blocks; parameters outside of layers get ``fallback``."""

    damping: float = 1e-3
    fisher: Curvature = FisherMC(samples=1)
    """FisherMC, FisherExact, FisherEmp, or FisherForward, which has no output factors (FOOF)."""
    bias: Literal["joint", "separate"] = "joint"
    """Whether the bias is one more input in the block of its layer, or a block of its own."""
    wide_sides: Literal["diagonal", "blocks"] = "diagonal"
    """The form of a factor with a side over ``max_dim``: diagonal, or block diagonal with blocks of at most that size."""
    embeddings: bool = True
    """Whether tables of embeddings, and those tied to a head, have factors; otherwise they get ``fallback``."""
    curvature_interval: int | Schedule = 10
    preconditioner_interval: int | Schedule = 10
    warmup_steps: int = 100
    """Factors change fast at first: with stale ones a tenfold learning rate diverges on small problems."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("bias", self.bias, ["joint", "separate"])
        check_choice("wide_sides", self.wide_sides, ["diagonal", "blocks"])
        check_kind("embeddings", self.embeddings, bool)

    @property
    def joint_bias(self) -> bool:  # type: ignore[override]
        """Whether weight and bias share a block."""
        return self.bias == "joint"

    @abstractmethod
    def layer(self, site: Site) -> Triple:
        """The triple for a linear layer, a convolution or an embedding."""

    def unit_wise(self, site: Site) -> bool:
        """Whether a site gets exact 2 x 2 blocks: a norm layer, where the Fisher matrix gives per-example rows."""
        return site.kind == "scale" and {*self.fisher.gives} <= {*Dense.takes}

    def triple(self, site: Site) -> Triple | None:
        if site.kind == "generic" or (site.kind in ("embedding", "tied") and not self.embeddings):
            return None
        if self.unit_wise(site):
            return Triple(self.fisher, Dense(granularity="unit"), Cholesky(damping=self.damping))
        return self.layer(site)
