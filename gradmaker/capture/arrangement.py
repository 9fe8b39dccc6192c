"""The arrangement of a model: what its passes have proven of where examples and uses of parameters are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import nn

from gradmaker.capture.rules.calls import Call, Layout, Order

__all__ = ["APART", "Arrangement", "Key", "Structure", "key_of", "pattern"]

Key: TypeAlias = tuple[nn.Module, bool, tuple[str, ...]]
"""A module, whether it trains, and the `pattern` of what went in and came out."""
Structure: TypeAlias = frozenset[object]
"""What passes of one kind have in common: the keys of their calls, and the patterns of what the loss is a function of."""

APART = Layout(1, "first")
"""Of a call in which no example has a place of its own: all of it is one."""


def pattern(shapes: Sequence[torch.Size], n: int) -> tuple[str, ...]:
    """Ranks and coincidences with the number of examples: all of a shape that may decide where examples are."""
    return tuple("".join(_mark(size, n, axis) for axis, size in enumerate(shape)) for shape in shapes)


def _mark(size: int, n: int, axis: int) -> str:
    if size == n:
        return "n"
    return "1" if size == 1 else "m" if axis == 0 and size and size % n == 0 else "-"


def key_of(call: Call, n: int) -> Key:
    """What an order is proven for; made once for a call."""
    if call.key is None:
        call.key = (call.module, call.training, pattern([*call.tensor_shapes, *call.shapes], max(n, 1)))
    return call.key


@dataclass
class Arrangement:
    """Verdicts of the self-checks. Empty: orders are read off sizes, and every parameter is seen through its layer."""

    orders: dict[Key, Order | None] = field(default_factory=dict)  # None: no order fits, the call is measured apart
    direct: set[str] = field(default_factory=set)  # parameters that are measured by their own derivatives, without any call
    joint: set[Structure] = field(default_factory=set)  # where no call keeps examples apart: the batch is one example
    last: set[Structure] = field(default_factory=set)  # where in the rows of the outputs examples run fastest
    ungrouped: set[Structure] = field(default_factory=set)  # where rows of examples are not where they seem to be
    checked: dict[Structure, int] = field(default_factory=dict)  # how often; see `SelfChecks`
    whole: dict[Structure, str] = field(default_factory=dict)  # where all of the loss is differentiated twice: at which outputs
    notes: dict[str, str] = field(default_factory=dict)  # by parameter or site: what was found

    @property
    def plain(self) -> bool:
        """Whether one backward pass shows all that is known to be needed."""
        return not (self.direct or self.joint or None in self.orders.values())

    @contextmanager
    def supposing(self, orders: Mapping[Key, Order | None]) -> Iterator[None]:
        """Inside, these orders hold as well."""
        known = self.orders
        self.orders = {**known, **orders}
        try:
            yield
        finally:
            self.orders = known

    def layout(self, call: Call, n: int) -> Layout:
        """Where the examples of a call are."""
        if not self.orders:
            return Layout(n)
        order = self.orders.get(key_of(call, n), "first")
        return APART if order is None else Layout(n, order)
