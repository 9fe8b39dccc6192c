"""Saddle-free Newton: the inverse of the absolute Hessian in a Krylov space."""

from __future__ import annotations

from dataclasses import dataclass

from gradmaker.curvature import Curvature, Hessian
from gradmaker.methods.matrix_free import MatrixFreeConfig
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import Implicit
from gradmaker.solvers import (
    Krylov,
)
from gradmaker.triple import Triple

__all__ = ["SaddleFreeGradientConfig", "SaddleFreeGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class SaddleFreeGradientConfig(MatrixFreeConfig):
    """Saddle-free Newton: ``P g = (|H| + damping)^-1 g`` in the span of a Krylov space of the Hessian and the last step.

    Reference: Dauphin et al., NeurIPS 2014, arXiv:1406.2572, section 6; ``newton`` is the dense form.
    """

    damping: float = 1e-2
    dimension: int = 20
    curvature: Curvature = Hessian()

    def _triple(self) -> Triple:
        return Triple(self.measured(), Implicit(), Krylov(damping=self.damping, dimension=self.dimension))


@register("saddle_free")
class SaddleFreeGradientMaker(Preconditioned[SaddleFreeGradientConfig]):
    """Saddle-free Newton as a gradient maker; see `SaddleFreeGradientConfig`."""

    Config = SaddleFreeGradientConfig
