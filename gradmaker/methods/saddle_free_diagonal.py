"""Saddle-free Newton with the diagonal of the Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from gradmaker.capture.sites import Site
from gradmaker.config import COVERS_ALL, ONE_BLOCK
from gradmaker.curvature import Hessian, HessianProbe
from gradmaker.methods.hessian_probes import HessianProbeConfig
from gradmaker.options.checks import check_choice, check_count, check_interval
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import Dense, Diagonal, ProbeDiagonal
from gradmaker.solvers import AbsoluteDivision, AbsoluteEigh, Division
from gradmaker.triple import Triple

__all__ = ["SaddleFreeDiagonalGradientConfig", "SaddleFreeDiagonalGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class SaddleFreeDiagonalGradientConfig(HessianProbeConfig):
    """Diagonal saddle-free Newton: ``P g = g / (|mean v * H v| + damping)``, where the mean estimates ``diag H``.

    A Rademacher probe estimates entry ``i`` with the variance ``sum_(j != i) H_ij^2``, which the average reduces. Other
    ``entries`` take one product for each parameter in place of probes: ``hessian`` gives the exact ``|diag H|``, ``absolute``
    the diagonal of ``|H|``, for which the matrix of all parameters is held.

    Reference: Dauphin et al., NeurIPS 2014, arXiv:1406.2572, section 5 (absolute values); Bekas, Kokiopoulou, Saad 2007
    (diagonal).
    """

    inapplicable = HessianProbe.inapplicable | COVERS_ALL
    only_with: ClassVar[dict[str, dict[str, Any]]] = {"samples": {"entries": "probes"}}

    damping: float = 1e-3
    decay: float | None = 0.95
    samples: int = 1
    """Probes per measurement."""
    entries: Literal["probes", "hessian", "absolute"] = "probes"
    per_tensor: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("entries", self.entries, ["probes", "hessian", "absolute"])
        super().__post_init__()
        check_interval("damping", self.damping, 0, float("inf"))
        check_count("samples", self.samples, 1)

    def inapplicable_options(self) -> dict[str, str]:
        """Also the options without effect for this choice of ``entries``."""
        exact = Hessian().inapplicable
        held = {"probes": ProbeDiagonal.inapplicable, "hessian": exact | Diagonal.inapplicable, "absolute": exact | ONE_BLOCK}
        return super().inapplicable_options() | held[self.entries]

    def triple(self, site: Site) -> Triple | None:
        if self.entries == "absolute":
            return Triple(Hessian(mode=self.mode), Dense(granularity="full"), AbsoluteEigh(damping=self.damping, entries=True))
        if self.entries == "hessian":
            return Triple(Hessian(mode=self.mode), Diagonal(granularity="tensor"), AbsoluteDivision(damping=self.damping))
        probe = HessianProbe(samples=self.samples, mode=self.mode)
        return Triple(probe, ProbeDiagonal("signed"), Division(damping=self.damping))


@register("saddle_free_diagonal")
class SaddleFreeDiagonalGradientMaker(Preconditioned[SaddleFreeDiagonalGradientConfig]):
    """Saddle-free Newton of the diagonal as a gradient maker; see `SaddleFreeDiagonalGradientConfig`."""

    Config = SaddleFreeDiagonalGradientConfig
