"""Methods with Kronecker factors: K-FAC on layer inputs and output gradients, Shampoo on the axes of the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from gradmaker.capture.sites import Site
from gradmaker.config import check_choice
from gradmaker.curvature import BatchGradient
from gradmaker.methods.axes import RootedGradientConfig
from gradmaker.methods.sharing import SharingGradientConfig
from gradmaker.preconditioner import PreconditionedGradientMaker
from gradmaker.representations import Kron, KronDims, RootKronDims
from gradmaker.schedule import Schedule
from gradmaker.solvers import Cholesky, Eigh, Solver
from gradmaker.triple import Triple

__all__ = [
    "KfacGradientConfig",
    "KfacGradientMaker",
    "ShampooGradientConfig",
    "ShampooGradientMaker",
]


@dataclass(frozen=True, kw_only=True)
class KfacGradientConfig(SharingGradientConfig):
    """K-FAC: ``P = (B (x) A + damping)^-1`` for each layer, ``A`` of its inputs, ``B`` of its output gradients.

    ``split='pi'`` damps the two factors apart, ``A + pi sqrt(damping)`` and ``B + sqrt(damping) / pi``; ``'exact'`` damps the
    product through eigenbases.

    Reference: Martens & Grosse, ICML 2015, arXiv:1503.05671, sections 3, 5 and 6.3; convolutions: Grosse & Martens, ICML
    2016, arXiv:1602.01407; weight sharing (expand, reduce): Eschenhagen et al., NeurIPS 2023, arXiv:2311.00636.
    """

    split: Literal["pi", "exact"] = "pi"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("split", self.split, ["pi", "exact"])

    def layer(self, site: Site) -> Triple:
        solver: Solver = Cholesky(damping=self.damping, split="pi")
        if self.split == "exact":
            solver = Eigh(power=-1.0, damping=self.damping, split="exact")
        return Triple(self.fisher, Kron(sharing=self.sharing_of(site), wide_sides=self.wide_sides), solver)


class KfacGradientMaker(PreconditionedGradientMaker):
    """K-FAC as a gradient maker; see `KfacGradientConfig`."""

    Config = KfacGradientConfig


@dataclass(frozen=True, kw_only=True)
class ShampooGradientConfig(RootedGradientConfig):
    """Shampoo: ``P G = G x_1 H_1^(-1/2k) ... x_k H_k^(-1/2k)`` with ``H_m`` the statistic of axis ``m`` of the gradient.

    ``damping`` is a ridge relative to each factor's largest eigenvalue. Vectors get full-matrix AdaGrad, which is Shampoo of
    order one. ``decay=None`` sums, as first published; ``grafting`` grafts.

    Reference: Gupta, Koren & Singer, ICML 2018, arXiv:1802.09568, algorithms 1 and 2; average, ridge and grafting: Anil et
    al., 2020, arXiv:2002.09018.
    """

    damping: float = 1e-6
    decay: float | None = 0.95
    grafting: str = "keep"
    preconditioner_interval: int | Schedule = 20
    warmup_steps: int = 5
    only_with: ClassVar[dict[str, dict[str, Any]]] = {"balanced": {"exponent": bool, "grafting": "none"}}

    exponent: float | None = None
    """``e`` of ``H^(-e)`` on every axis, instead of ``1/2k``; 1/2 fits better (Morwani et al. 2024, arXiv:2406.17748)."""
    balanced: bool = False
    """Whether the result has the scale of ``1/2k`` at any exponent: ``tr(L)^(1/2) L^(-1/2) G R^(-1/2)`` for a matrix."""

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


class ShampooGradientMaker(PreconditionedGradientMaker):
    """Shampoo as a gradient maker; see `ShampooGradientConfig`."""

    Config = ShampooGradientConfig
