"""Helpers of iterative solvers: caches that keep tensors from step to step, and a fallback for results that overflow."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmaker.linalg.state import State
from gradmaker.representations.capabilities import Multiplies
from gradmaker.representations.roles import snapshot

__all__ = ["carry", "keep_finite"]


def carry(representation: Multiplies, state: State, previous: State | None, initial: State) -> State:
    """The cache of an iterative solver: this step's state, and the solver's own tensors from ``previous`` or ``initial``."""
    cache = snapshot(representation, state)
    for name, value in {**initial, "failures": torch.zeros(1, dtype=torch.int64, device=value_device(state))}.items():
        cache[name] = value if previous is None else previous[name]
    return cache


def value_device(state: State) -> torch.device:
    """The device of a state."""
    return next(iter(state.values())).device


def keep_finite(cache: State, value: Tensor, fallback: Tensor) -> Tensor:
    """``value`` where it is finite, else ``fallback``; counts the failure in the cache.  # (1, P)"""
    failed = ~torch.isfinite(value).all()
    cache["failures"] = cache["failures"] + failed
    return torch.where(failed, fallback, value)
