"""Checks of option values. An error reads ``name=value: expected ...``, whichever part of the library raises it."""

from __future__ import annotations

import math
from collections.abc import Iterable

from gradmaker.options.suggestions import did_you_mean

__all__ = ["check_choice", "check_count", "check_interval", "check_kind"]


def check_interval(name: str, value: object, low: float, high: float, *, closed: bool = False, hint: str = "") -> None:
    """ValueError unless a number with ``low < value < high``, or ``low <= value < high`` where it is ``closed``.

    hint: further legal values, with a comma, as in ``', or None'``
    """
    x: float = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not ((low <= x if closed else low < x) and x < high):
        raise ValueError(f"{name}={value!r}: expected {low:g} {'<=' if closed else '<'} {name} < {high:g}{hint}")


def check_count(name: str, value: object, least: int, *, hint: str = "") -> None:
    """ValueError unless an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: expected an integer of at least {least}{hint}")


def check_choice(name: str, value: object, legal: Iterable[str], *, hint: str = "") -> None:
    """ValueError unless one of ``legal``."""
    names = list(legal)
    if value not in names:
        raise ValueError(f"{name}={value!r}: {did_you_mean(value, names, hint)}")


def check_kind(name: str, value: object, kind: type) -> None:
    """ValueError unless an instance of the class."""
    if not isinstance(value, kind):
        raise ValueError(f"{name}={value!r}: expected {kind.__name__}")
