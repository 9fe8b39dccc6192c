"""Checks for reentrant checkpoints and scripted code, which silently make derivatives in weights zero."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["nodes", "reenters", "refuse_reentrant", "refuse_scripted"]


def nodes(values: Iterable[Tensor]) -> Iterator[Any]:
    """Yields the nodes of the autograd graph of some tensors, each once."""
    stack = [v.grad_fn for v in values if v.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        following = {f for f, _ in node.next_functions if f is not None} - seen
        seen |= following
        stack.extend(following)


def reenters(value: Tensor) -> bool:
    """Whether the computation of a tensor contains a checkpoint with ``use_reentrant=True``.

    In the graph the checkpoint is one node that depends on its inputs alone: `torch.autograd.grad` treats the weights inside
    as constants, without an error as long as other weights are reached.
    """
    return any(node.name().startswith("CheckpointFunction") for node in nodes([value]))


def refuse_reentrant(value: Tensor) -> None:
    """RuntimeError for such a computation, where derivatives other than those of a backward pass are needed."""
    if reenters(value):
        raise RuntimeError(
            "the forward pass has a checkpoint with use_reentrant=True, which allows nothing but a whole backward pass, and "
            "this method needs other derivatives: use checkpoint(..., use_reentrant=False)"
        )


def refuse_scripted(model: nn.Module, what: str) -> None:
    """RuntimeError for scripted code where forward-mode derivatives are needed: torch returns zeros there.

    what: the derivatives, as the error names them
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise RuntimeError(
                f"{what} by forward mode goes through {name or 'the model'} ({type(module).__name__}), for which torch returns "
                "zeros: use the module that it was made from, or mode='reverse' or 'difference'"
            )
