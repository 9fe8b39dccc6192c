"""A method: exact blocks of the Fisher matrix for small layers, Kronecker factors for the others."""

from dataclasses import dataclass
from math import prod

from gradmaker import GradientConfig, Preconditioned, Triple, register
from gradmaker.capture.sites import Site
from gradmaker.curvature import Curvature, FisherMC
from gradmaker.options.checks import check_count
from gradmaker.representations import Dense, Kron
from gradmaker.solvers import Cholesky


@dataclass(frozen=True, kw_only=True)
class ExactSmallGradientConfig(GradientConfig):
    """``P = (F + damping I)^-1`` for a layer of up to ``largest`` parameters, K-FAC's ``(B (x) A)^-1``, damped, for others.

    Reference: Amari, Neural Computation 1998; Martens & Grosse, ICML 2015, arXiv:1503.05671, sections 3 and 6.3.
    """

    damping: float = 1e-3
    largest: int = 64
    fisher: Curvature = FisherMC()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("largest", self.largest, 0)

    def triple(self, site: Site) -> Triple | None:
        if site.kind == "generic":
            return None  # the method that `fallback` names
        exact = prod(site.shape[1:]) <= self.largest
        return Triple(self.fisher, Dense(granularity="layer") if exact else Kron(), Cholesky(damping=self.damping))


@register("exact_small")
class ExactSmallGradientMaker(Preconditioned[ExactSmallGradientConfig]):
    """Exact blocks for small layers, Kronecker factors for others, as a gradient maker; see `ExactSmallGradientConfig`."""

    Config = ExactSmallGradientConfig
