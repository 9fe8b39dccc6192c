"""Kronecker factors that are held inverted and updated directly: KrADagrad*."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradmaker.config import check_choice
from gradmaker.curvature import BatchGradient
from gradmaker.methods.axes import AxesGradientConfig
from gradmaker.preconditioner import PreconditionedGradientMaker
from gradmaker.representations import InverseDims
from gradmaker.representations.inverse_dims import Denominator
from gradmaker.schedule import Schedule
from gradmaker.sites import Site
from gradmaker.solvers import PositiveRoot
from gradmaker.triple import Triple

__all__ = ["KradagradStarGradientConfig", "KradagradStarGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class KradagradStarGradientConfig(AxesGradientConfig):
    """KrADagrad*: ``P G = G x_1 L_1^(1/2k) ... x_k L_k^(1/2k)``, ``L_m`` the inverse of Shampoo's statistic, updated directly.

    ``damping`` is the ridge that ``L`` starts from, relative to the first gradient's statistic. ``denominator='exact'`` is an
    array update that equals Shampoo in exact arithmetic and keeps its digits in float32; ``tr``, ``fro``, ``op`` and ``d-tr``
    are the scalar forms. ``compat='kradagrad'`` reproduces the authors' release: ``d-tr``, an absolute ridge, gradients at
    weight one, the length of the gradient, a ridge of 1e-8 under the root.

    Reference: Mei, Moreno, Walters 2023, arXiv:2305.19416; the array form: our specification.
    """

    damping: float = 1e-6
    decay: float | None = None
    norm: str = "keep"
    preconditioner_interval: int | Schedule = 20
    warmup_steps: int = 5
    denominator: Denominator = "exact"
    compat: Literal["none", "kradagrad"] = "none"

    def __post_init__(self) -> None:
        check_choice("compat", self.compat, ["none", "kradagrad"])
        if self.compat == "kradagrad":
            object.__setattr__(self, "denominator", "d-tr")
            object.__setattr__(self, "norm", "keep")
        super().__post_init__()
        self._state()

    def _state(self) -> InverseDims:
        published = self.compat == "kradagrad"
        return InverseDims(self.denominator, self.damping, not published, published)

    def triple(self, site: Site) -> Triple | None:
        return Triple(BatchGradient(), self._state(), PositiveRoot(damping=1e-8 if self.compat == "kradagrad" else 0.0))


class KradagradStarGradientMaker(PreconditionedGradientMaker):
    """KrADagrad* as a gradient maker; see `KradagradStarGradientConfig`."""

    Config = KradagradStarGradientConfig
