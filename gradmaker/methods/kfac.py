"""K-FAC: Kronecker factors of layer inputs and output gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from gradmaker.capture.sites import Site
from gradmaker.gathering import STACK_LIMIT
from gradmaker.methods.weight_sharing import SharingGradientConfig
from gradmaker.options.checks import check_choice
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.presets import Presets
from gradmaker.representations import Kron, KronRows
from gradmaker.solvers import AnySolver, Cholesky, Eigh, FactorWoodbury
from gradmaker.triple import Triple

__all__ = ["KfacGradientConfig", "KfacGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class KfacGradientConfig(SharingGradientConfig):
    """K-FAC: ``P = (B (x) A + damping)^-1`` for each layer, ``A`` of its inputs, ``B`` of its output gradients.

    ``split='pi'`` damps the two factors separately, ``A + pi sqrt(damping)`` and ``B + sqrt(damping) / pi``; ``'exact'`` damps
    the product in its eigenbasis. With ``decay=0`` and ``split='pi'`` wide linear layers are held and inverted by the rows of
    the batch where these are fewer than a side, as in `skfac`: the same ``P``.

    Reference: Martens & Grosse, ICML 2015, arXiv:1503.05671, sections 3, 5 and 6.3; convolutions: Grosse & Martens, ICML
    2016, arXiv:1602.01407; weight sharing (expand, reduce): Eschenhagen et al., NeurIPS 2023, arXiv:2311.00636.
    """

    presets: ClassVar[Presets] = {
        "large": {
            "embeddings": False,
            "wide_sides": "blocks",
            "max_dim": 768,
            "curvature_interval": 10,
            "preconditioner_interval": 100,
        }
    }
    split: Literal["pi", "exact"] = "pi"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("split", self.split, ["pi", "exact"])

    def layer(self, site: Site) -> Triple:
        sharing = self.sharing_of(site)
        if self._by_rows(site):
            reduction: Literal["sum", "none"] = "sum" if sharing == "reduce" else "none"
            held = KronRows(reduction=reduction, wide_sides="diagonal")
            return Triple(self.fisher, held, FactorWoodbury(damping=self.damping))
        solver: AnySolver = Cholesky(damping=self.damping, interval=self.steps_of_refresh)
        if self.split == "exact":
            solver = Eigh(power=-1.0, damping=self.damping, split="exact")
        return Triple(self.fisher, Kron(sharing=sharing, wide_sides=self.wide_sides), solver)

    def _by_rows(self, site: Site) -> bool:
        """Whether a layer may be held by rows: a linear one, too wide for a stack, whose factors are whole matrices."""
        if self.decay != 0 or not self.damping or (self.split, self.wide_sides) != ("pi", "diagonal"):
            return False
        linear = next(iter(site.parameters.values())).ndim == 2  # the positions of a convolution are many rows
        return linear and site.kind == "matrix" and site.weighted and max(site.shape) > STACK_LIMIT


@register("kfac")
class KfacGradientMaker(Preconditioned[KfacGradientConfig]):
    """K-FAC as a gradient maker; see `KfacGradientConfig`."""

    Config = KfacGradientConfig
