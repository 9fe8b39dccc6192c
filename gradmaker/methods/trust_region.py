"""Options of the trust region of the K-FAC family: KL clip, adaptive damping, and rescaling by the quadratic model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from gradmaker.config import GradientConfig
from gradmaker.options.checks import check_choice, check_interval
from gradmaker.solvers import AdaptiveDamping
from gradmaker.trust_region.policy import TrustRegion

__all__ = ["TrustRegionGradientConfig"]


@dataclass(frozen=True, kw_only=True)
class TrustRegionGradientConfig(GradientConfig):
    """Options of the trust region.

    The KL clip is ``P g <- nu P g``, ``nu = min(1, sqrt(clip / (eta^2 sum g . P g)))`` with one sum for the model:
    ``eta^2 g . P g`` is twice the KL divergence between the model before and after a step of length ``eta``, to second order.
    Gradients that are not preconditioned are neither in the sum nor scaled.

    Reference: Ba, Grosse, Martens, ICLR 2017 (distributed K-FAC); Pauloski et al., SC 2020, arXiv:2007.00784, whose code has
    ``clip = 1e-3``.
    """

    of_the_maker = (*GradientConfig.of_the_maker, "clip", "clip_learning_rate", "adaptive_damping", "rescale")

    clip: float | None = None
    """kappa, the bound of the KL clip; None: no clip."""
    clip_learning_rate: float | None = None
    """eta, the optimizer's learning rate, needed with ``clip``. With a schedule, set the maker's attribute of this name."""
    adaptive_damping: AdaptiveDamping | None = None
    """The rule that adapts ``damping``, the initial ``lambda``; see `AdaptiveDamping`. A block uses it at its next refresh."""
    rescale: Literal["none", "length", "momentum"] = "none"
    """Whether the damped exact Fisher matrix of the batch sets the length of the step, or length and momentum: for SGD with a
    learning rate of 1. See `rescaled`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clip", "clip_learning_rate"):
            value = getattr(self, name)
            if value is not None:
                check_interval(name, value, 0, math.inf, hint=", or None")
        if (self.clip is None) != (self.clip_learning_rate is None):
            raise ValueError(
                f"clip={self.clip!r}, clip_learning_rate={self.clip_learning_rate!r}: the clip bounds the length of a step, "
                "which is the learning rate times P g: give both, or neither"
            )
        check_choice("rescale", self.rescale, ["none", "length", "momentum"])
        if self.clip is not None and self.rescale != "none":
            raise ValueError(f"clip={self.clip!r}, rescale={self.rescale!r}: both choose the length of the step: give one")
        if self.adaptive_damping is not None and not self.damping:
            raise ValueError(f"damping={self.damping!r}: adaptive_damping multiplies it, so that it has to be positive")

    def damped(self, damping: float) -> TrustRegionGradientConfig:
        """The config with another ``damping``."""
        return replace(self, damping=damping)

    def trust_region(self, model: nn.Module) -> TrustRegion:
        return TrustRegion(model, self)
