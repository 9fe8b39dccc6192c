"""LiSSA: a Neumann series of the inverse curvature, with examples drawn for each term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from gradmaker.methods.matrix_free import MatrixFreeConfig
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import Implicit
from gradmaker.solvers import Neumann
from gradmaker.triple import Triple

__all__ = ["LissaGradientConfig", "LissaGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class LissaGradientConfig(MatrixFreeConfig):
    """LiSSA: ``P g = eta sum_(j=0..terms) (I - eta (G_j + damping))^j g``, each ``G_j`` on newly drawn examples.

    ``curvature_examples`` is their number; None: all ``G_j`` are that of the whole batch. ``P g`` is an unbiased estimate of
    the series with the matrix of the batch; ``repeats`` estimates are averaged (``terms`` and ``repeats`` are ``S_2`` and
    ``S_1`` of the paper). ``1 / eta`` has to bound every ``G_j``.

    Reference: Agarwal, Bullins & Hazan, JMLR 2017, arXiv:1602.03943, algorithm 1.
    """

    only_with: ClassVar[dict[str, dict[str, Any]]] = {"repeats": {"curvature_examples": bool}}

    damping: float = 1e-2
    terms: int = 50
    repeats: int = 1
    scale: float | None = None
    """``1 / eta``; None: 1.1 times the largest eigenvalue found by a power iteration."""

    def _triple(self) -> Triple:
        solver = Neumann(damping=self.damping, terms=self.terms, repeats=self.repeats, scale=self.scale)
        wanted = {} if self.curvature_examples is None else {"fresh": True}
        return Triple(self.measured(**wanted), Implicit(), solver)


@register("lissa")
class LissaGradientMaker(Preconditioned[LissaGradientConfig]):
    """LiSSA as a gradient maker; see `LissaGradientConfig`."""

    Config = LissaGradientConfig
