"""TNT: a tensor-normal model of gradients at sampled targets."""

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

    A layer is the matrix ``[W b]``, with a row for each filter of a convolution; ``damping`` is added to every factor. Norm
    layers get 2 x 2 blocks, parameters outside of layers ``fallback``. ``fisher`` may also give per-example gradients
    (FisherMC, ...): exact for a single example, but more than one contraction for a batch.

    Reference: Ren & Goldfarb, NeurIPS 2021, arXiv:2106.02925, algorithm 2; decay and intervals as for its MLPs.
    """

    damping: float = 0.1
    decay: float | None = 0.9
    fisher: Curvature = SampledGradient(samples=1)
    preconditioner_interval: int | Schedule = 20
    warmup_steps: int = 100
    """Inverses at every step while the average has few gradients: each batch adds one."""

    def triple(self, site: Site) -> Triple | None:
        if site.kind == "generic":
            return None
        if site.kind == "scale":
            return Triple(self.fisher, Dense(granularity="unit"), Cholesky(damping=self.damping))
        solver = Cholesky(damping=self.damping, split="each", interval=self.steps_of_refresh)
        return Triple(self.fisher, TensorNormal(granularity="layer"), solver)


@register("tnt")
class TntGradientMaker(Preconditioned[TntGradientConfig]):
    """TNT as a gradient maker; see `TntGradientConfig`."""

    Config = TntGradientConfig
