"""K-FAC: Kronecker factors of layer inputs and output gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradmaker.capture.sites import Site
from gradmaker.methods.weight_sharing import SharingGradientConfig
from gradmaker.options.checks import check_choice
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import Kron
from gradmaker.solvers import AnySolver, Cholesky, Eigh
from gradmaker.triple import Triple

__all__ = ["KfacGradientConfig", "KfacGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class KfacGradientConfig(SharingGradientConfig):
    """K-FAC: ``P = (B (x) A + damping)^-1`` for each layer, ``A`` of its inputs, ``B`` of its output gradients.

    ``split='pi'`` damps the two factors separately, ``A + pi sqrt(damping)`` and ``B + sqrt(damping) / pi``; ``'exact'`` damps
    the product in its eigenbasis.

    Reference: Martens & Grosse, ICML 2015, arXiv:1503.05671, sections 3, 5 and 6.3; convolutions: Grosse & Martens, ICML
    2016, arXiv:1602.01407; weight sharing (expand, reduce): Eschenhagen et al., NeurIPS 2023, arXiv:2311.00636.
    """

    split: Literal["pi", "exact"] = "pi"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("split", self.split, ["pi", "exact"])

    def layer(self, site: Site) -> Triple:
        solver: AnySolver = Cholesky(damping=self.damping, interval=self.steps_of_refresh)
        if self.split == "exact":
            solver = Eigh(power=-1.0, damping=self.damping, split="exact")
        return Triple(self.fisher, Kron(sharing=self.sharing_of(site), wide_sides=self.wide_sides), solver)


@register("kfac")
class KfacGradientMaker(Preconditioned[KfacGradientConfig]):
    """K-FAC as a gradient maker; see `KfacGradientConfig`."""

    Config = KfacGradientConfig
