"""Adam: the diagonal of the running second moment of mini-batch gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gradmaker.capture.sites import Site
from gradmaker.config import COVERS_ALL, GradientConfig
from gradmaker.curvature import BatchGradient
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import Diagonal
from gradmaker.solvers import Division
from gradmaker.triple import Triple
from gradmaker.usage import Usage

__all__ = ["AdamGradientConfig", "AdamGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class AdamGradientConfig(GradientConfig):
    """Adam: ``P g = m / (sqrt(v) + damping)`` with bias-corrected averages ``m`` of ``g`` and ``v`` of ``g^2``.

    ``beta1`` and ``decay`` are beta_1 and beta_2.
    Reference: Kingma & Ba, ICLR 2015, arXiv:1412.6980, algorithm 1.
    """

    inapplicable = BatchGradient.inapplicable | Diagonal.inapplicable | COVERS_ALL

    usage = Usage(momentum=0.0, unit=True)
    damping: float = 1e-8
    decay: float | None = 0.999
    beta1: float = 0.9
    per_tensor: ClassVar[bool] = True

    def triple(self, site: Site) -> Triple | None:
        return Triple(BatchGradient(), Diagonal(), Division(power=-0.5, damping=self.damping))


@register("adam")
class AdamGradientMaker(Preconditioned[AdamGradientConfig]):
    """Adam as a gradient maker; see `AdamGradientConfig`."""

    Config = AdamGradientConfig
