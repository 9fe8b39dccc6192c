"""KL-Shampoo: Kronecker factors, each measured on gradients preconditioned by the inverses of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gradmaker.capture.shapes import Merge
from gradmaker.capture.sites import Site
from gradmaker.curvature import BatchGradient
from gradmaker.methods.tensor_axes import AxesGradientConfig
from gradmaker.options.deprecations import BASIS_INTERVAL
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.presets import Presets
from gradmaker.representations import CrossDims
from gradmaker.schedule import Schedule
from gradmaker.solvers import PositiveRoot
from gradmaker.triple import Triple
from gradmaker.usage import Usage

__all__ = ["KlShampooGradientConfig", "KlShampooGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class KlShampooGradientConfig(AxesGradientConfig):
    """KL-Shampoo: ``P G = S_1^(-1/2) M S_2^(-1/2)``, ``S_1 = E[G S_2^-1 G^T] / n`` and ``S_2 = E[G^T S_1^-1 G] / m``.

    Both equations hold at the fixed point. ``damping`` is a lower bound of the eigenvalues before inversion. The result has the
    scale of a whitened gradient; no grafting.

    Reference: Lin et al. 2025, arXiv:2509.03378.
    """

    renamed_options = BASIS_INTERVAL

    usage = Usage(hidden=True, unit=True)
    presets: ClassVar[Presets] = {
        "large": {"max_dim": 1024, "curvature_interval": 10, "preconditioner_interval": 100, "stagger": True}
    }
    damping: float = 1e-8
    decay: float | None = 0.98
    beta1: float = 0.9
    merge: Merge = "to_2d"
    preconditioner_interval: int | Schedule = 10
    stagger: bool = False
    start: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._state()

    def _state(self) -> CrossDims:
        return CrossDims(self.start, self.damping)

    def triple(self, site: Site) -> Triple | None:
        return Triple(BatchGradient(), self._state(), PositiveRoot(interval=self.steps_of_refresh))


@register("kl_shampoo")
class KlShampooGradientMaker(Preconditioned[KlShampooGradientConfig]):
    """KL-Shampoo as a gradient maker; see `KlShampooGradientConfig`."""

    Config = KlShampooGradientConfig
