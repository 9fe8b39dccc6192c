"""KrADagrad and KrADagrad*: Kronecker factors of the inverse statistic, updated without inversion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from gradmaker.capture.sites import Site
from gradmaker.curvature import BatchGradient
from gradmaker.methods.tensor_axes import AxesGradientConfig, HeldRootsGradientConfig
from gradmaker.options.checks import check_choice
from gradmaker.options.deprecations import BASIS_INTERVAL
from gradmaker.options.registry import register
from gradmaker.preconditioner import Preconditioned
from gradmaker.representations import AlternatingInverse, InverseDims
from gradmaker.representations.alternating_inverse import ONE_AXIS
from gradmaker.representations.inverse_dims import Denominator
from gradmaker.schedule import Schedule
from gradmaker.solvers import PositiveRoot
from gradmaker.triple import Triple
from gradmaker.usage import Usage

__all__ = ["KradagradGradientConfig", "KradagradGradientMaker", "KradagradStarGradientConfig", "KradagradStarGradientMaker"]


def _set_published(config: Any, values: dict[str, Any]) -> None:
    """Set the authors' values in a config with ``compat='kradagrad'``. ValueError where the user gave others."""
    check_choice("compat", config.compat, ["none", "kradagrad"])
    if config.compat == "kradagrad":
        for name, value in values.items():
            if getattr(config, name) not in (value, getattr(type(config), name)):
                raise ValueError(f"{name}={getattr(config, name)!r}: compat='kradagrad' sets {value!r}: leave one of them out")
            object.__setattr__(config, name, value)


@dataclass(frozen=True, kw_only=True)
class KradagradStarGradientConfig(HeldRootsGradientConfig):
    """KrADagrad*: ``P G = G x_1 L_1^(1/2k) ... x_k L_k^(1/2k)``, ``L_m`` the inverse of Shampoo's statistic, updated directly.

    ``damping`` is the ridge that ``L`` starts from, relative to the first gradient's statistic. ``denominator='exact'`` is an
    array update that equals Shampoo in exact arithmetic and is accurate in float32; ``tr``, ``fro``, ``op`` and ``d-tr`` are
    the scalar forms. ``compat='kradagrad'`` reproduces the authors' release: ``d-tr``, an absolute ridge, gradients of weight
    one, the length of the gradient, a ridge of 1e-8 before the root.

    Reference: Mei, Moreno, Walters 2023, arXiv:2305.19416; the array form: their update before its
    denominator is bounded by a scalar (square-root Woodbury).
    """

    usage = Usage(hidden=True)
    damping: float = 1e-5
    decay: float | None = None
    grafting: str = "keep"
    preconditioner_interval: int | Schedule = 20
    warmup_steps: int = 5
    denominator: Denominator = "exact"
    compat: Literal["none", "kradagrad"] = "none"

    def __post_init__(self) -> None:
        _set_published(self, {"denominator": "d-tr", "grafting": "keep"})
        super().__post_init__()
        self._state()

    def _state(self) -> InverseDims:
        published = self.compat == "kradagrad"
        return InverseDims(self.denominator, self.damping, not published, published)

    def triple(self, site: Site) -> Triple | None:
        return Triple(BatchGradient(), self._state(), PositiveRoot(damping=1e-8 if self.compat == "kradagrad" else 0.0))


@register("kradagrad_star")
class KradagradStarGradientMaker(Preconditioned[KradagradStarGradientConfig]):
    """KrADagrad* as a gradient maker; see `KradagradStarGradientConfig`."""

    Config = KradagradStarGradientConfig


@dataclass(frozen=True, kw_only=True)
class KradagradGradientConfig(AxesGradientConfig):
    """KrADagrad: ``P G = G x_1 L_1^(1/2) ... x_k L_k^(1/2)``, ``L_m`` jointly the inverse covariance, one updated per step.

    ``preconditioner_interval`` is that of the roots; ``start`` is the initial variance, in units of the mean square of the
    first gradient (None: one, as published). ``compat='kradagrad'`` reproduces the authors' release: that start, a damping that
    may overshoot, roots of the other axes from before the refresh, and before ``start_step`` a gradient that is already
    preconditioned on these axes. With several blocks the release refreshes the roots of one; here all are.

    Reference: Mei, Moreno, Walters 2023, arXiv:2305.19416.
    """

    renamed_options = BASIS_INTERVAL

    usage = Usage(hidden=True)
    damping: float = 1e-8
    decay: float | None = None
    preconditioner_interval: int | Schedule = 3
    stagger: bool = False
    start: float | None = 1.0
    compat: Literal["none", "kradagrad"] = "none"

    def __post_init__(self) -> None:
        _set_published(self, {"start": None, "grafting": "none"})
        super().__post_init__()
        if self.decay == 0:
            raise ValueError(ONE_AXIS)
        self._state()

    @property
    def first_step(self) -> int:
        """The first step that is preconditioned; in the release ``start_step`` applies only to the axis that is updated."""
        return 0 if self.compat == "kradagrad" else self.start_step

    def _state(self) -> AlternatingInverse:
        published = self.compat == "kradagrad"
        return AlternatingInverse(self.damping, self.start, published, self.start_step if published else 0)

    def triple(self, site: Site) -> Triple | None:
        return Triple(BatchGradient(), self._state(), PositiveRoot())


@register("kradagrad")
class KradagradGradientMaker(Preconditioned[KradagradGradientConfig]):
    """KrADagrad as a gradient maker; see `KradagradGradientConfig`."""

    Config = KradagradGradientConfig
