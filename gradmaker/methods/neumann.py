"""The Neumann optimizer in its idealised and its practical form (Krishnan, Xiao & Saurous 2018)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from gradmaker.capture.sites import Site
from gradmaker.config import COVERS_ALL, ONE_BLOCK, GradientConfig
from gradmaker.curvature import Curvature, Hessian
from gradmaker.curvature.gradient import DisplacedGradient
from gradmaker.methods.matrix_free import MatrixFreeConfig
from gradmaker.options.registry import register
from gradmaker.passes.vectors import Layout
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import Implicit
from gradmaker.representations.position import Position
from gradmaker.solvers import Neumann
from gradmaker.solvers.displaced_neumann import DisplacedNeumann
from gradmaker.triple import Triple

__all__ = ["NeumannGradientConfig", "NeumannGradientMaker", "NeumannPracticalGradientConfig", "NeumannPracticalGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class NeumannGradientConfig(MatrixFreeConfig):
    """Neumann optimizer, idealised: ``P g = -eta m_K``, ``m_k = (I - eta H) m_(k-1) - g``, ``m_0 = -g``, without damping.

    Here Hessian-vector products replace the paper's gradients at displaced weights, ``g + eta H m`` to first order.

    Reference: Krishnan, Xiao & Saurous, ICLR 2018, arXiv:1712.03298, algorithm 1.
    """

    damping: float = 0.0
    terms: int = 10
    scale: float | None = None
    """``1 / eta``; None: 1.1 times the largest eigenvalue, by power iteration."""
    curvature: Curvature = Hessian()

    def _triple(self) -> Triple:
        solver = Neumann(damping=self.damping, terms=self.terms, scale=self.scale)
        return Triple(self.measured(), Implicit(), solver)


@register("neumann")
class NeumannGradientMaker(Preconditioned[NeumannGradientConfig]):
    """The Neumann optimizer as a gradient maker; see `NeumannGradientConfig`."""

    Config = NeumannGradientConfig


@dataclass(frozen=True, kw_only=True)
class NeumannPracticalGradientConfig(GradientConfig):
    """Neumann optimizer, practical: one gradient per step, at weights displaced by ``mu m``; see `DisplacedNeumann`.

    It needs only gradients, and SGD without momentum at the learning rate ``rate``. Between steps the model has the displaced
    weights; inside `NeumannPracticalGradientMaker.undisplaced` it has the weights of the method. In the paper the first
    ``period`` is 10 epochs, after ``plain`` steps for 5 epochs.

    Reference: Krishnan, Xiao & Saurous, ICLR 2018, arXiv:1712.03298, algorithm 2 and section 4.
    """

    inapplicable = (
        DisplacedGradient.inapplicable
        | Position.inapplicable
        | COVERS_ALL
        | ONE_BLOCK
        | {"damping": "no matrix is inverted; beta and alpha keep the weights in bounds"}
    )

    damping: float | None = None
    decay: float | None = 0.0
    rate: float = 0.1
    """The learning rate of the optimizer."""
    alpha: float = 1e-7
    beta: float | None = None
    """Coefficients of the cubic and the repulsive regularizer about the average weights; beta None: 1e-5 times their number."""
    average: float = 0.99
    """Weight of the OLD average of the weights."""
    peak: float = 0.9
    """Final value of ``mu``, which starts at 1/2."""
    period: int = 1000
    """Steps from the first reset to the second; the following distances are 2, 4, ... times as long."""
    plain: int = 0
    """Number of first steps that use the gradient itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._solver()

    def _solver(self) -> DisplacedNeumann:
        return DisplacedNeumann(
            rate=self.rate,
            alpha=self.alpha,
            beta=self.beta,
            average=self.average,
            peak=self.peak,
            period=self.period,
            plain=self.plain,
        )

    def triple(self, site: Site) -> Triple | None:
        return Triple(DisplacedGradient(), Position(), self._solver())


@register("neumann_practical")
class NeumannPracticalGradientMaker(Preconditioned[NeumannPracticalGradientConfig]):
    """The practical Neumann optimizer as a gradient maker; see `NeumannPracticalGradientConfig`."""

    Config = NeumannPracticalGradientConfig

    @contextmanager
    def undisplaced(self) -> Iterator[None]:
        """Context in which the model has the undisplaced weights ``w - mu m``: to evaluate or save it."""
        blocks = [b for b in self.plan.blocks if "m" in b.cache]
        kept = {p: p.detach().clone() for b in blocks for s in b.sites for p in s.parameters.values()}
        try:
            with torch.no_grad():
                for block in blocks:
                    displacement = Layout(block.sites).spread(block.cache["mu"] * block.cache["m"])
                    for p, d in displacement.items():
                        p.sub_(d[0])
            yield
        finally:
            with torch.no_grad():
                for p, value in kept.items():
                    p.copy_(value)
