"""Operators that write into tensors: made at once, or recorded, to be made later by one call."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeAlias

__all__ = ["Recorder", "Writer", "at_once", "make"]

Writer: TypeAlias = Callable[..., object]
"""Called with an in-place operator and its arguments."""


def at_once(operator: Callable[..., object], *args: Any, **options: Any) -> object:
    """Make a write."""
    return operator(*args, **options)


class Recorder:
    """A writer that makes no write, but keeps them in order; what the operators read must not change until they are made."""

    def __init__(self) -> None:
        self.calls: list[partial[object]] = []

    def __call__(self, operator: Callable[..., object], *args: Any, **options: Any) -> object:
        self.calls.append(partial(operator, *args, **options))
        return None


def make(calls: Iterable[partial[object]]) -> None:
    """Make recorded writes. No Python code runs between the first and the last, so that none is interrupted there."""
    deque(map(partial.__call__, calls), maxlen=0)
