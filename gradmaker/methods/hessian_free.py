"""Hessian-free optimization: truncated conjugate gradients on Gauss-Newton-vector products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from gradmaker.methods.matrix_free import MatrixFreeConfig
from gradmaker.options.checks import check_choice
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import Implicit
from gradmaker.solvers import (
    LevenbergMarquardt,
    TruncatedCG,
)
from gradmaker.triple import Triple

__all__ = ["HessianFreeGradientConfig", "HessianFreeGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class HessianFreeGradientConfig(MatrixFreeConfig):
    """Hessian-free optimization: ``(G + lambda I) P g = g`` by truncated, preconditioned CG; see `TruncatedCG`.

    CG starts from the last solution; backtracking takes the best stored iterate, a line search scales it, and ``lambda``
    follows the Levenberg-Marquardt rule. The learning rate should be 1.

    Reference: Martens, ICML 2010; Martens & Sutskever, 2012.
    """

    only_with: ClassVar[dict[str, dict[str, Any]]] = {
        "squares": {"preconditioner": bool, "factors": False},
        "preconditioner": {"factors": False},
        "factor_damping": {"factors": True},
    }

    damping: float = 1.0
    """The initial ``lambda``."""
    iterations: int = 250
    tolerance: float = 5e-4
    warm: float = 0.95
    preconditioner: float = 0.75
    squares: Literal["examples", "batch"] = "examples"
    """The diagonal of the preconditioner: squared per-example gradients, or the squared batch gradient, which is free."""
    factors: bool = False
    """Whether CG is preconditioned by K-FAC of the batch, with sampled targets, instead: fewer iterations."""
    factor_damping: float = 1e-2
    """Lower bound of the damping of these factors; above it they take ``lambda``."""
    backtrack: bool = True
    line_search: bool = True
    adapt: bool = True

    def __post_init__(self) -> None:
        check_choice("squares", self.squares, ["examples", "batch"])
        super().__post_init__()

    def _triple(self) -> Triple:
        solver = TruncatedCG(
            damping=self.damping,
            iterations=self.iterations,
            tolerance=self.tolerance,
            warm=self.warm,
            preconditioner=self.preconditioner,
            factor_damping=self.factor_damping,
            backtrack=self.backtrack,
            line_search=self.line_search,
            adapt=LevenbergMarquardt() if self.adapt else None,
        )
        squares = bool(self.preconditioner) and self.squares == "examples"
        wanted = "factors" if self.factors else "squares" if squares else None
        return Triple(self.measured(**({wanted: True} if wanted else {})), Implicit(), solver)


@register("hessian_free")
class HessianFreeGradientMaker(Preconditioned[HessianFreeGradientConfig]):
    """Hessian-free optimization as a gradient maker; see `HessianFreeGradientConfig`."""

    Config = HessianFreeGradientConfig
