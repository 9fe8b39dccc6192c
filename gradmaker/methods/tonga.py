"""TONGA: a truncated eigendecomposition of the running second moment of gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradmaker.capture.sites import Site
from gradmaker.config import COVERS_ALL, ONE_BLOCK, GradientConfig
from gradmaker.curvature import BatchGradient
from gradmaker.options.checks import check_count
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import Truncated
from gradmaker.solvers import Gram
from gradmaker.triple import Triple

__all__ = ["TongaGradientConfig", "TongaGradientMaker", "TongaUnitGradientConfig", "TongaUnitGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class TongaGradientConfig(GradientConfig):
    """TONGA: ``P g = (C + damping)^-1 g``, ``C`` the running average of ``g_t g_t^T`` cut to ``rank`` every ``window`` steps.

    Reference: Le Roux, Manzagol & Bengio, NeurIPS 2007, "Topmoumoute online natural gradient algorithm", sections 4 and 5.
    """

    inapplicable = BatchGradient.inapplicable | Truncated.inapplicable | COVERS_ALL | ONE_BLOCK

    damping: float = 1e-3
    decay: float | None = 0.995
    rank: int = 10
    window: int = 50
    scale_preserving: bool = False
    """Whether to return ``damping P g``, as in the paper, which is close to ``g`` where the curvature is small."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "window"):
            check_count(name, getattr(self, name), 1)

    def triple(self, site: Site) -> Triple | None:
        return self._triple("full")

    def _triple(self, granularity: Literal["full", "unit"]) -> Triple:
        held = Truncated(rank=self.rank, window=self.window, granularity=granularity)
        return Triple(BatchGradient(), held, Gram(damping=self.damping, scale_preserving=self.scale_preserving))


@register("tonga")
class TongaGradientMaker(Preconditioned[TongaGradientConfig]):
    """TONGA as a gradient maker; see `TongaGradientConfig`."""

    Config = TongaGradientConfig


@dataclass(frozen=True, kw_only=True)
class TongaUnitGradientConfig(TongaGradientConfig):
    """Unit-wise TONGA: a block for the incoming weights and bias of each unit.

    Reference: Le Roux, Manzagol & Bengio, NeurIPS 2007, section 5 (block-diagonal version, rank 5).
    """

    inapplicable = BatchGradient.inapplicable | Truncated.inapplicable | COVERS_ALL

    rank: int = 5

    def triple(self, site: Site) -> Triple | None:
        return self._triple("unit")


@register("tonga_unit")
class TongaUnitGradientMaker(Preconditioned[TongaUnitGradientConfig]):
    """Unit-wise TONGA as a gradient maker; see `TongaUnitGradientConfig`."""

    Config = TongaUnitGradientConfig
