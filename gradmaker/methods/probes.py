"""Methods on probes of Hessian or gradient: PSGD, AdaHessian, equilibrated SGD, saddle-free Newton of the diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from gradmaker.capture.shapes import Merge
from gradmaker.capture.sites import Site
from gradmaker.config import COVERS_ALL, ONE_BLOCK, GradientConfig, check_choice, check_count, check_interval
from gradmaker.curvature import Curvature, GradientProbe, Hessian, HessianProbe
from gradmaker.curvature.hessian import Mode, check_mode
from gradmaker.methods.axes import AxesGradientConfig
from gradmaker.preconditioner import PreconditionedGradientMaker
from gradmaker.representations import Dense, Diagonal, KronQ, ProbeDiagonal, TriangularQ
from gradmaker.representations.lie import Normaliser
from gradmaker.schedule import Schedule
from gradmaker.solvers import AbsoluteDivision, AbsoluteEigh, Apply, Division
from gradmaker.triple import Triple

__all__ = [
    "AdahessianGradientConfig",
    "AdahessianGradientMaker",
    "EsgdGradientConfig",
    "EsgdGradientMaker",
    "PsgdGradientConfig",
    "PsgdGradientMaker",
    "PsgdKfGradientConfig",
    "PsgdKfGradientMaker",
    "PsgdWhitenGradientConfig",
    "PsgdWhitenGradientMaker",
    "SaddleFreeDiagonalGradientConfig",
    "SaddleFreeDiagonalGradientMaker",
]


@dataclass(frozen=True, kw_only=True)
class HessianProbeConfig(GradientConfig):
    """What methods on probes of the Hessian have in common."""

    mode: Mode = "reverse"
    """How a product is taken: backwards twice, or forwards over backwards where that is not supported; by ``forward`` at once,
    by ``difference`` from two gradients, for models without second derivatives."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mode(self.mode)


@dataclass(frozen=True, kw_only=True)
class PsgdGradientConfig(HessianProbeConfig):
    """PSGD: ``P = Q^T Q``, one upper triangular matrix for all parameters, fitted to ``|H|^-1`` on Hessian-vector pairs.

    ``rate`` is that of the fit, which has no average, so that ``decay`` does not apply; ``damping`` is the noise that is added
    to ``H v``: ``P`` stays below its inverse. ``whiten=True`` fits ``E[g g^T]^(-1/2)`` on gradients instead, without a Hessian.

    Reference: Li, IEEE TNNLS 2018, arXiv:1512.04202, section 4; defaults of the author's psgd_torch.
    """

    inapplicable = HessianProbe.inapplicable | TriangularQ.inapplicable | COVERS_ALL | ONE_BLOCK
    only_with: ClassVar[dict[str, dict[str, Any]]] = {"mode": {"whiten": False}}

    damping: float = 1e-9
    decay: float | None = None
    rate: float = 0.1
    normaliser: Normaliser = "slow"
    """What a step of the fit is divided by: ``slow`` maximum of the terms' sizes (2025), or ``max``imal entry (2018)."""
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


class PsgdGradientMaker(PreconditionedGradientMaker):
    """PSGD as a gradient maker; see `PsgdGradientConfig`."""

    Config = PsgdGradientConfig


@dataclass(frozen=True, kw_only=True)
class PsgdKfGradientConfig(PsgdGradientConfig):
    """PSGD-KF: ``P G = Q_l^T Q_l G Q_r^T Q_r`` for the weight and bias of each layer, options as PSGD's.

    One product with the Hessian of all layers serves them all: what other layers contribute to ``H v`` acts as damping.
    ``max_skew`` gives an axis with ``d^2 > max_skew n`` (``n`` elements) a diagonal; None none but those over ``max_dim``.

    Reference: Li, 2018, arXiv:1802.06132 (the Kronecker group); defaults of psgd_torch, but for ``max_skew``, there 1, and
    ``geometry``.
    """

    inapplicable = HessianProbe.inapplicable | KronQ.inapplicable | COVERS_ALL

    max_skew: float | None = None
    geometry: str = "EQ"
    """How a factor moves: EQ (triangular), QEP, QEQ, Q0.5EQ1.5, QUAD, QUAD4P or PRO4P."""

    def _representation(self) -> TriangularQ | KronQ:
        return KronQ(self.rate, self.normaliser, "layer", self.max_skew, self.geometry)


class PsgdKfGradientMaker(PreconditionedGradientMaker):
    """PSGD-KF as a gradient maker; see `PsgdKfGradientConfig`."""

    Config = PsgdKfGradientConfig


@dataclass(frozen=True, kw_only=True)
class PsgdWhitenGradientConfig(AxesGradientConfig):
    """PSGD-Kron, whitening: ``P = (x)_k Q_k^T Q_k``, a factor for each axis of a tensor, fitted to ``E[g g^T]^(-1/2)``.

    Options as of `PsgdKfGradientConfig`. ``grafting='amplitude'`` bounds what is left of outliers; a whitened gradient has
    entries of about one, so that learning rates are Adam's. ``momentum`` is preconditioned by what whitens the gradient.
    Differs from psgd_torch in small things: an average of gradients with Adam's bias correction, a first ``P`` for each tensor
    by itself, balanced factors at every step, and no update from a gradient that is zero throughout.

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
    """How a factor moves: Q0.5EQ1.5, EQ (triangular), QEP, QEQ, QUAD, QUAD4P or PRO4P."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._representation()

    def _representation(self) -> KronQ:
        return KronQ(self.rate, "slow", "tensor", self.max_skew, self.geometry)

    def triple(self, site: Site) -> Triple | None:
        return Triple(GradientProbe(lift=self.damping), self._representation(), Apply())


class PsgdWhitenGradientMaker(PreconditionedGradientMaker):
    """PSGD-Kron for whitening as a gradient maker; see `PsgdWhitenGradientConfig`."""

    Config = PsgdWhitenGradientConfig


@dataclass(frozen=True, kw_only=True)
class AdahessianGradientConfig(HessianProbeConfig):
    """AdaHessian: ``P g = m / (v^(power / 2) + damping)``, ``v`` the average of ``D^2``, ``D = |H z|`` averaged over kernels.

    ``momentum`` is beta_1, ``decay`` beta_2, ``z`` a vector of signs.

    Reference: Yao et al., AAAI 2021, arXiv:2006.00719, algorithm 1; defaults of the authors' code.
    """

    inapplicable = HessianProbe.inapplicable | ProbeDiagonal.inapplicable | COVERS_ALL

    damping: float = 1e-4
    decay: float | None = 0.999
    momentum: float = 0.9
    power: float = 1.0
    """The Hessian power."""
    spatial: bool = True
    """Whether ``|H z|`` is averaged over the kernel of a convolution."""
    per_tensor: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._solver()

    def _solver(self) -> Division:
        return Division(power=-self.power, damping=self.damping)

    def triple(self, site: Site) -> Triple | None:
        return Triple(HessianProbe(mode=self.mode), ProbeDiagonal("squares", self.spatial), self._solver())


class AdahessianGradientMaker(PreconditionedGradientMaker):
    """AdaHessian as a gradient maker; see `AdahessianGradientConfig`."""

    Config = AdahessianGradientConfig


@dataclass(frozen=True, kw_only=True)
class EsgdGradientConfig(HessianProbeConfig):
    """Equilibrated SGD: ``P g = g / (sqrt(mean (H v)^2) + damping)``, the mean over all probes so far, ``v`` normal.

    A ``decay`` forgets: with it, and probes at every step, this is AdaHessian without momentum and kernels. Weights behind
    units that were off have no curvature until a probe finds some, and are divided by ``damping`` alone: with ReLU units and
    few probes it wants to be 1e-2 rather than the published value.

    Reference: Dauphin, de Vries, Bengio, NeurIPS 2015, arXiv:1502.04390, algorithm 1 (one probe in 20 steps, damping 1e-4).
    """

    inapplicable = HessianProbe.inapplicable | ProbeDiagonal.inapplicable | COVERS_ALL

    damping: float = 1e-4
    decay: float | None = None
    curvature_interval: int | Schedule = 20
    preconditioner_interval: int | Schedule = 20
    stagger: bool = False
    samples: int = 1
    """Probes a measurement."""
    per_tensor: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_interval("damping", self.damping, 1e-300, float("inf"))
        check_count("samples", self.samples, 1)

    def triple(self, site: Site) -> Triple | None:
        probe = HessianProbe(distribution="gaussian", samples=self.samples, mode=self.mode)
        return Triple(probe, ProbeDiagonal(), Division(damping=self.damping))


class EsgdGradientMaker(PreconditionedGradientMaker):
    """Equilibrated SGD as a gradient maker; see `EsgdGradientConfig`."""

    Config = EsgdGradientConfig


@dataclass(frozen=True, kw_only=True)
class SaddleFreeDiagonalGradientConfig(HessianProbeConfig):
    """Saddle-free Newton of the diagonal: ``P g = g / (|mean v * H v| + damping)``, an average that estimates ``diag H``.

    A probe of signs misses entry ``i`` by a variance of ``sum_(j != i) H_ij^2``, which the average has to bring down.
    ``entries`` measures without probes, by a product for each parameter: ``hessian`` takes ``|diag H|`` itself, ``absolute``
    the diagonal of ``|H|``, for which the matrix of all parameters is held.

    Reference: Dauphin et al., NeurIPS 2014, arXiv:1406.2572, section 5 (absolute values); Bekas, Kokiopoulou, Saad 2007
    (diagonal).
    """

    inapplicable = HessianProbe.inapplicable | COVERS_ALL
    only_with: ClassVar[dict[str, dict[str, Any]]] = {"samples": {"entries": "probes"}}

    damping: float = 1e-3
    decay: float | None = 0.95
    samples: int = 1
    """Probes a measurement."""
    entries: Literal["probes", "hessian", "absolute"] = "probes"
    per_tensor: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("entries", self.entries, ["probes", "hessian", "absolute"])
        super().__post_init__()
        check_interval("damping", self.damping, 1e-300, float("inf"))
        check_count("samples", self.samples, 1)

    def inapplicable_options(self) -> dict[str, str]:
        """Also what the way of measuring leaves without a meaning."""
        exact = Hessian().inapplicable
        held = {"probes": ProbeDiagonal.inapplicable, "hessian": exact | Diagonal.inapplicable, "absolute": exact | ONE_BLOCK}
        return super().inapplicable_options() | held[self.entries]

    def triple(self, site: Site) -> Triple | None:
        if self.entries == "absolute":
            return Triple(Hessian(mode=self.mode), Dense(granularity="full"), AbsoluteEigh(damping=self.damping, entries=True))
        if self.entries == "hessian":
            return Triple(Hessian(mode=self.mode), Diagonal(granularity="tensor"), AbsoluteDivision(damping=self.damping))
        probe = HessianProbe(samples=self.samples, mode=self.mode)
        return Triple(probe, ProbeDiagonal("signed"), Division(damping=self.damping))


class SaddleFreeDiagonalGradientMaker(PreconditionedGradientMaker):
    """Saddle-free Newton of the diagonal as a gradient maker; see `SaddleFreeDiagonalGradientConfig`."""

    Config = SaddleFreeDiagonalGradientConfig
