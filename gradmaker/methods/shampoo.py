"""Shampoo: Kronecker factors on the axes of the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from gradmaker.capture.sites import Site
from gradmaker.curvature import BatchGradient
from gradmaker.methods.tensor_axes import RootedGradientConfig
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.presets import Presets
from gradmaker.representations import KronDims, RootKronDims
from gradmaker.schedule import Schedule
from gradmaker.triple import Triple
from gradmaker.usage import Usage

__all__ = ["ShampooGradientConfig", "ShampooGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class ShampooGradientConfig(RootedGradientConfig):
    """Shampoo: ``P G = G x_1 H_1^(-1/2k) ... x_k H_k^(-1/2k)`` with ``H_m`` the statistic of axis ``m`` of the gradient.

    ``damping`` is a ridge relative to each factor's largest eigenvalue. Vectors get full-matrix AdaGrad, which is Shampoo of
    order one. ``decay=None`` sums, as first published; ``grafting`` sets the length of the result.

    Reference: Gupta, Koren & Singer, ICML 2018, arXiv:1802.09568, algorithms 1 and 2; average, ridge and grafting: Anil et
    al., 2020, arXiv:2002.09018.
    """

    usage = Usage(hidden=True)
    presets: ClassVar[Presets] = {"large": {"max_dim": 1024, "curvature_interval": 10, "preconditioner_interval": 100}}
    damping: float = 1e-6
    decay: float | None = 0.95
    grafting: str = "keep"
    preconditioner_interval: int | Schedule = 20
    warmup_steps: int = 5
    only_with: ClassVar[dict[str, dict[str, Any]]] = {"balanced": {"exponent": bool, "grafting": "none"}}

    exponent: float | None = None
    """``e`` of ``H^(-e)`` on every axis, instead of ``1/2k``; 1/2 fits better (Morwani et al. 2024, arXiv:2406.17748)."""
    balanced: bool = False
    """Whether the scale is that of the exponent ``1/2k`` at any exponent: ``tr(L)^(1/2) L^(-1/2) G R^(-1/2)`` for a matrix."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._factors()

    def _factors(self) -> KronDims:
        make = RootKronDims if self.root == "svd" else KronDims
        return make(None if self.exponent is None else 2 * self.exponent, self.balanced)

    def triple(self, site: Site) -> Triple | None:
        factors = self._factors()
        self.check_root(factors.order(len(site.shape[1:]) or 1))
        return Triple(BatchGradient(), factors, self.rooter())


@register("shampoo")
class ShampooGradientMaker(Preconditioned[ShampooGradientConfig]):
    """Shampoo as a gradient maker; see `ShampooGradientConfig`."""

    Config = ShampooGradientConfig
