"""Rescaling of a step: its length, and the share of the last step in it, at the minimum of the quadratic model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradmaker.trust_region.quadratic import Displacement, QuadraticModel, inner

__all__ = ["minimise", "rescaled"]

PARALLEL = 1e-10
"""Squared sine of an angle, in the metric of the model, below which two directions count as parallel."""


def rescaled(model: QuadraticModel, proposed: Displacement, last: Displacement, damping: float) -> dict[nn.Parameter, Tensor]:
    """``alpha D + mu d`` with the proposed step ``D`` and the last step ``d``, at the minimum of ``m + lambda |.|^2 / 2``.

    Reference: Martens & Grosse, ICML 2015, arXiv:1503.05671, sections 6.4 and 7.

    proposed: of the preconditioned parameters; last: of those of the last step, empty where it has no share
    """
    before = {p: last[p] for p in proposed if p in last}
    directions = [_whole(model, d) for d in ([proposed, before] if before else [proposed])]
    _, derivatives, F = model.expand(directions)
    size = torch.stack([torch.stack([inner(a, b) for b in directions]) for a in directions])
    w = minimise(derivatives, F + damping * size)
    found = {p: step * w[0].to(step.dtype) for p, step in proposed.items()}
    return {p: step.add_(before[p] * w[1].to(step.dtype)) if p in before else step for p, step in found.items()}


def _whole(model: QuadraticModel, direction: Displacement) -> dict[nn.Parameter, Tensor]:
    return {p: direction.get(p, torch.zeros_like(w)) for p, w in model.weights.items()}


def minimise(b: Tensor, A: Tensor) -> Tensor:
    """The minimiser ``w`` of ``b^T w + w^T A w / 2`` for one or two unknowns, without a host read.  # (k,), (k, k) -> (k,)

    The second direction is dropped where it is zero or parallel to the first; a first one without curvature keeps length one.
    """
    diagonal = A.diagonal()
    usable = torch.isfinite(A).all() & torch.isfinite(b).all() & (diagonal[0] > 0)
    alone = torch.where(usable, -b[0] / torch.where(usable, diagonal[0], 1.0), 1.0)
    if len(b) == 1:
        return alone.unsqueeze(0)
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    r, cosine = -b * scale, A[0, 1] * scale[0] * scale[1]
    rest = 1 - cosine.square()
    both = usable & (diagonal[1] > 0) & (rest > PARALLEL)
    w = torch.stack([r[0] - cosine * r[1], r[1] - cosine * r[0]]) / torch.where(both, rest, 1.0) * scale
    return torch.where(both, w, torch.stack([alone, torch.zeros_like(alone)]))
