"""KFLR: K-FAC with the exact Fisher matrix."""

from __future__ import annotations

from dataclasses import dataclass

from gradmaker.curvature import Curvature, FisherExact
from gradmaker.methods.kfac import KfacGradientConfig
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned

__all__ = ["KflrGradientConfig", "KflrGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class KflrGradientConfig(KfacGradientConfig):
    """KFLR: K-FAC with the exact Fisher, ``B = (1/M) sum_mk g_mk g_mk^T`` over the columns of a factor of ``Lambda_m``.

    Reference: Botev, Ritter & Barber, ICML 2017, arXiv:1706.03662; running average and intervals as in K-FAC.
    """

    fisher: Curvature = FisherExact()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.fisher, FisherExact):
            raise ValueError(f"fisher={self.fisher!r}: KFLR is K-FAC with FisherExact(...); use kfac for another Fisher")


@register("kflr")
class KflrGradientMaker(Preconditioned[KflrGradientConfig]):
    """KFLR as a gradient maker; see `KflrGradientConfig`."""

    Config = KflrGradientConfig
