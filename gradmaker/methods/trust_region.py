"""The trust region of K-FAC's family: a step is shortened where its predicted change of the model is too large."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmaker.config import GradientConfig, check_interval
from gradmaker.preconditioner import PreconditionedGradientMaker

__all__ = ["ClippedGradientConfig", "ClippedGradientMaker", "clip_factor"]


@dataclass(frozen=True, kw_only=True)
class ClippedGradientConfig(GradientConfig):
    """Options of the KL clip: ``P g <- nu P g``, ``nu = min(1, sqrt(clip / (eta^2 sum g . P g)))`` with one sum for the model.

    ``eta^2 g . P g`` is twice the KL divergence between the model before and after a step of length ``eta``, to second order.
    Plain gradients neither enter the sum nor are scaled.

    Reference: Ba, Grosse, Martens, ICLR 2017 (distributed K-FAC); Pauloski et al., SC 2020, arXiv:2007.00784, whose code has
    ``clip = 1e-3``.
    """

    clip: float | None = None
    """kappa; None does not clip."""
    clip_learning_rate: float | None = None
    """eta, the learning rate that follows: needed with ``clip``. A schedule sets the maker's attribute of this name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clip", "clip_learning_rate"):
            value = getattr(self, name)
            if value is not None:
                check_interval(name, value, math.ulp(0.0), math.inf, hint=", or None")
        if (self.clip is None) != (self.clip_learning_rate is None):
            raise ValueError(
                f"clip={self.clip!r}, clip_learning_rate={self.clip_learning_rate!r}: the clip bounds the length of a step, "
                "which is the learning rate times P g: give both, or neither"
            )


class ClippedGradientMaker(PreconditionedGradientMaker):
    """A gradient maker with a KL clip; see `ClippedGradientConfig`."""

    config: ClippedGradientConfig

    clip_learning_rate: float | None = None
    """Replaces that of the config."""

    @torch.no_grad()
    def _solve(self) -> None:
        clip, rate = self.config.clip, self.clip_learning_rate or self.config.clip_learning_rate
        if clip is None or rate is None or self.step < self.config.start_step:
            super()._solve()
            return
        covered = [p for block in self.plan.blocks for site in block.sites for p in site.parameters.values()]
        before = [(p, p.grad.clone()) for p in covered if p.grad is not None]
        super()._solve()
        after = [p.grad for p, _ in before if p.grad is not None]
        factor = clip_factor([g for _, g in before], after, clip, rate)
        for value in after:
            value.mul_(factor)


def clip_factor(gradients: list[Tensor], solved: list[Tensor], clip: float, rate: float) -> Tensor:
    """``nu``, on the device; 1 where the sum is not positive, as momentum can make it.  # ()"""
    wide = [(g.to(torch.promote_types(g.dtype, torch.float32)), v) for g, v in zip(gradients, solved, strict=True)]
    if not wide:
        return torch.ones(())
    total = torch.stack([(g * v).sum() for g, v in wide]).sum()
    bound = (clip / (rate**2 * total)).sqrt().clamp(max=1.0)
    return torch.where(total > 0, bound, torch.ones_like(bound))
