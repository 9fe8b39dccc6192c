"""PSGD: a preconditioner fitted to pairs of probes and Hessian-vector products, or to gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from gradmaker.capture.shapes import Merge
from gradmaker.capture.sites import Site
from gradmaker.config import COVERS_ALL, ONE_BLOCK
from gradmaker.curvature import Curvature, GradientProbe, HessianProbe
from gradmaker.methods.hessian_probes import HessianProbeConfig
from gradmaker.methods.tensor_axes import AxesGradientConfig
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import KronQ, TriangularQ
from gradmaker.representations.lie import Normaliser
from gradmaker.solvers import Apply
from gradmaker.triple import Triple

__all__ = [
    "PsgdGradientConfig",
    "PsgdGradientMaker",
    "PsgdKfGradientConfig",
    "PsgdKfGradientMaker",
    "PsgdWhitenGradientConfig",
    "PsgdWhitenGradientMaker",
]


@dataclass(frozen=True, kw_only=True)
class PsgdGradientConfig(HessianProbeConfig):
    """PSGD: ``P = Q^T Q``, one upper triangular matrix for all parameters, fitted to ``|H|^-1`` on Hessian-vector pairs.

    ``rate`` is the learning rate of the fit, which has no running average: ``decay`` does not apply. ``damping`` is the noise
    added to ``H v``, which bounds ``P`` by its inverse. ``whiten=True`` fits ``E[g g^T]^(-1/2)`` on gradients instead, without
    a Hessian.

    Reference: Li, IEEE TNNLS 2018, arXiv:1512.04202, section 4; defaults of the author's psgd_torch.
    """

    inapplicable = HessianProbe.inapplicable | TriangularQ.inapplicable | COVERS_ALL | ONE_BLOCK
    only_with: ClassVar[dict[str, dict[str, Any]]] = {"mode": {"whiten": False}}

    damping: float = 1e-9
    decay: float | None = None
    rate: float = 0.1
    normaliser: Normaliser = "slow"
    """Normaliser of a step of the fit: ``slow``, a decaying maximum of norms (2025), or ``max``, the largest entry (2018)."""
    whiten: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._representation()

    def _representation(self) -> TriangularQ | KronQ:
        return TriangularQ(self.rate, self.normaliser)

    def _curvature(self) -> Curvature:
        if self.whiten:
            return GradientProbe(lift=self.damping)
        return HessianProbe(distribution="gaussian", lift=self.damping, mode=self.mode)

    def triple(self, site: Site) -> Triple | None:
        return Triple(self._curvature(), self._representation(), Apply())


@register("psgd")
class PsgdGradientMaker(Preconditioned[PsgdGradientConfig]):
    """PSGD as a gradient maker; see `PsgdGradientConfig`."""

    Config = PsgdGradientConfig


@dataclass(frozen=True, kw_only=True)
class PsgdKfGradientConfig(PsgdGradientConfig):
    """PSGD-KF: ``P G = Q_l^T Q_l G Q_r^T Q_r`` for the weight and bias of each layer, options as of PSGD.

    All layers use one Hessian-vector product of the whole model: the contribution of other layers to ``H v`` acts as damping.
    An axis with ``d^2 > max_skew n`` (``n`` elements) has a diagonal factor; None: only axes over ``max_dim``.

    Reference: Li, 2018, arXiv:1802.06132 (the Kronecker group); defaults of psgd_torch, but for ``max_skew``, there 1, and
    ``geometry``.
    """

    inapplicable = HessianProbe.inapplicable | KronQ.inapplicable | COVERS_ALL

    max_skew: float | None = None
    geometry: str = "EQ"
    """The update of a factor: EQ (triangular), QEP, QEQ, Q0.5EQ1.5, QUAD, QUAD4P or PRO4P."""

    def _representation(self) -> TriangularQ | KronQ:
        return KronQ(self.rate, self.normaliser, "layer", self.max_skew, self.geometry)


@register("psgd_kf")
class PsgdKfGradientMaker(Preconditioned[PsgdKfGradientConfig]):
    """PSGD-KF as a gradient maker; see `PsgdKfGradientConfig`."""

    Config = PsgdKfGradientConfig


@dataclass(frozen=True, kw_only=True)
class PsgdWhitenGradientConfig(AxesGradientConfig):
    """PSGD-Kron, whitening: ``P = (x)_k Q_k^T Q_k``, a factor for each axis of a tensor, fitted to ``E[g g^T]^(-1/2)``.

    Options as of `PsgdKfGradientConfig`. ``grafting='amplitude'`` bounds the entries that are still outliers; a whitened
    gradient has entries of about one, so that learning rates are those of Adam. ``P`` whitens the gradient and is applied to
    its average. Differences to psgd_torch: the average of gradients has Adam's bias correction, each tensor has its own initial
    ``P``, factors are balanced at every step, and a gradient of zeros does not update ``P``.

    Reference: Li, 2024, arXiv:2402.11858; Pooladzandi, Li, 2024, arXiv:2402.04553; defaults of psgd_torch (2025).
    """

    inapplicable = GradientProbe.inapplicable | KronQ.inapplicable | COVERS_ALL

    damping: float = 1e-9
    decay: float | None = None
    grafting: str = "amplitude"
    merge: Merge = "squeeze"
    rate: float = 0.1
    max_skew: float | None = 1.0
    geometry: str = "Q0.5EQ1.5"
    """The update of a factor: Q0.5EQ1.5, EQ (triangular), QEP, QEQ, QUAD, QUAD4P or PRO4P."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._representation()

    def _representation(self) -> KronQ:
        return KronQ(self.rate, "slow", "tensor", self.max_skew, self.geometry)

    def triple(self, site: Site) -> Triple | None:
        return Triple(GradientProbe(lift=self.damping), self._representation(), Apply())


@register("psgd_whiten")
class PsgdWhitenGradientMaker(Preconditioned[PsgdWhitenGradientConfig]):
    """PSGD-Kron for whitening as a gradient maker; see `PsgdWhitenGradientConfig`."""

    Config = PsgdWhitenGradientConfig
