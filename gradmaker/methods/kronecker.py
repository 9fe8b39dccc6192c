"""Methods with Kronecker factors: K-FAC on layer inputs and output gradients, Shampoo on the axes of the gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

from gradmaker.config import check_choice
from gradmaker.curvature import BatchGradient, Curvature, FisherMC
from gradmaker.methods.axes import AxesGradientConfig, Root, rooting
from gradmaker.methods.trust_region import ClippedGradientConfig, ClippedGradientMaker
from gradmaker.preconditioner import PreconditionedGradientMaker
from gradmaker.representations import Dense, Kron, KronDims, RootKronDims
from gradmaker.schedule import Schedule
from gradmaker.sites import Site
from gradmaker.solvers import Cholesky, Eigh, Solver
from gradmaker.solvers.matrix_root import MatrixRoot
from gradmaker.triple import Triple

__all__ = [
    "KfacGradientConfig",
    "KfacGradientMaker",
    "KroneckerGradientConfig",
    "ShampooGradientConfig",
    "ShampooGradientMaker",
]


@dataclass(frozen=True, kw_only=True)
class KroneckerGradientConfig(ClippedGradientConfig, ABC):
    """Options of K-FAC and its relatives. Norm layers get their exact 2 x 2 blocks, what is not a layer ``fallback``."""

    damping: float = 1e-3
    fisher: Curvature = FisherMC(samples=1)
    """FisherMC, FisherExact, FisherEmp; for `kfac` also FisherForward, which leaves out the output factors (FOOF)."""
    bias: Literal["joint", "separate"] = "joint"
    """Whether a bias is one more input of its layer's block, or a block of its own."""
    curvature_interval: int | Schedule = 10
    preconditioner_interval: int | Schedule = 10
    warmup_steps: int = 100
    """Fresh factors while they change fast: with stale ones the tenfold learning rate diverges on small problems."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("bias", self.bias, ["joint", "separate"])

    @property
    def joint_bias(self) -> bool:  # type: ignore[override]
        """Whether weight and bias share a block."""
        return self.bias == "joint"

    @abstractmethod
    def layer(self) -> Triple:
        """The parts for linear maps and lookup tables."""

    def triple(self, site: Site) -> Triple | None:
        if site.kind == "generic":
            return None
        if site.kind == "scale" and {*self.fisher.gives} <= {*Dense.takes}:
            return Triple(self.fisher, Dense(granularity="unit"), Cholesky(damping=self.damping))
        return self.layer()


@dataclass(frozen=True, kw_only=True)
class KfacGradientConfig(KroneckerGradientConfig):
    """K-FAC: ``P = (B (x) A + damping)^-1`` for each layer, ``A`` of its inputs, ``B`` of its output gradients.

    ``split='pi'`` damps the two factors apart, ``A + pi sqrt(damping)`` and ``B + sqrt(damping) / pi``; ``'exact'`` damps the
    product through eigenbases.

    Reference: Martens & Grosse, ICML 2015, arXiv:1503.05671, sections 3, 5 and 6.3; convolutions: Grosse & Martens, ICML
    2016, arXiv:1602.01407; weight sharing (expand, reduce): Eschenhagen et al., NeurIPS 2023, arXiv:2311.00636.
    """

    sharing: Literal["expand", "reduce"] = "expand"
    split: Literal["pi", "exact"] = "pi"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("split", self.split, ["pi", "exact"])

    def layer(self) -> Triple:
        solver: Solver = Cholesky(damping=self.damping, split="pi")
        if self.split == "exact":
            solver = Eigh(power=-1.0, damping=self.damping, split="exact")
        return Triple(self.fisher, Kron(sharing=self.sharing), solver)


class KfacGradientMaker(ClippedGradientMaker):
    """K-FAC as a gradient maker; see `KfacGradientConfig`."""

    Config = KfacGradientConfig


@dataclass(frozen=True, kw_only=True)
class ShampooGradientConfig(AxesGradientConfig):
    """Shampoo: ``P G = G x_1 H_1^(-1/2k) ... x_k H_k^(-1/2k)`` with ``H_m`` the statistic of axis ``m`` of the gradient.

    ``damping`` is a ridge relative to each factor's largest eigenvalue. Vectors get full-matrix AdaGrad, which is Shampoo of
    order one. ``decay=None`` sums, as first published; ``norm`` grafts.

    Reference: Gupta, Koren & Singer, ICML 2018, arXiv:1802.09568, algorithms 1 and 2; average, ridge and grafting: Anil et
    al., 2020, arXiv:2002.09018.
    """

    damping: float = 1e-6
    decay: float | None = 0.95
    norm: str = "keep"
    preconditioner_interval: int | Schedule = 20
    warmup_steps: int = 5
    root: Root = "eigh"
    """How factors are rooted, see docs/roots.md. ``svd`` holds statistics by their square roots, for float32."""
    exponent: float | None = None
    """``e`` of ``H^(-e)`` on every axis, instead of ``1/2k``; 1/2 fits better (Morwani et al. 2024, arXiv:2406.17748)."""
    balanced: bool = False
    """Whether the result has the scale of ``1/2k`` at any exponent: ``tr(L)^(1/2) L^(-1/2) G R^(-1/2)`` for a matrix."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("root", self.root, list(get_args(Root)))
        self._factors()

    def _factors(self) -> KronDims:
        make = RootKronDims if self.root == "svd" else KronDims
        return make(None if self.exponent is None else 2 * self.exponent, self.balanced)

    def triple(self, site: Site) -> Triple | None:
        factors, solver = self._factors(), rooting(self.root, self.damping)
        if isinstance(solver, MatrixRoot):
            solver.root_and_power(factors.order(len(site.shape[1:]) or 1))  # not every order has every root
        return Triple(BatchGradient(), factors, solver)


class ShampooGradientMaker(PreconditionedGradientMaker):
    """Shampoo as a gradient maker; see `ShampooGradientConfig`."""

    Config = ShampooGradientConfig
