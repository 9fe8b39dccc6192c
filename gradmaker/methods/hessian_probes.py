"""Options of methods that probe the Hessian with random vectors."""

from __future__ import annotations

from dataclasses import dataclass

from gradmaker.config import GradientConfig
from gradmaker.curvature.hessian import Mode, check_mode

__all__ = ["HessianProbeConfig"]


@dataclass(frozen=True, kw_only=True)
class HessianProbeConfig(GradientConfig):
    """Options of methods that probe the Hessian with random vectors."""

    mode: Mode = "reverse"
    """How Hessian-vector products are computed: reverse over reverse mode, or forward over reverse where that is not supported;
    ``forward``: always forward over reverse; ``difference``: from two gradients, for models without second derivatives."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mode(self.mode)
