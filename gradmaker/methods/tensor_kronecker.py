"""Relatives of Shampoo: full-matrix AdaGrad, one-sided Shampoo, CASPR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradmaker.config import check_choice
from gradmaker.curvature import BatchGradient
from gradmaker.methods.axes import AxesGradientConfig, rooting
from gradmaker.preconditioner import PreconditionedGradientMaker
from gradmaker.representations import Dense, KronDims, KronSum, OneSided
from gradmaker.schedule import Schedule
from gradmaker.shapes import Merge, ShapePolicy
from gradmaker.sites import Site
from gradmaker.solvers import AxisMean, Eigh
from gradmaker.triple import Triple

__all__ = [
    "CasprGradientConfig",
    "CasprGradientMaker",
    "FullAdagradGradientConfig",
    "FullAdagradGradientMaker",
    "OneSidedGradientConfig",
    "OneSidedGradientMaker",
]


@dataclass(frozen=True, kw_only=True)
class FullAdagradGradientConfig(AxesGradientConfig):
    """Full-matrix AdaGrad: ``P g = (sum_t g_t g_t^T + damping lambda_max I)^(-1/2) g`` for each tensor.

    ``block_size`` cuts tensors whose matrix would be too large.

    Reference: Duchi, Hazan & Singer, JMLR 2011, section 1.1.
    """

    damping: float = 1e-8
    decay: float | None = None
    max_dim: int = 4096

    def triple(self, site: Site) -> Triple | None:
        solver = Eigh(power=-0.5, damping=self.damping, split="exact", relative=True)
        return Triple(BatchGradient(), Dense(granularity="layer"), solver)


class FullAdagradGradientMaker(PreconditionedGradientMaker):
    """Full-matrix AdaGrad as a gradient maker; see `FullAdagradGradientConfig`."""

    Config = FullAdagradGradientConfig


@dataclass(frozen=True, kw_only=True)
class OneSidedGradientConfig(AxesGradientConfig):
    """One-sided Shampoo, ASGO: ``P G = (sum_t G_t G_t^T + damping lambda_max I)^(-1/2) G``, or its mirror from the right.

    Reference: Xie et al., 2025, arXiv:2502.10273; An et al., 2025, arXiv:2503.20762, algorithm 1.
    """

    damping: float = 1e-6
    decay: float | None = 0.95
    norm: str = "keep"
    preconditioner_interval: int | Schedule = 10
    warmup_steps: int = 5
    merge: Merge = "to_2d"
    side: Literal["short", "left", "right"] = "short"
    """The axis that has a factor: the shorter one, the rows (outputs), or the columns (inputs)."""
    root: Literal["eigh", "newton"] = "eigh"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("side", self.side, ["short", "left", "right"])
        check_choice("root", self.root, ["eigh", "newton"])

    @property
    def shapes(self) -> ShapePolicy:  # type: ignore[override]
        """Blocks whose first axis is the one with a factor."""
        return ShapePolicy(self.merge, self.block_size, self.side)

    def triple(self, site: Site) -> Triple | None:
        return Triple(BatchGradient(), OneSided(), rooting(self.root, self.damping))


class OneSidedGradientMaker(PreconditionedGradientMaker):
    """One-sided Shampoo as a gradient maker; see `OneSidedGradientConfig`."""

    Config = OneSidedGradientConfig


@dataclass(frozen=True, kw_only=True)
class CasprGradientConfig(AxesGradientConfig):
    """CASPR: ``P G = (J L + R J) / 2``, ``J = (L G + G R) / 2``, ``L, R`` inverse fourth roots of the axes' statistics.

    ``p`` generalises: ``[(1/m) sum_k H_k^(-1/2p)]^p`` over the axes; ``p=None`` takes their number, ``p='inf'`` is Shampoo.
    Its code runs on bias-corrected Nesterov averages with the length of NAdam's step, after 100 steps of NAdam itself:
    ``norm='adam'``, ``start_step=101``. The regret bound is that of ``decay=None``.

    Reference: Duvvuri, Devvrit, Anil, Hsieh & Dhillon, ICLR 2024, algorithm 1 and section 5 (ridge 1e-6).
    """

    damping: float = 1e-6
    decay: float | None = 0.999
    momentum: float = 0.9
    nesterov: bool = True
    norm: str = "adam"
    preconditioner_interval: int | Schedule = 20
    warmup_steps: int = 5
    merge: Merge = "to_2d"
    p: int | Literal["inf"] | None = 2
    root: Literal["eigh", "newton"] = "eigh"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("root", self.root, ["eigh", "newton"])
        if self.p != "inf":
            KronSum(self.p)

    def triple(self, site: Site) -> Triple | None:
        if self.p == "inf":
            return Triple(BatchGradient(), KronDims(), rooting(self.root, self.damping))
        return Triple(BatchGradient(), KronSum(self.p), AxisMean(damping=self.damping, root=self.root))


class CasprGradientMaker(PreconditionedGradientMaker):
    """CASPR as a gradient maker; see `CasprGradientConfig`."""

    Config = CasprGradientConfig
