"""Adaptive damping: the rule of Levenberg and Marquardt, applied to steps that the optimizer has taken."""

from __future__ import annotations

from dataclasses import replace

import torch

from gradmaker.solvers.levenberg_marquardt import AdaptiveDamping
from gradmaker.trust_region.quadratic import QuadraticModel, inner
from gradmaker.trust_region.region import Region

__all__ = ["due", "judged"]


def due(rule: AdaptiveDamping, step: int) -> bool:
    """Whether a step is the last of an interval, and adapts the damping."""
    return (step + 1) % rule.interval == 0


def judged(rule: AdaptiveDamping, region: Region, step: int) -> Region:
    """The region at the beginning of a step, with ``lambda`` adapted by a pending step. One host read, none without one."""
    if region.waiting is None or region.index == step:
        return region
    value, ratio = _judged(rule, region, region.waiting)
    return replace(region, damping=value, ratio=ratio, waiting=None)


def _judged(rule: AdaptiveDamping, region: Region, trial: QuadraticModel) -> tuple[float, float | None]:
    """The next ``lambda``, with ``rho``; both unchanged if the weights have not moved."""
    d = trial.displacement()
    loss, derivatives, F = trial.expand([d])
    size = inner(d, d)
    damping = torch.full_like(size, region.damping)
    predicted = derivatives[0] + F[0, 0] / 2
    if rule.penalised:
        predicted = predicted + damping * size / 2
    change, made = trial.loss_now() - loss, rule.rule()
    found = torch.stack([made.adapt(damping, change, predicted), made.ratio(change, predicted), size]).tolist()
    return (found[0], found[1]) if found[2] != 0 else (region.damping, region.ratio)
