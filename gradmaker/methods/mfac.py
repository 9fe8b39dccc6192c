"""M-FAC: the empirical Fisher matrix of a window of mini-batch gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradmaker.capture.sites import Site
from gradmaker.config import COVERS_ALL, ONE_BLOCK, GradientConfig
from gradmaker.curvature import BatchGradient
from gradmaker.options.checks import check_choice, check_count
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import Window
from gradmaker.solvers import Gram
from gradmaker.triple import Triple

__all__ = ["MfacGradientConfig", "MfacGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class MfacGradientConfig(GradientConfig):
    """M-FAC: ``P g = (damping + (1/m) sum_j r_j r_j^T)^-1 g`` over the last ``m = window`` mini-batch gradients ``r_j``.

    ``warmup='size'`` divides by ``m`` also while the window fills, as published; ``'mean'`` by the number of gradients in it.

    Reference: Frantar, Kurtic & Alistarh, NeurIPS 2021, arXiv:2107.03356, section 3.2; defaults of the authors' code.
    """

    inapplicable = BatchGradient.inapplicable | Window.inapplicable | COVERS_ALL | ONE_BLOCK

    damping: float = 1e-5
    decay: float | None = None
    window: int = 1024
    warmup: Literal["size", "mean"] = "size"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("window", self.window, 1)
        check_choice("warmup", self.warmup, ["size", "mean"])

    def triple(self, site: Site) -> Triple | None:
        return Triple(BatchGradient(), Window(size=self.window, scale=self.warmup), Gram(damping=self.damping))


@register("mfac")
class MfacGradientMaker(Preconditioned[MfacGradientConfig]):
    """M-FAC as a gradient maker; see `MfacGradientConfig`."""

    Config = MfacGradientConfig
