"""The mini-batch gradient as evidence: the second moment over steps that AdaGrad, Adam and Shampoo accumulate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from gradmaker.curvature.base import Curvature
from gradmaker.curvature.evidence import Evidence, Gradient

if TYPE_CHECKING:
    from gradmaker.step import Step

__all__ = ["BatchGradient"]


@dataclass(frozen=True, kw_only=True)
class BatchGradient(Curvature):
    """``C = sum_t w_t g_t g_t^T`` of mini-batch gradients ``g_t``; no pass beyond the ordinary backward.

    Reference: Duchi, Hazan & Singer, JMLR 2011, section 1.1.
    """

    gives: ClassVar[tuple[type[Evidence], ...]] = (Gradient,)
    layerwise: ClassVar[bool] = False

    def measure(self, step: Step) -> Iterator[dict[str, Evidence]]:
        found = ((site, site.read()) for site in step.sites)
        yield {site.name: Gradient(g.to(step.statistics_dtype(site))) for site, g in found if g is not None}
