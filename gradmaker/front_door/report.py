"""Numbers of a maker for a logger."""

from __future__ import annotations

import math

import torch

from gradmaker.preconditioner import PreconditionedGradientMaker
from gradmaker.step.clocks import PlanClocks

__all__ = ["metrics"]


def metrics(maker: PreconditionedGradientMaker) -> dict[str, float]:
    """Damping, skipped steps, passes not measured, failed refreshes, steps since the last measurement and refresh.

    The last two are those of the method's clocks, and not a number before the first; a fallback has its own, with its name.
    """
    found = {"skipped": float(maker.skipped), "unread": float(maker.unread), "failed_refreshes": float(_failed(maker))}
    clocks = maker.step_state.now.clocks
    for name, config in maker.plan.methods.items():
        ending = "" if name == "method" else f"/{name}"
        if config.damping is not None:
            found[f"damping{ending}"] = float(config.damping)
        found |= _staleness(clocks, name, ending, maker.step)
    return found


def _staleness(clocks: PlanClocks, name: str, ending: str, step: int) -> dict[str, float]:
    own = clocks.of[name]
    named = {"measurement": own.measure, "refresh": own.refresh}
    return {f"steps_since_{k}{ending}": float(step - 1 - c.begun) if c.ticks else math.nan for k, c in named.items()}


def _failed(maker: PreconditionedGradientMaker) -> int:
    """The number of refreshes that kept the last good root; reads the host."""
    counts = [part["failures"].sum() for b in maker.plan.blocks for part in (b.state, b.cache) if "failures" in part]
    return int(torch.stack([count.cpu() for count in counts]).sum()) if counts else 0
