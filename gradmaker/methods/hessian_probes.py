"""What methods on probes of the Hessian have in common."""

from __future__ import annotations

from dataclasses import dataclass

from gradmaker.config import GradientConfig
from gradmaker.curvature.hessian import Mode, check_mode

__all__ = ["HessianProbeConfig"]


@dataclass(frozen=True, kw_only=True)
class HessianProbeConfig(GradientConfig):
    """What methods on probes of the Hessian have in common."""

    mode: Mode = "reverse"
    """How a product is taken: backwards twice, or forwards over backwards where that is not supported; by ``forward`` at once,
    by ``difference`` from two gradients, for models without second derivatives."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mode(self.mode)
