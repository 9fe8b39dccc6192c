"""What happens to ``P g`` and the weights between the maker's step and that of the base optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["clip", "decaying"]

ROUNDING = 1e-6
"""Added to the norm, as in `torch.nn.utils.clip_grad_norm_`."""


def clip(gradients: Sequence[Tensor], max_norm: float) -> Tensor | None:
    """``g <- g min(1, max_norm / ||g||)`` in place, by the norm of all gradients together, without waiting for a device.

    Returns the factor; None without a gradient.
    """
    if not gradients:
        return None
    norm = torch.nn.utils.get_total_norm(gradients)
    factor = (max_norm / (norm + ROUNDING)).clamp(max=1.0)
    for device in dict.fromkeys(g.device for g in gradients):
        torch._foreach_mul_([g for g in gradients if g.device == device], factor.to(device))
    return factor


@contextmanager
def decaying(groups: Iterable[dict[str, Any]]) -> Iterator[None]:
    """Decoupled weight decay ``p <- (1 - lr weight_decay) p``; inside of the context the groups have none.

    Parameters without a gradient do not decay. An optimizer that decouples by itself computes just this.
    Reference: Loshchilov & Hutter, ICLR 2019, arXiv:1711.05101, algorithm 2.
    """
    decays = [(group, group["weight_decay"]) for group in groups if group.get("weight_decay") and "lr" in group]
    try:
        for group, decay in decays:
            _decay(group, decay)
            group["weight_decay"] = 0.0
        yield
    finally:
        for group, decay in decays:
            group["weight_decay"] = decay


def _decay(group: Mapping[str, Any], decay: float) -> None:
    held = [p for p in group["params"] if p.grad is not None]
    factor = 1 - group["lr"] * decay
    if not held:
        return
    if isinstance(factor, Tensor):
        for p in held:
            p.mul_(factor.to(p.device))
    else:
        torch._foreach_mul_(held, factor)
