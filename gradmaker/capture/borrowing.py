"""Calls of the model that the library makes for itself, which are no passes of anybody's loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["borrowed", "borrowing", "foreign", "is_pass"]

_inside: ContextVar[bool] = ContextVar("borrowing", default=False)
_open = 0  # contexts of all threads


@contextmanager
def borrowing() -> Iterator[None]:
    """Around every call and every differentiation that a maker makes to measure, to repeat or to verify."""
    global _open
    token, _open = _inside.set(True), _open + 1
    try:
        yield
    finally:
        _open -= 1
        _inside.reset(token)


def borrowed() -> bool:
    """Whether what runs now is borrowed. Autograd runs the hooks of an accelerator in a thread of its own."""
    return _inside.get() or (_open > 0 and _differentiating())


def is_pass() -> bool:
    """Whether a call of a model may be a forward pass that its loop will differentiate.

    Repetitions inside of a backward pass, by checkpoints, are none, nor are calls under transforms or while they are traced.
    """
    if not torch.is_grad_enabled() or _inside.get() or _differentiating():
        return False
    return not (torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None)


def foreign(gradient: Tensor) -> bool:
    """Whether a gradient that a hook is given is none of a loop's backward pass: borrowed, or of several cotangents at once."""
    kinds = torch._C._functorch
    return borrowed() or kinds.is_legacy_batchedtensor(gradient) or kinds.is_batchedtensor(gradient)


def _differentiating() -> bool:
    return torch._C._current_graph_task_id() != -1
