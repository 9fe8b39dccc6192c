"""CASPR-adaptive: Kronecker factors of which the second is measured on gradients preconditioned by the first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from gradmaker.capture.shapes import Merge
from gradmaker.capture.sites import Site
from gradmaker.curvature import BatchGradient
from gradmaker.linalg.factor_roots import FactorRoot
from gradmaker.methods.tensor_axes import AxesGradientConfig
from gradmaker.options.checks import check_choice
from gradmaker.options.deprecations import BASIS_INTERVAL
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import Diagonal, OneWayDims
from gradmaker.schedule import Schedule
from gradmaker.solvers import Division, HeldRoot
from gradmaker.triple import Triple
from gradmaker.usage import Usage

__all__ = ["CasprAdaptiveGradientConfig", "CasprAdaptiveGradientMaker"]


@dataclass(frozen=True, kw_only=True)
class CasprAdaptiveGradientConfig(AxesGradientConfig):
    """CASPR-adaptive: ``P G = L^(-1/2) M R^(-1/2)``, ``L = E[G G^T]``, ``R = E[K^T K] / m`` with ``K = L^(-1/2) G``.

    Not a Kronecker sum, despite the name: KL-Shampoo in one direction. ``M`` is a Nesterov average of gradients; the step of
    each block has the length of NAdam's. Vectors, tensors with a merged axis over ``max_dim``, and all before ``start_step``
    take NAdam's step itself. Roots are refreshed every ``preconditioner_interval`` steps, one step later than in the release,
    and not at the first step without ``warmup_steps``: roots of few gradients lack rank and distort ``R``. The weights of
    Nesterov averages sum to one here, and to ``(1 - b^(t+1)) / (1 - b^t)``, ``b = beta1``, in the release.

    Reference: Duvvuri, Dhillon & Hsieh 2024, submission ``caspr_adaptive`` to AlgoPerf v0.5, external tuning.
    """

    renamed_options = BASIS_INTERVAL
    slow_part = True

    usage = Usage(hidden=True)
    damping: float = 1e-6
    decay: float | None = 0.999
    beta1: float = 0.9
    nesterov_average: bool = True
    grafting: str = "adam"
    start_step: int = 101
    merge: Merge = "to_2d"
    block_size: int | None = 1024
    max_dim: int = 40000
    preconditioner_interval: int | Schedule = 20
    stagger: bool = False
    start: float = 1e-6
    """``L`` starts as this multiple of the identity; ``R`` starts as the identity."""
    root: FactorRoot = "eigh"
    """The algorithm for inverse roots; the release uses ``newton``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("root", self.root, list(get_args(FactorRoot)))
        self._state()

    def _state(self) -> OneWayDims:
        always = self.preconditioner_interval == 1  # with interval 1 the release treats its first step as one after a refresh
        later = self.start * (1 + self.damping) if always else 1.0
        return OneWayDims(always or self.warmup_steps > 0, self.damping, self.start, later, self.root)

    def triple(self, site: Site) -> Triple | None:
        whole = site.shape[1:] if site.view is None else site.view.merged
        if len(site.shape) < 3 or max(whole) > self.max_dim:
            return Triple(BatchGradient(), Diagonal(), Division(power=-0.5, damping=1e-8))
        return Triple(BatchGradient(), self._state(), HeldRoot())


@register("caspr_adaptive")
class CasprAdaptiveGradientMaker(Preconditioned[CasprAdaptiveGradientConfig]):
    """CASPR-adaptive as a gradient maker; see `CasprAdaptiveGradientConfig`."""

    Config = CasprAdaptiveGradientConfig
