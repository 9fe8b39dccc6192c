"""CurveBall: a momentum that tracks the solution of the damped Gauss-Newton system."""

from __future__ import annotations

from dataclasses import dataclass

from gradmaker.methods.matrix_free import MatrixFreeConfig
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import Implicit
from gradmaker.solvers import (
    CurveBall,
)
from gradmaker.triple import Triple

__all__ = ["CurveballGradientConfig", "CurveballGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class CurveballGradientConfig(MatrixFreeConfig):
    """CurveBall: ``P g = -z``, ``z <- rho z - beta ((G + lambda I) z + g)``; see `CurveBall`.

    Reference: Henriques, Ehrhardt, Albanie & Vedaldi, ICCV 2019, arXiv:1805.08095, algorithm 1.
    """

    damping: float = 1.0
    """The initial ``lambda``."""
    rho: float | None = None
    beta: float | None = None
    """``rho`` and ``beta``: both constant, as 0.9 and 0.1, or both None: optimal at every step."""
    adapt: bool = True

    def _triple(self) -> Triple:
        solver = CurveBall(damping=self.damping, rho=self.rho, beta=self.beta)
        if not self.adapt:
            solver = CurveBall(damping=self.damping, rho=self.rho, beta=self.beta, adapt=None)
        return Triple(self.measured(), Implicit(), solver)


@register("curveball")
class CurveballGradientMaker(Preconditioned[CurveballGradientConfig]):
    """CurveBall as a gradient maker; see `CurveballGradientConfig`."""

    Config = CurveballGradientConfig
