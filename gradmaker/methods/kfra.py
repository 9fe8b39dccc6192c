"""KFRA: K-FAC with output factors by a recursion over the layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gradmaker.capture.sites import Site
from gradmaker.config import COVERS_ALL
from gradmaker.curvature import Curvature, FisherRecursive
from gradmaker.curvature.recursive import break_of_chain
from gradmaker.methods.kfac_family import KroneckerGradientConfig
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import Kron
from gradmaker.solvers import Cholesky
from gradmaker.triple import Triple

__all__ = ["KfraGradientConfig", "KfraGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class KfraGradientConfig(KroneckerGradientConfig):
    """KFRA: K-FAC's ``A`` with output factors by a recursion of batch averages, ``B_l = (W^T B_(l+1) W) * E[phi' phi'^T]``.

    For feed-forward chains of linear and element-wise layers only; any other model is refused.

    Reference: Botev, Ritter & Barber, ICML 2017, arXiv:1706.03662, section 3; average and intervals as in K-FAC.
    """

    inapplicable = COVERS_ALL

    fisher: Curvature = FisherRecursive()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.fisher, FisherRecursive):
            raise ValueError(f"fisher={self.fisher!r}: KFRA is the recursion FisherRecursive(...); use kfac for another Fisher")

    def layer(self, site: Site) -> Triple:
        return Triple(
            self.fisher, Kron(wide_sides=self.wide_sides), Cholesky(damping=self.damping, interval=self.steps_of_refresh)
        )


@register("kfra")
class KfraGradientMaker(Preconditioned[KfraGradientConfig]):
    """KFRA as a gradient maker; see `KfraGradientConfig`."""

    Config = KfraGradientConfig

    @classmethod
    def refuse(cls, model: nn.Module) -> str | None:
        return break_of_chain(model)
