"""TNT: a tensor-normal distribution of gradients of the sampled loss."""

from __future__ import annotations

from dataclasses import dataclass

from gradmaker.capture.sites import Site
from gradmaker.config import GradientConfig
from gradmaker.curvature import Curvature, SampledGradient
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import Dense, TensorNormal
from gradmaker.schedule import Schedule
from gradmaker.solvers import Cholesky
from gradmaker.triple import Triple

__all__ = ["TntGradientConfig", "TntGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class TntGradientConfig(GradientConfig):
    """TNT: ``P = (H_1 + damping)^-1 (x) ... (x) (H_k + damping)^-1`` with the balanced factors of a tensor-normal gradient.

    A layer is the matrix ``[W b]``, a convolution's filters are its rows; ``damping`` is added to every factor. Norm layers
    get their 2 x 2 blocks, what is not a layer ``fallback``. ``fisher`` may also give examples (FisherMC, ...), each of which
    is then a gradient of its own: exact for a single example, but no longer one contraction a batch.

    Reference: Ren & Goldfarb, NeurIPS 2021, arXiv:2106.02925, algorithm 2; decay and intervals are those of its MLPs.
    """

    damping: float = 0.1
    decay: float | None = 0.9
    fisher: Curvature = SampledGradient(samples=1)
    preconditioner_interval: int | Schedule = 20
    warmup_steps: int = 100
    """Fresh inverses while the average is young: a gradient a batch has few of the directions."""

    def triple(self, site: Site) -> Triple | None:
        if site.kind == "generic":
            return None
        if site.kind == "scale":
            return Triple(self.fisher, Dense(granularity="unit"), Cholesky(damping=self.damping))
        return Triple(self.fisher, TensorNormal(granularity="layer"), Cholesky(damping=self.damping, split="each"))


@register("tnt")
class TntGradientMaker(Preconditioned[TntGradientConfig]):
    """TNT as a gradient maker; see `TntGradientConfig`."""

    Config = TntGradientConfig
