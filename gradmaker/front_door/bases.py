"""Base optimizers: those that undo the method are warned of, a second average of gradients is refused."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gradmaker.blocks import Block

__all__ = ["BaseOptimizerWarning", "refuse_second_average", "warn_of_base"]

UNDOING: Mapping[str, str] = {
    "adam|rmsprop|adagrad|adadelta|adafactor|adopt|lamb": "divides P g by its own root mean square",
    "rprop|lion|sign": "keeps the signs of P g alone",
    "muon|shampoo|soap": "orthogonalises or whitens P g",
}
"""What optimizers do to their gradient that leaves little of a preconditioner, by a pattern of their class names."""


class BaseOptimizerWarning(UserWarning):
    """The base optimizer undoes what the maker has done to the gradient."""


def warn_of_base(optimizer: Optimizer, method: str) -> None:
    """Warn of a base optimizer that undoes the preconditioner."""
    names = [c.__name__ for c in type(optimizer).__mro__ if issubclass(c, Optimizer) and c is not Optimizer]
    for pattern, reason in UNDOING.items():
        if any(re.search(pattern, name, re.IGNORECASE) for name in names):
            warnings.warn(
                f"{type(optimizer).__name__} {reason}, so that little of {method} is left: use torch.optim.SGD as the base "
                "optimizer; averages and second moments are options of the method",
                BaseOptimizerWarning,
                stacklevel=3,
            )
            return


def refuse_second_average(groups: Sequence[Mapping[str, Any]], blocks: Iterable[Block], base: str) -> None:
    """ValueError where the method averages the gradients of a parameter, and the base optimizer those that it gets.

    base: name of its class
    """
    moving = [group for group in groups if group.get("momentum")]
    if not moving:
        return
    averaged: dict[nn.Parameter, tuple[str, Block]] = {
        p: (name, b) for b in blocks if b.options.beta1 for s in b.sites for name, p in s.parameters.items()
    }
    for group in moving:
        for name, block in (averaged[p] for p in group["params"] if p in averaged):
            raise ValueError(
                f"beta1={block.options.beta1:g} of the maker's method averages the gradients of {name}, and "
                f"momentum={float(group['momentum']):g} of {base} averages them again: set beta1=0 in the config, or "
                "momentum=0 in the parameter group (a scheduler that cycles momentum needs beta1=0, or cycle_momentum=False)"
            )
