"""What measuring a step's curvatures takes: evidence into statistics, scales, and what is finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradmaker.blocks import Block
from gradmaker.borrowing import borrowing
from gradmaker.capture import OutputGradients
from gradmaker.curvature import Curvature
from gradmaker.step import Step

__all__ = ["check_fired", "fold", "plain_arithmetic", "scaled", "sums_to_finite"]


def fold(curvature: Curvature, step: Step, weight: float, blocks: Sequence[Block], further: set[str]) -> None:
    """Measure a curvature and fold it into the statistics of blocks.  further: extended by the sites that gave evidence"""
    with plain_arithmetic(step.tape.root), borrowing():
        for portion in curvature.measure(step):
            with torch.no_grad():
                for block in blocks:
                    block.update(portion, block.fold(weight), further)


def check_fired(step: Step) -> None:
    """RuntimeError where no layer was seen."""
    if not step.active():
        raise RuntimeError(
            "no layer of this model was called in the forward pass, so no curvature could be measured: declare a call of the "
            "very model that the maker was made for (compile it after making the maker, not before)"
        )


def scaled(gradients: OutputGradients, factor: float) -> OutputGradients:
    """All of them times a number."""
    if factor == 1.0:
        return gradients
    return {m: [[g * factor for g in outs] for outs in calls] for m, calls in gradients.items()}


def sums_to_finite(value: Tensor) -> Tensor:
    """Whether all elements are finite, without a mask of them.  # () bool"""
    return value.detach().sum(dtype=torch.promote_types(value.dtype, torch.float32)).isfinite()


def plain_arithmetic(model: nn.Module) -> Any:
    """The maker's own mathematics runs outside of the user's autocast."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, enabled=False)
