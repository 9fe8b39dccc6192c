"""Marks the model calls and differentiations that the library makes for itself: hooks do not take them for the loop's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["borrowed", "borrowing", "foreign", "is_pass"]

_inside: ContextVar[bool] = ContextVar("borrowing", default=False)
_open = 0  # number of open contexts, of all threads


@contextmanager
def borrowing() -> Iterator[None]:
    """Context for every model call and every differentiation that a maker makes to measure, to repeat or to verify."""
    global _open
    token, _open = _inside.set(True), _open + 1
    try:
        yield
    finally:
        _open -= 1
        _inside.reset(token)


def borrowed() -> bool:
    """Whether the running code is inside of `borrowing`. Autograd runs the hooks of an accelerator in a thread of its own."""
    return _inside.get() or (_open > 0 and _differentiating())


def is_pass() -> bool:
    """Whether a call of a model may be a forward pass that the training loop will differentiate.

    Not so: recomputations by checkpoints during a backward pass, calls under functorch transforms, and tracing.
    """
    if not torch.is_grad_enabled() or _inside.get() or _differentiating():
        return False
    return not (torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None)


def foreign(gradient: Tensor) -> bool:
    """Whether the gradient in a hook is not that of the loop's backward pass: of `borrowing`, or of batched cotangents."""
    kinds = torch._C._functorch
    return borrowed() or kinds.is_legacy_batchedtensor(gradient) or kinds.is_batchedtensor(gradient)


def _differentiating() -> bool:
    return torch._C._current_graph_task_id() != -1
