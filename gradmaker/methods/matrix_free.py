"""Newton's method and its matrix-free relatives: Hessian or Gauss-Newton matrix, by products with vectors.

All of them repeat or differentiate the declared loss, so that they do not `attach`. The matrix-free ones measure and solve at
every step, whatever the intervals: a product ends with the graph of its step.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from gradmaker.config import GradientConfig, check_choice
from gradmaker.curvature import Curvature, GaussNewton, Hessian
from gradmaker.preconditioner import PreconditionedGradientMaker
from gradmaker.representations import Dense, Diagonal, Implicit
from gradmaker.sites import Site
from gradmaker.solvers import LU, AbsoluteDivision, AbsoluteEigh, CurveBall, Krylov, LevenbergMarquardt, Neumann, TruncatedCG
from gradmaker.triple import Triple

__all__ = [
    "CurveballGradientConfig",
    "CurveballGradientMaker",
    "HessianFreeGradientConfig",
    "HessianFreeGradientMaker",
    "KsdGradientConfig",
    "KsdGradientMaker",
    "LissaGradientConfig",
    "LissaGradientMaker",
    "NeumannGradientConfig",
    "NeumannGradientMaker",
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
        if self.granularity == "diagonal" and not self.absolute:
            raise ValueError("absolute=False: a negative diagonal entry has no Newton step; choose granularity full or layer")

    def triple(self, site: Site) -> Triple | None:
        if self.granularity == "diagonal":
            return Triple(self.curvature, Diagonal(granularity="layer"), AbsoluteDivision(damping=self.damping))
        solver = AbsoluteEigh(damping=self.damping) if self.absolute else LU(damping=self.damping)
        return Triple(self.curvature, Dense(granularity="full" if self.granularity == "full" else "layer"), solver)


class NewtonGradientMaker(PreconditionedGradientMaker):
    """Newton's method as a gradient maker; see `NewtonGradientConfig`."""

    Config = NewtonGradientConfig


@dataclass(frozen=True, kw_only=True)
class _MatrixFreeConfig(GradientConfig):
    damping: float = 1e-3
    decay: float | None = 0.0
    """Without effect: a product ends with its step."""
    curvature: Curvature = GaussNewton()
    """GaussNewton or Hessian."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._triple()

    @abstractmethod
    def _triple(self) -> Triple:
        """The parts, the same for every site."""

    def triple(self, site: Site) -> Triple | None:
        return self._triple()


@dataclass(frozen=True, kw_only=True)
class HessianFreeGradientConfig(_MatrixFreeConfig):
    """Hessian-free optimization: ``(G + lambda I) P g = g`` by truncated, preconditioned CG; see `TruncatedCG`.

    The last solution is where the next one starts, the best of the stored iterates is taken, and ``lambda`` follows the rule of
    Levenberg and Marquardt: for a step of the learning rate 1.

    Reference: Martens, ICML 2010; Martens & Sutskever, 2012.
    """

    damping: float = 1.0
    """The first ``lambda``."""
    iterations: int = 250
    tolerance: float = 5e-4
    warm: float = 0.95
    preconditioner: float = 0.75
    backtrack: bool = True
    adapt: bool = True

    def _triple(self) -> Triple:
        solver = TruncatedCG(
            damping=self.damping,
            iterations=self.iterations,
            tolerance=self.tolerance,
            warm=self.warm,
            preconditioner=self.preconditioner,
            backtrack=self.backtrack,
            adapt=LevenbergMarquardt() if self.adapt else None,
        )
        return Triple(self.curvature, Implicit(), solver)


class HessianFreeGradientMaker(PreconditionedGradientMaker):
    """Hessian-free optimization as a gradient maker; see `HessianFreeGradientConfig`."""

    Config = HessianFreeGradientConfig


@dataclass(frozen=True, kw_only=True)
class KsdGradientConfig(_MatrixFreeConfig):
    """Krylov subspace descent: the quadratic model's minimum in the span of ``g, G g, ..., G^(K-1) g`` and the last step.

    Reference: Vinyals & Povey, AISTATS 2012, arXiv:1111.4259, whose search in the subspace is replaced by the model's minimum.
    """

    damping: float = 1e-2
    dimension: int = 20
    precondition: bool = False
    """Whether the space is built with the squared gradient, floored, as a diagonal preconditioner."""

    def _triple(self) -> Triple:
        return Triple(
            self.curvature,
            Implicit(),
            Krylov(damping=self.damping, dimension=self.dimension, precondition=self.precondition),
        )


class KsdGradientMaker(PreconditionedGradientMaker):
    """Krylov subspace descent as a gradient maker; see `KsdGradientConfig`."""

    Config = KsdGradientConfig


@dataclass(frozen=True, kw_only=True)
class SaddleFreeGradientConfig(KsdGradientConfig):
    """Saddle-free Newton: ``P g = (|H| + damping)^-1 g`` in a Krylov space of the Hessian and the last step.

    Reference: Dauphin et al., NeurIPS 2014, arXiv:1406.2572, section 6; its dense form is ``newton``.
    """

    curvature: Curvature = Hessian()


class SaddleFreeGradientMaker(PreconditionedGradientMaker):
    """Saddle-free Newton as a gradient maker; see `SaddleFreeGradientConfig`."""

    Config = SaddleFreeGradientConfig


@dataclass(frozen=True, kw_only=True)
class LissaGradientConfig(_MatrixFreeConfig):
    """LiSSA: ``P g = eta sum_(j=0..terms) (I - eta (G + damping))^j g``, on the batch of the step.

    Reference: Agarwal, Bullins & Hazan, JMLR 2017, arXiv:1602.03943, algorithm 1 with ``S_1 = 1``; it takes a fresh sample for
    every term, where this takes the batch.
    """

    damping: float = 1e-2
    terms: int = 50
    scale: float | None = None
    """``1 / eta``; None: 1.1 times the largest eigenvalue, by power iteration."""

    def _triple(self) -> Triple:
        return Triple(self.curvature, Implicit(), Neumann(damping=self.damping, terms=self.terms, scale=self.scale))


class LissaGradientMaker(PreconditionedGradientMaker):
    """LiSSA as a gradient maker; see `LissaGradientConfig`."""

    Config = LissaGradientConfig


@dataclass(frozen=True, kw_only=True)
class NeumannGradientConfig(LissaGradientConfig):
    """Neumann optimizer, idealised: ``P g = -eta m_K``, ``m_k = (I - eta H) m_(k-1) - g``, ``m_0 = -g``, without damping.

    The paper's gradients at displaced weights, ``g + eta H m`` to first order, are products with the Hessian here.

    Reference: Krishnan, Xiao & Saurous, ICLR 2018, arXiv:1712.03298, algorithm 1.
    """

    damping: float = 0.0
    terms: int = 10
    curvature: Curvature = Hessian()


class NeumannGradientMaker(PreconditionedGradientMaker):
    """The Neumann optimizer as a gradient maker; see `NeumannGradientConfig`."""

    Config = NeumannGradientConfig


@dataclass(frozen=True, kw_only=True)
class CurveballGradientConfig(_MatrixFreeConfig):
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
        return Triple(self.curvature, Implicit(), solver)


class CurveballGradientMaker(PreconditionedGradientMaker):
    """CurveBall as a gradient maker; see `CurveballGradientConfig`."""

    Config = CurveballGradientConfig
