"""EKFAC: second moments of gradients in the eigenbasis of K-FAC's factors."""

from __future__ import annotations

from dataclasses import dataclass

from gradmaker.capture.sites import Site
from gradmaker.methods.weight_sharing import Sharing, SharingGradientConfig
from gradmaker.options.deprecations import BASIS_INTERVAL
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import Eigenbasis
from gradmaker.schedule import Schedule, Stepped
from gradmaker.solvers import Rotate
from gradmaker.triple import Triple

__all__ = ["EkfacGradientConfig", "EkfacGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class EkfacGradientConfig(SharingGradientConfig):
    """EKFAC: ``P = Q (D + damping)^-1 Q^T``, ``Q`` the eigenbasis of K-FAC's factors, ``D`` the gradients' second moment there.

    The moments are updated at every measurement, at the cost of matrix products; the eigendecomposition is every
    ``preconditioner_interval`` steps, in the warm-up too: by default every 5 of the first 100 steps, then every 50. The moments
    are carried over to a new basis.

    Reference: George et al., NeurIPS 2018, arXiv:1806.03884, algorithm 1 (EKFAC).
    """

    renamed_options = BASIS_INTERVAL
    slow_part = True
    refreshes_in_warmup = False

    preconditioner_interval: int | Schedule = Stepped(milestones={0: 5, 100: 50})
    stagger: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._basis("expand")

    def _basis(self, sharing: Sharing) -> Eigenbasis:
        return Eigenbasis(sharing=sharing, wide_sides=self.wide_sides)

    def layer(self, site: Site) -> Triple:
        return Triple(self.fisher, self._basis(self.sharing_of(site)), Rotate(power=-1.0, damping=self.damping))


@register("ekfac")
class EkfacGradientMaker(Preconditioned[EkfacGradientConfig]):
    """EKFAC as a gradient maker; see `EkfacGradientConfig`."""

    Config = EkfacGradientConfig
