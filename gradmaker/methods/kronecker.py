"""Methods with Kronecker factors: K-FAC on layer inputs and output gradients, Shampoo on the axes of the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from gradmaker.config import GradientConfig, check_choice
from gradmaker.curvature import BatchGradient, Curvature, FisherMC
from gradmaker.preconditioner import PreconditionedGradientMaker
from gradmaker.representations import Dense, Kron, KronDims
from gradmaker.schedule import Schedule
from gradmaker.sites import Site
from gradmaker.solvers import Cholesky, Eigh, NewtonRoot, Solver
from gradmaker.triple import Triple

__all__ = ["KfacGradientConfig", "KfacGradientMaker", "ShampooGradientConfig", "ShampooGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class KfacGradientConfig(GradientConfig):
    """K-FAC: the Fisher of a layer as ``B (x) A``, ``A`` of its inputs, ``B`` of its output gradients; ``P = (B (x) A + damping)^-1``.

    ``split='pi'`` damps the two factors apart, ``A + pi sqrt(damping)`` and ``B + sqrt(damping) / pi``; ``'exact'`` damps the
    product through eigenbases. Norm layers get their exact 2 x 2 blocks; what is not a layer gets ``fallback``.

    Reference: Martens & Grosse, ICML 2015, arXiv:1503.05671, sections 3, 5 and 6.3; convolutions: Grosse & Martens, ICML
    2016, arXiv:1602.01407; weight sharing (expand, reduce): Eschenhagen et al., NeurIPS 2023, arXiv:2311.00636.
    """

    fisher: Curvature = FisherMC(samples=1)
    """FisherMC, FisherExact or FisherEmp."""
    sharing: Literal["expand", "reduce"] = "expand"
    split: Literal["pi", "exact"] = "pi"
    bias: Literal["joint", "separate"] = "joint"
    """Whether a bias is one more input of its layer's block, or a block of its own."""
    curvature_interval: int | Schedule = 10
    preconditioner_interval: int | Schedule = 10
    warmup_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("bias", self.bias, ["joint", "separate"])
        check_choice("split", self.split, ["pi", "exact"])

    @property
    def joint_bias(self) -> bool:  # type: ignore[override]
        """Whether weight and bias share a block."""
        return self.bias == "joint"

    def triple(self, site: Site) -> Triple | None:
        if site.kind == "generic":
            return None
        if site.kind == "scale":
            return Triple(self.fisher, Dense(granularity="unit"), Cholesky(damping=self.damping))
        solver: Solver = Cholesky(damping=self.damping, split="pi")
        if self.split == "exact":
            solver = Eigh(power=-1.0, damping=self.damping, split="exact")
        return Triple(self.fisher, Kron(sharing=self.sharing), solver)


class KfacGradientMaker(PreconditionedGradientMaker):
    """K-FAC as a gradient maker; see `KfacGradientConfig`."""

    Config = KfacGradientConfig


@dataclass(frozen=True, kw_only=True)
class ShampooGradientConfig(GradientConfig):
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
    root: Literal["eigh", "newton"] = "eigh"
    """How factors are rooted: eigendecomposition, or the coupled Newton iteration."""
    per_tensor: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("root", self.root, ["eigh", "newton"])

    def triple(self, site: Site) -> Triple | None:
        solver: Solver = NewtonRoot(power=-0.5, damping=self.damping)
        if self.root == "eigh":
            solver = Eigh(power=-0.5, damping=self.damping, split="each", relative=True)
        return Triple(BatchGradient(), KronDims(), solver)


class ShampooGradientMaker(PreconditionedGradientMaker):
    """Shampoo as a gradient maker; see `ShampooGradientConfig`."""

    Config = ShampooGradientConfig
