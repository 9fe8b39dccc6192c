"""Equilibrated SGD: the root mean square of Hessian-vector products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gradmaker.capture.sites import Site
from gradmaker.config import COVERS_ALL
from gradmaker.curvature import HessianProbe
from gradmaker.methods.hessian_probes import HessianProbeConfig
from gradmaker.options.checks import check_count, check_interval
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import ProbeDiagonal
from gradmaker.schedule import Schedule
from gradmaker.solvers import Division
from gradmaker.triple import Triple

__all__ = ["EsgdGradientConfig", "EsgdGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class EsgdGradientConfig(HessianProbeConfig):
    """Equilibrated SGD: ``P g = g / (sqrt(mean (H v)^2) + damping)``, the mean over all probes so far, ``v`` normal.

    With a ``decay``, and probes at every step, this is AdaHessian without momentum and without averages over kernels. Weights
    of ReLU units that were inactive at all probes have zero curvature and are divided by ``damping`` alone: with few probes,
    take 1e-2 rather than the published value.

    Reference: Dauphin, de Vries, Bengio, NeurIPS 2015, arXiv:1502.04390, algorithm 1 (one probe in 20 steps, damping 1e-4).
    """

    inapplicable = HessianProbe.inapplicable | ProbeDiagonal.inapplicable | COVERS_ALL

    damping: float = 1e-4
    decay: float | None = None
    curvature_interval: int | Schedule = 20
    preconditioner_interval: int | Schedule = 20
    stagger: bool = False
    samples: int = 1
    """Probes per measurement."""
    per_tensor: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_interval("damping", self.damping, 0, float("inf"))
        check_count("samples", self.samples, 1)

    def triple(self, site: Site) -> Triple | None:
        probe = HessianProbe(distribution="gaussian", samples=self.samples, mode=self.mode)
        return Triple(probe, ProbeDiagonal(), Division(damping=self.damping))


@register("esgd")
class EsgdGradientMaker(Preconditioned[EsgdGradientConfig]):
    """Equilibrated SGD as a gradient maker; see `EsgdGradientConfig`."""

    Config = EsgdGradientConfig
