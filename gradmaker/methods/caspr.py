"""CASPR: a Kronecker-sum approximation of full-matrix AdaGrad."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradmaker.capture.shapes import Merge
from gradmaker.capture.sites import Site
from gradmaker.curvature import BatchGradient
from gradmaker.methods.tensor_axes import RootedGradientConfig
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import KronDims, KronSum, RootKronDims
from gradmaker.schedule import Schedule
from gradmaker.solvers import AxisMean
from gradmaker.triple import Triple
from gradmaker.usage import Usage

__all__ = ["CasprGradientConfig", "CasprGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class CasprGradientConfig(RootedGradientConfig):
    """CASPR: ``P G = (J L + R J) / 2``, ``J = (L G + G R) / 2``, ``L, R`` inverse fourth roots of the statistics of the axes.

    ``p`` generalises: ``[(1/m) sum_k H_k^(-1/2p)]^p`` over the axes; ``p=None`` takes their number, ``p='inf'`` is Shampoo.
    The authors' code uses bias-corrected Nesterov averages with the length of NAdam's step, after 101 steps of NAdam itself:
    ``grafting='adam'``, ``start_step=101``. The weights of these averages sum to one here, and to
    ``(1 - b^(t+1)) / (1 - b^t)``, ``b = beta1``, in that code: a longer step at first. The regret bound needs
    ``decay=None``.

    Reference: Duvvuri, Devvrit, Anil, Hsieh & Dhillon, ICLR 2024, algorithm 1 and section 5 (ridge 1e-6).
    """

    usage = Usage(hidden=True)
    damping: float = 1e-6
    decay: float | None = 0.999
    beta1: float = 0.9
    nesterov_average: bool = True
    grafting: str = "adam"
    preconditioner_interval: int | Schedule = 20
    warmup_steps: int = 5
    merge: Merge = "to_2d"
    p: int | Literal["inf"] | None = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.p != "inf":
            KronSum(self.p)

    def triple(self, site: Site) -> Triple | None:
        axes, by_roots = len(site.shape[1:]) or 1, self.root == "svd"
        if self.p == "inf":
            product = RootKronDims() if by_roots else KronDims()
            self.check_root(product.order(axes))
            return Triple(BatchGradient(), product, self.rooter())
        held = KronSum(self.p, by_roots)
        self.check_root(held.passes(axes))
        return Triple(BatchGradient(), held, AxisMean(damping=self.damping, root=self.root, mode=self.mode))


@register("caspr")
class CasprGradientMaker(Preconditioned[CasprGradientConfig]):
    """CASPR as a gradient maker; see `CasprGradientConfig`."""

    Config = CasprGradientConfig
