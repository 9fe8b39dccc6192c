"""Newton's method and its matrix-free relatives: Hessian or Gauss-Newton matrix, by products with vectors.

All of them repeat or differentiate the declared loss, so that they do not `attach`. The matrix-free ones measure and solve at
every step, whatever the intervals: a product ends with the graph of its step.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

from gradmaker.capture.sites import Site
from gradmaker.config import COVERS_ALL, ONE_BLOCK, GradientConfig
from gradmaker.curvature import Curvature, GaussNewton
from gradmaker.curvature.hessian import Products
from gradmaker.options.checks import check_count
from gradmaker.representations import Implicit
from gradmaker.triple import Triple

__all__ = ["MatrixFreeConfig"]


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
