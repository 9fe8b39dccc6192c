"""Options of matrix-free methods, which use the Hessian or the Gauss-Newton matrix by products with vectors.

They evaluate or differentiate the declared loss again, so that they cannot `attach`. They measure and solve at every step,
whatever the intervals are: a product needs the graph of its step.
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
    """Options of methods that use curvature-vector products."""

    inapplicable = Implicit.inapplicable | COVERS_ALL | ONE_BLOCK

    damping: float = 1e-3
    decay: float | None = 0.0
    """Without effect: a product is valid only in its step."""
    curvature: Curvature = GaussNewton()
    """The matrix: GaussNewton or Hessian."""
    curvature_examples: int | None = None
    """Number of examples for products, drawn at every step; None: all. `setup_curvature_call` declares other data for them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.curvature_examples is not None:
            check_count("curvature_examples", self.curvature_examples, 1)
        self._triple()

    def inapplicable_options(self) -> dict[str, str]:
        """Also the options without effect on the curvature, as `measured` configures it."""
        own, measured = self.curvature.inapplicable, self._triple().curvature.inapplicable
        return {name: why for name, why in super().inapplicable_options().items() if name not in own or name in measured}

    def measured(self, **options: Any) -> Curvature:
        """The curvature with the options that the method sets.  options: fields of `Products`"""
        if self.curvature_examples is not None:
            options["examples"] = self.curvature_examples
        return replace(self.curvature, **options) if options and isinstance(self.curvature, Products) else self.curvature

    @abstractmethod
    def _triple(self) -> Triple:
        """The triple, the same for every site."""

    def triple(self, site: Site) -> Triple | None:
        return self._triple()
