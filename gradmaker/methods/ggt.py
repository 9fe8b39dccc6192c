"""GGT: full-matrix AdaGrad on a window of the last gradients."""

from __future__ import annotations

from dataclasses import dataclass

from gradmaker.capture.sites import Site
from gradmaker.config import COVERS_ALL, ONE_BLOCK, GradientConfig
from gradmaker.curvature import BatchGradient
from gradmaker.options.checks import check_choice, check_count
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import Window
from gradmaker.solvers import Gram
from gradmaker.solvers.gram import Tail
from gradmaker.triple import Triple

__all__ = ["GgtGradientConfig", "GgtGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class GgtGradientConfig(GradientConfig):
    """GGT: ``P m = (C^(1/2) + damping)^-1 m``, ``C = sum_j beta_2^age_j g_j g_j^T`` over the last ``window`` gradients.

    ``beta1`` and ``decay`` are beta_1 and beta_2 (None: 1). ``tail`` is the gain of the part of ``m`` that is orthogonal to the
    window: see `gradmaker.solvers.Gram`.

    Reference: Agarwal et al., ICML 2019, arXiv:1806.02958, algorithm 1.
    """

    inapplicable = BatchGradient.inapplicable | Window.inapplicable | COVERS_ALL | ONE_BLOCK

    damping: float = 1e-4
    decay: float | None = None
    beta1: float = 0.9
    window: int = 200
    tail: Tail = "eps"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("window", self.window, 1)
        check_choice("tail", self.tail, ["eps", "none", "sigma_min"])

    def triple(self, site: Site) -> Triple | None:
        return Triple(
            BatchGradient(), Window(size=self.window, scale="sum"), Gram(power=-0.5, damping=self.damping, tail=self.tail)
        )


@register("ggt")
class GgtGradientMaker(Preconditioned[GgtGradientConfig]):
    """GGT as a gradient maker; see `GgtGradientConfig`."""

    Config = GgtGradientConfig
