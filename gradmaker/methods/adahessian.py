"""AdaHessian: the running average of the squared Hutchinson estimate of the Hessian diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gradmaker.capture.sites import Site
from gradmaker.config import COVERS_ALL
from gradmaker.curvature import HessianProbe
from gradmaker.methods.hessian_probes import HessianProbeConfig
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import ProbeDiagonal
from gradmaker.solvers import Division
from gradmaker.triple import Triple

__all__ = ["AdahessianGradientConfig", "AdahessianGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class AdahessianGradientConfig(HessianProbeConfig):
    """AdaHessian: ``P g = m / (v^(power / 2) + damping)``, ``v`` the average of ``D^2``, ``D = |H z|`` averaged over kernels.

    ``beta1`` and ``decay`` are beta_1 and beta_2, ``z`` is a Rademacher vector.

    Reference: Yao et al., AAAI 2021, arXiv:2006.00719, algorithm 1; defaults of the authors' code.
    """

    inapplicable = HessianProbe.inapplicable | ProbeDiagonal.inapplicable | COVERS_ALL

    damping: float = 1e-4
    decay: float | None = 0.999
    beta1: float = 0.9
    power: float = 1.0
    """The exponent of the Hessian."""
    spatial: bool = True
    """Whether ``|H z|`` is averaged over the kernel of a convolution."""
    per_tensor: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._solver()

    def _solver(self) -> Division:
        return Division(power=-self.power, damping=self.damping)

    def triple(self, site: Site) -> Triple | None:
        return Triple(HessianProbe(mode=self.mode), ProbeDiagonal("squares", self.spatial), self._solver())


@register("adahessian")
class AdahessianGradientMaker(Preconditioned[AdahessianGradientConfig]):
    """AdaHessian as a gradient maker; see `AdahessianGradientConfig`."""

    Config = AdahessianGradientConfig
