"""K-FAC's relatives: KFLR, KFRA and EKFAC, SKFAC by Woodbury, TNT on gradients of the sampled loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from gradmaker.capture.sites import Site
from gradmaker.config import COVERS_ALL, GradientConfig
from gradmaker.curvature import Curvature, FisherExact, FisherRecursive, SampledGradient
from gradmaker.curvature.recursive import break_of_chain
from gradmaker.methods.kronecker import KfacGradientConfig
from gradmaker.methods.kronecker_family import KroneckerGradientConfig
from gradmaker.methods.sharing import Sharing, SharingGradientConfig
from gradmaker.preconditioner import PreconditionedGradientMaker
from gradmaker.representations import Dense, Eigenbasis, Kron, KronRows, TensorNormal
from gradmaker.representations.base import NO_LIMIT
from gradmaker.schedule import Schedule
from gradmaker.solvers import Cholesky, FactorWoodbury, Rotate
from gradmaker.triple import Triple

__all__ = [
    "EkfacGradientConfig",
    "EkfacGradientMaker",
    "KflrGradientConfig",
    "KflrGradientMaker",
    "KfraGradientConfig",
    "KfraGradientMaker",
    "SkfacGradientConfig",
    "SkfacGradientMaker",
    "TntGradientConfig",
    "TntGradientMaker",
]


@dataclass(frozen=True, kw_only=True)
class KflrGradientConfig(KfacGradientConfig):
    """KFLR: K-FAC with the exact Fisher, ``B = (1/M) sum_mk g_mk g_mk^T`` over the columns of a factor of ``Lambda_m``.

    Reference: Botev, Ritter & Barber, ICML 2017, arXiv:1706.03662; the running average and the schedule are those of K-FAC.
    """

    fisher: Curvature = FisherExact()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.fisher, FisherExact):
            raise ValueError(f"fisher={self.fisher!r}: KFLR is K-FAC with FisherExact(...); use kfac for another Fisher")


class KflrGradientMaker(PreconditionedGradientMaker):
    """KFLR as a gradient maker; see `KflrGradientConfig`."""

    Config = KflrGradientConfig


@dataclass(frozen=True, kw_only=True)
class KfraGradientConfig(KroneckerGradientConfig):
    """KFRA: K-FAC's ``A`` with the output factor of an averaged recursion, ``B_l = (W^T B_(l+1) W) * E[phi' phi'^T]``.

    For feed-forward chains of linear and element-wise layers only; any other model is refused.

    Reference: Botev, Ritter & Barber, ICML 2017, arXiv:1706.03662, section 3; average and schedule are those of K-FAC.
    """

    inapplicable = COVERS_ALL

    fisher: Curvature = FisherRecursive()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.fisher, FisherRecursive):
            raise ValueError(f"fisher={self.fisher!r}: KFRA is the recursion FisherRecursive(...); use kfac for another Fisher")

    def layer(self, site: Site) -> Triple:
        return Triple(self.fisher, Kron(wide_sides=self.wide_sides), Cholesky(damping=self.damping, split="pi"))


class KfraGradientMaker(PreconditionedGradientMaker):
    """KFRA as a gradient maker; see `KfraGradientConfig`."""

    Config = KfraGradientConfig

    @classmethod
    def refuse(cls, model: nn.Module) -> str | None:
        return break_of_chain(model)


@dataclass(frozen=True, kw_only=True)
class EkfacGradientConfig(SharingGradientConfig):
    """EKFAC: ``P = Q (D + damping)^-1 Q^T``, ``Q`` the eigenbasis of K-FAC's factors, ``D`` the gradients' second moment there.

    The moments follow the curvature at every measurement, at the cost of products; the decomposition is every
    ``basis_interval`` measurements: every 50 steps once ``warmup_steps`` are over. Moments go along into a new basis.

    Reference: George et al., NeurIPS 2018, arXiv:1806.03884, algorithm 1 (EKFAC).
    """

    basis_interval: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._basis("expand")

    def _basis(self, sharing: Sharing) -> Eigenbasis:
        return Eigenbasis(sharing=sharing, basis_interval=self.basis_interval, wide_sides=self.wide_sides)

    def layer(self, site: Site) -> Triple:
        return Triple(self.fisher, self._basis(self.sharing_of(site)), Rotate(power=-1.0, damping=self.damping))


class EkfacGradientMaker(PreconditionedGradientMaker):
    """EKFAC as a gradient maker; see `EkfacGradientConfig`."""

    Config = EkfacGradientConfig


@dataclass(frozen=True, kw_only=True)
class SkfacGradientConfig(KroneckerGradientConfig):
    """SKFAC: K-FAC's factors of the newest batch alone, inverted by the Woodbury identity from their few rows.

    ``reduction`` thins out weight-sharing positions first; see `KronRows`. Norm layers forget likewise.

    Reference: Tang et al., CVPR 2021, "SKFAC: Training Neural Networks with Faster Kronecker-Factored Approximate Curvature".
    """

    inapplicable = NO_LIMIT | {"wide_sides": "rows are what serves wide sides"}
    only_with: ClassVar[dict[str, dict[str, Any]]] = {"positions": {"reduction": "subsample"}}

    decay: float | None = 0.0
    reduction: Literal["sum", "subsample", "none"] = "sum"
    positions: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay != 0.0:
            raise ValueError(f"decay={self.decay!r}: SKFAC keeps the newest batch alone, so only 0.0 is legal; kfac averages")

    def layer(self, site: Site) -> Triple:
        representation = KronRows(reduction=self.reduction, positions=self.positions)
        return Triple(self.fisher, representation, FactorWoodbury(damping=self.damping))


class SkfacGradientMaker(PreconditionedGradientMaker):
    """SKFAC as a gradient maker; see `SkfacGradientConfig`."""

    Config = SkfacGradientConfig


@dataclass(frozen=True, kw_only=True)
class TntGradientConfig(GradientConfig):
    """TNT: ``P = (H_1 + damping)^-1 (x) ... (x) (H_k + damping)^-1`` with the balanced factors of a tensor-normal gradient.

    A layer is the matrix ``[W b]``, a convolution's filters are its rows; ``damping`` is added to every factor. Norm layers
    get their 2 x 2 blocks, what is not a layer ``fallback``. ``fisher`` may also give examples (FisherMC, ...), each of which
    is then a gradient of its own: exact for a single example, but no longer one contraction a batch.

    Reference: Ren & Goldfarb, NeurIPS 2021, arXiv:2106.02925, algorithm 2; decay and intervals are those of its MLPs.
    """

    damping: float = 0.1
    decay: float | None = 0.9
    fisher: Curvature = SampledGradient(samples=1)
    preconditioner_interval: int | Schedule = 20
    warmup_steps: int = 100
    """Fresh inverses while the average is young: a gradient a batch has few of the directions."""

    def triple(self, site: Site) -> Triple | None:
        if site.kind == "generic":
            return None
        if site.kind == "scale":
            return Triple(self.fisher, Dense(granularity="unit"), Cholesky(damping=self.damping))
        return Triple(self.fisher, TensorNormal(granularity="layer"), Cholesky(damping=self.damping, split="each"))


class TntGradientMaker(PreconditionedGradientMaker):
    """TNT as a gradient maker; see `TntGradientConfig`."""

    Config = TntGradientConfig
