"""What hides weights from derivatives, in silence: reentrant checkpoints and scripted code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["nodes", "reenters", "refuse_reentrant", "refuse_scripted"]


def nodes(values: Iterable[Tensor]) -> Iterator[Any]:
    """The nodes of the graph behind some tensors, each once."""
    waiting = [v.grad_fn for v in values if v.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        following = {f for f, _ in node.next_functions if f is not None} - seen
        seen |= following
        waiting.extend(following)


def reenters(value: Tensor) -> bool:
    """Whether a part of a computation lies in a checkpoint with ``use_reentrant=True``.

    To the graph it is one node, of the inputs alone: `torch.autograd.grad` finds no way to the weights inside, takes them for
    constants, and says nothing as long as others are reached.
    """
    return any(node.name().startswith("CheckpointFunction") for node in nodes([value]))


def refuse_reentrant(value: Tensor) -> None:
    """RuntimeError for such a computation, where more than a backward pass is needed."""
    if reenters(value):
        raise RuntimeError(
            "the forward pass has a checkpoint with use_reentrant=True, which allows nothing but a whole backward pass, and "
            "this method needs other derivatives: use checkpoint(..., use_reentrant=False)"
        )


def refuse_scripted(model: nn.Module, what: str) -> None:
    """RuntimeError where derivatives have to go forwards: torch takes those of scripted code for zero."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise RuntimeError(
                f"{what} by forward mode goes through {name or 'the model'} ({type(module).__name__}), whose derivatives torch "
                "takes for zero there: use the module that it was made from, or mode='reverse' or 'difference'"
            )
