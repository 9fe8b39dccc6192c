"""Newton's method and its matrix-free relatives: Hessian or Gauss-Newton matrix, by products with vectors.

All of them repeat or differentiate the declared loss, so that they do not `attach`. The matrix-free ones measure and solve at
every step, whatever the intervals: a product ends with the graph of its step.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from gradmaker.capture.sites import Site
from gradmaker.config import COVERS_ALL, ONE_BLOCK, GradientConfig, check_choice, check_count
from gradmaker.curvature import Curvature, GaussNewton, Hessian
from gradmaker.curvature.hessian import Products
from gradmaker.preconditioner import PreconditionedGradientMaker
from gradmaker.representations import Dense, Diagonal, Implicit
from gradmaker.solvers import (
    LU,
    AbsoluteDivision,
    AbsoluteEigh,
    CurveBall,
    Krylov,
    LevenbergMarquardt,
    SignedDivision,
    TruncatedCG,
)
from gradmaker.triple import Triple

__all__ = [
    "CurveballGradientConfig",
    "CurveballGradientMaker",
    "HessianFreeGradientConfig",
    "HessianFreeGradientMaker",
    "KsdGradientConfig",
    "KsdGradientMaker",
    "MatrixFreeConfig",
    "NewtonGradientConfig",
    "NewtonGradientMaker",
    "SaddleFreeGradientConfig",
    "SaddleFreeGradientMaker",
]


@dataclass(frozen=True, kw_only=True)
class NewtonGradientConfig(GradientConfig):
    """Newton: ``P g = (|H| + damping)^-1 g``, or ``(H + damping)^-1 g``, with the Hessian of the batch or its running average.

    As many products with the Hessian in a step as the model has parameters.

    Reference: Dauphin et al., NeurIPS 2014, arXiv:1406.2572, section 5, for the absolute value; Becker & LeCun 1988
    for the diagonal.
    """

    inapplicable = COVERS_ALL

    damping: float = 1e-2
    decay: float | None = 0.0
    granularity: str = "full"
    """full, layer or diagonal."""
    absolute: bool = True
    """Whether eigenvalues (or diagonal entries) count by their absolute value; else a step may ascend."""
    curvature: Curvature = Hessian()
    """Hessian or GaussNewton."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("granularity", self.granularity, ["full", "layer", "diagonal"])

    def inapplicable_options(self) -> dict[str, str]:
        """Also what the granularity leaves without a meaning."""
        held = {"full": ONE_BLOCK, "diagonal": Diagonal.inapplicable}
        return super().inapplicable_options() | held.get(self.granularity, {})

    def triple(self, site: Site) -> Triple | None:
        if self.granularity == "diagonal":
            division = AbsoluteDivision(damping=self.damping) if self.absolute else SignedDivision(damping=self.damping)
            return Triple(self.curvature, Diagonal(granularity="layer"), division)
        solver = AbsoluteEigh(damping=self.damping) if self.absolute else LU(damping=self.damping)
        return Triple(self.curvature, Dense(granularity="full" if self.granularity == "full" else "layer"), solver)


class NewtonGradientMaker(PreconditionedGradientMaker):
    """Newton's method as a gradient maker; see `NewtonGradientConfig`."""

    Config = NewtonGradientConfig


@dataclass(frozen=True, kw_only=True)
class MatrixFreeConfig(GradientConfig):
    """What methods on products with a curvature have in common."""

    inapplicable = Implicit.inapplicable | COVERS_ALL | ONE_BLOCK

    damping: float = 1e-3
    decay: float | None = 0.0
    """Without effect: a product ends with its step."""
    curvature: Curvature = GaussNewton()
    """GaussNewton or Hessian."""
    curvature_examples: int | None = None
    """Products on so many examples, drawn anew at every step; None: on all. `setup_curvature_call` gives them other data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.curvature_examples is not None:
            check_count("curvature_examples", self.curvature_examples, 1)
        self._triple()

    def inapplicable_options(self) -> dict[str, str]:
        """Of the curvature as it is measured."""
        own, measured = self.curvature.inapplicable, self._triple().curvature.inapplicable
        return {name: why for name, why in super().inapplicable_options().items() if name not in own or name in measured}

    def measured(self, **options: Any) -> Curvature:
        """The curvature with what the method wants of it.  options: fields of `Products`"""
        if self.curvature_examples is not None:
            options["examples"] = self.curvature_examples
        return replace(self.curvature, **options) if options and isinstance(self.curvature, Products) else self.curvature

    @abstractmethod
    def _triple(self) -> Triple:
        """The parts, the same for every site."""

    def triple(self, site: Site) -> Triple | None:
        return self._triple()


@dataclass(frozen=True, kw_only=True)
class HessianFreeGradientConfig(MatrixFreeConfig):
    """Hessian-free optimization: ``(G + lambda I) P g = g`` by truncated, preconditioned CG; see `TruncatedCG`.

    The last solution is where the next one starts, the best of the stored iterates is taken, its length is found by a line
    search, and ``lambda`` follows the rule of Levenberg and Marquardt: for a step of the learning rate 1.

    Reference: Martens, ICML 2010; Martens & Sutskever, 2012.
    """

    only_with: ClassVar[dict[str, dict[str, Any]]] = {
        "squares": {"preconditioner": bool, "factors": False},
        "preconditioner": {"factors": False},
        "factor_damping": {"factors": True},
    }

    damping: float = 1.0
    """The first ``lambda``."""
    iterations: int = 250
    tolerance: float = 5e-4
    warm: float = 0.95
    preconditioner: float = 0.75
    squares: Literal["examples", "batch"] = "examples"
    """What the preconditioner is made of: squared gradients of examples, or the square of the batch's, which costs nothing."""
    factors: bool = False
    """Whether it is made of K-FAC's factors of the batch instead, with targets drawn by the model: fewer iterations."""
    factor_damping: float = 1e-2
    """The factors' damping once ``lambda`` is smaller."""
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


class HessianFreeGradientMaker(PreconditionedGradientMaker):
    """Hessian-free optimization as a gradient maker; see `HessianFreeGradientConfig`."""

    Config = HessianFreeGradientConfig


@dataclass(frozen=True, kw_only=True)
class KsdGradientConfig(MatrixFreeConfig):
    """Krylov subspace descent: the least loss in the span of ``g, G g, ..., G^(K-1) g`` and the last step; see `Krylov`.

    The space is made with the diagonal ``D`` of squared gradients, ``D^-1 g, D^-1 G D^-1 g, ...``, and searched by BFGS, on the
    batch of the step or on one of its own (``setup_search_call``): for a step of the learning rate 1.

    Reference: Vinyals & Povey, AISTATS 2012, arXiv:1111.4259, sections 3-4.
    """

    only_with: ClassVar[dict[str, dict[str, Any]]] = {"squares": {"precondition": bool}}

    damping: float = 1e-2
    """Added to the loss as ``damping |step|^2 / 2``; the paper has none."""
    dimension: int = 20
    search: Literal["bfgs", "model"] = "bfgs"
    """bfgs: of the loss, at most 2 K iterations; model: of the quadratic model, without further evaluations of the loss."""
    precondition: bool = True
    squares: Literal["examples", "batch"] = "examples"
    """What ``D`` is made of: squared gradients of examples, or the square of the batch's, which costs nothing."""
    floor: float = 1e-4
    """Eigenvalues in the space are at least this part of the largest."""

    def __post_init__(self) -> None:
        check_choice("squares", self.squares, ["examples", "batch"])
        super().__post_init__()

    def _triple(self) -> Triple:
        solver = Krylov(
            damping=self.damping,
            dimension=self.dimension,
            precondition=self.precondition,
            floor=self.floor,
            search=self.search,
        )
        wanted = {"squares": True} if self.precondition and self.squares == "examples" else {}
        return Triple(self.measured(**wanted), Implicit(), solver)


class KsdGradientMaker(PreconditionedGradientMaker):
    """Krylov subspace descent as a gradient maker; see `KsdGradientConfig`."""

    Config = KsdGradientConfig


@dataclass(frozen=True, kw_only=True)
class SaddleFreeGradientConfig(MatrixFreeConfig):
    """Saddle-free Newton: ``P g = (|H| + damping)^-1 g`` in a Krylov space of the Hessian and the last step.

    Reference: Dauphin et al., NeurIPS 2014, arXiv:1406.2572, section 6; its dense form is ``newton``.
    """

    damping: float = 1e-2
    dimension: int = 20
    curvature: Curvature = Hessian()

    def _triple(self) -> Triple:
        return Triple(self.measured(), Implicit(), Krylov(damping=self.damping, dimension=self.dimension))


class SaddleFreeGradientMaker(PreconditionedGradientMaker):
    """Saddle-free Newton as a gradient maker; see `SaddleFreeGradientConfig`."""

    Config = SaddleFreeGradientConfig


@dataclass(frozen=True, kw_only=True)
class CurveballGradientConfig(MatrixFreeConfig):
    """CurveBall: ``P g = -z``, ``z <- rho z - beta ((G + lambda I) z + g)``; see `CurveBall`.

    Reference: Henriques, Ehrhardt, Albanie & Vedaldi, ICCV 2019, arXiv:1805.08095, algorithm 1.
    """

    damping: float = 1.0
    """The first ``lambda``."""
    rho: float | None = None
    beta: float | None = None
    """With ``rho``: fixed, as 0.9 and 0.1; None: the best at every step."""
    adapt: bool = True

    def _triple(self) -> Triple:
        solver = CurveBall(damping=self.damping, rho=self.rho, beta=self.beta)
        if not self.adapt:
            solver = CurveBall(damping=self.damping, rho=self.rho, beta=self.beta, adapt=None)
        return Triple(self.measured(), Implicit(), solver)


class CurveballGradientMaker(PreconditionedGradientMaker):
    """CurveBall as a gradient maker; see `CurveballGradientConfig`."""

    Config = CurveballGradientConfig
