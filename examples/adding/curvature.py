"""A curvature: the second moment of mini-batch gradients that are clipped first."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import ClassVar

from gradmaker import register
from gradmaker.curvature import BatchGradient, Curvature, Evidence, Gradient, kinds
from gradmaker.curvature.step import Step
from gradmaker.options.checks import check_interval


@register
@dataclass(frozen=True, kw_only=True)
class ClippedGradient(Curvature):
    """``C = sum_t w_t u_t u_t^T`` with ``u_t = g_t min(1, length / |g_t|)`` for the gradient ``g_t`` of each block.

    The statistic is bounded by ``length^2``, whatever a single outlier is.

    Reference: Chezhegov et al., ICML 2025, arXiv:2406.04443 (Clip-Adam, Clip-AdaGrad).
    """

    gives: ClassVar = kinds(Gradient)
    layerwise: ClassVar[bool] = False
    inapplicable = BatchGradient.inapplicable

    length: float = 1.0

    def __post_init__(self) -> None:
        check_interval("length", self.length, 0, inf)

    def measure(self, step: Step) -> Iterator[dict[str, Evidence]]:
        for site in step.sites:
            if (found := site.read()) is not None:
                g = found.to(step.statistics_dtype(site))
                yield {site.name: Gradient(g * (self.length / g.norm().clamp(min=self.length)))}
