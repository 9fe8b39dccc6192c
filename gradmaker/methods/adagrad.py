"""AdaGrad: the diagonal of the summed outer products of mini-batch gradients."""

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

__all__ = ["AdagradGradientConfig", "AdagradGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class AdagradGradientConfig(GradientConfig):
    """AdaGrad: ``P g = g / (sqrt(sum_t g_t^2) + damping)``.

    Reference: Duchi, Hazan & Singer, JMLR 2011, figure 1; defaults of `torch.optim.Adagrad`.
    """

    inapplicable = BatchGradient.inapplicable | Diagonal.inapplicable | COVERS_ALL

    usage = Usage(momentum=0.0)
    damping: float = 1e-10
    decay: float | None = None
    per_tensor: ClassVar[bool] = True

    def triple(self, site: Site) -> Triple | None:
        return Triple(BatchGradient(), Diagonal(), Division(power=-0.5, damping=self.damping))


@register("adagrad")
class AdagradGradientMaker(Preconditioned[AdagradGradientConfig]):
    """AdaGrad as a gradient maker; see `AdagradGradientConfig`."""

    Config = AdagradGradientConfig
