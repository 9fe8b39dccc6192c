"""Arrangement of a model: where examples and uses of parameters are, as self-checks of its passes have verified it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import nn

from gradmaker.capture.rules.calls import Call, Layout, Order
from gradmaker.loss.likelihood import Likelihood

__all__ = ["APART", "Arrangement", "Key", "Structure", "key_of", "pattern"]

Key: TypeAlias = tuple[nn.Module, bool, tuple[str, ...]]
"""A module, its training mode, and the `pattern` of its input and output shapes."""
Structure: TypeAlias = frozenset[object]
"""Key of a kind of pass: the keys of its calls, and the patterns of the outputs that the loss is a function of."""

APART = Layout(1, "first")
"""Layout of a call without an axis of examples: the whole batch counts as one example."""


def pattern(shapes: Sequence[torch.Size], n: int) -> tuple[str, ...]:
    """Ranks of shapes, and which sizes are 1, ``n`` or a multiple of ``n``: all that can determine the axis of examples."""
    return tuple("".join(_mark(size, n, axis) for axis, size in enumerate(shape)) for shape in shapes)


def _mark(size: int, n: int, axis: int) -> str:
    if size == n:
        return "n"
    return "1" if size == 1 else "m" if axis == 0 and size and size % n == 0 else "-"


def key_of(call: Call, n: int) -> Key:
    """The `Key` under which the order of a call is stored; computed once for each call."""
    if call.key is None:
        call.key = (call.module, call.training, pattern([*call.tensor_shapes, *call.shapes], max(n, 1)))
    return call.key


@dataclass
class Arrangement:
    """Results of the self-checks. If empty, orders are inferred from sizes, and every parameter is measured by its layer."""

    orders: dict[Key, Order | None] = field(default_factory=dict)  # None: no order fits, every example gets its own vjp
    direct: set[str] = field(default_factory=set)  # parameters that are measured by their own derivatives, not by a layer call
    joint: set[Structure] = field(default_factory=set)  # without an axis of examples in any call: the batch is one example
    last: set[Structure] = field(default_factory=set)  # with the example as the fastest index of the output rows
    ungrouped: set[Structure] = field(default_factory=set)  # with output rows that could not be assigned to examples
    checked: dict[Structure, int] = field(default_factory=dict)  # number of checks; see `SelfChecks`
    whole: dict[Structure, str] = field(default_factory=dict)  # outputs in which the whole loss is differentiated twice
    notes: dict[str, str] = field(default_factory=dict)  # findings, by parameter or site
    likelihood: Likelihood | None = None  # of a loss that is not recorded, once the gradient in the logits has proven it

    @property
    def plain(self) -> bool:
        """Whether one backward pass gives all gradients that are known to be needed."""
        return not (self.direct or self.joint or None in self.orders.values())

    @contextmanager
    def supposing(self, orders: Mapping[Key, Order | None]) -> Iterator[None]:
        """Context in which these orders hold as well."""
        known = self.orders
        self.orders = {**known, **orders}
        try:
            yield
        finally:
            self.orders = known

    def layout(self, call: Call, n: int) -> Layout:
        """The position of the examples in the tensors of a call."""
        if not self.orders:
            return Layout(n)
        order = self.orders.get(key_of(call, n), "first")
        return APART if order is None else Layout(n, order)
