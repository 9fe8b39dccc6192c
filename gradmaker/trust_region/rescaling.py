"""The length of a step, and how much of the last one goes into it: those that the quadratic model likes best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradmaker.trust_region.quadratic import QuadraticModel, inner

__all__ = ["Rescaling"]

PARALLEL = 1e-10
"""Squared sine of an angle, in the metric of the model, below which two directions count as one."""


class Rescaling:
    """``alpha D + mu d`` with the proposed step ``D`` and the last step ``d``, at the minimum of ``m + lambda |.|^2 / 2``.

    Reference: Martens & Grosse, ICML 2015, arXiv:1503.05671, sections 6.4 and 7.
    """

    def __init__(self, model: nn.Module, momentum: bool) -> None:
        """momentum: whether the last step has a share at all"""
        self.names = {p: name for name, p in model.named_parameters()}
        self.momentum = momentum
        self.last: dict[str, Tensor] = {}  # by name; empty before the first step

    def rescale_(self, model: QuadraticModel, proposed: Mapping[nn.Parameter, Tensor], damping: float) -> None:
        """Change a proposed step to the best, in place, and remember it.  proposed: of the parameters that take part"""
        before = {p: self.last[self.names[p]] for p in proposed if self.names[p] in self.last}
        directions = [self._whole(model, d) for d in ([proposed, before] if before else [proposed])]
        _, derivatives, F = model.expand(directions)
        size = torch.stack([torch.stack([inner(a, b) for b in directions]) for a in directions])
        w = minimise(derivatives, F + damping * size)
        for p, step in proposed.items():
            step.mul_(w[0].to(step.dtype))
            if p in before:
                step.add_(before[p] * w[1].to(step.dtype))
            if self.momentum:
                self.last[self.names[p]] = step.clone()

    def dump(self) -> dict[str, Any]:
        """The last step, with a place for every parameter that may have one."""
        places = {name: p for p, name in self.names.items() if p.requires_grad} if self.momentum else {}
        step = {name: self.last[name].clone() if name in self.last else torch.zeros_like(p) for name, p in places.items()}
        return {"known": sorted(self.last), "step": step}

    def check(self, saved: Mapping[str, Any]) -> None:
        """ValueError for a last step of names or shapes that the model does not have."""
        shapes = {name: p.shape for p, name in self.names.items()}
        if wrong := [name for name, d in saved["step"].items() if shapes.get(name) != d.shape]:
            raise ValueError(f"load_state_dict: last_step: {wrong} are no parameters of this model, or of another shape there")
        if lost := sorted(set(saved["known"]) - set(saved["step"])):
            raise ValueError(f"load_state_dict: last_step: {lost} were saved and are not in this state")

    def load(self, saved: Mapping[str, Any]) -> None:
        """Go on from `dump`."""
        own, step = {name: p for p, name in self.names.items()}, saved["step"]
        self.last = {name: step[name].to(own[name].device, own[name].dtype, copy=True) for name in saved["known"]}

    def _whole(self, model: QuadraticModel, direction: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        return {p: direction.get(p, torch.zeros_like(w)) for p, w in model.weights.items()}


def minimise(b: Tensor, A: Tensor) -> Tensor:
    """The ``w`` of the least ``b^T w + w^T A w / 2`` for one or two unknowns, without a host read.  # (k,), (k, k) -> (k,)

    The second direction is left out where it is zero or parallel to the first; a first one without curvature keeps length one.
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
