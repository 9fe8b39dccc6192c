"""Outputs of a pass beside the watched ones: none of the loss may come by them alone, where its curvature is measured there."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradmaker.capture.borrowing import foreign
from gradmaker.reentrant import nodes, reenters

__all__ = ["OtherOutputs"]


class OtherOutputs:
    """The gradients of outputs that are not watched, against what comes to them by the watched ones.

    An output may be computed from a watched one, whose gradient then holds its own, or be on the way to one, as hidden states
    are. What else arrives is of a part of the loss that the watched outputs do not show.
    """

    def __init__(self, values: Sequence[Tensor]) -> None:
        self.values = list(values)
        self.arrived: dict[int, Tensor] = {}
        self._expected: list[Tensor | None] = []
        self._unknown: set[int] = set()  # of which it is not known
        self._handles = [v.register_hook(_Arrival(self, j)) for j, v in enumerate(self.values)]

    def expect(self, watched: Tensor, gradient: Tensor) -> None:
        """Find what comes to these outputs by a watched one, when its gradient has arrived.

        Through a reentrant checkpoint nothing is found: outputs on the way to the watched one are left out then.
        """
        if self.values and reenters(watched):
            behind = set(nodes([watched]))
            self._unknown = {j for j, v in enumerate(self.values) if v.grad_fn in behind}
        elif self.values:
            found = torch.autograd.grad(watched, self.values, gradient, retain_graph=True, allow_unused=True)
            self._expected = list(found)

    def unexplained(self, watched: Sequence[Tensor]) -> list[tuple[int, ...]]:
        """Shapes of the outputs by which a part of the loss came that the watched ones do not show."""
        stops = {v.grad_fn for v in watched}
        found: list[tuple[int, ...]] = []
        for j, gradient in self.arrived.items():
            if j not in self._unknown and not self._is_expected(j, gradient) and _reaches_leaves(self.values[j], stops):
                found.append(tuple(gradient.shape))
        return found

    def _is_expected(self, j: int, gradient: Tensor) -> bool:
        expected = self._expected[j] if self._expected else None
        if expected is None:
            return not bool(gradient.any())
        tolerance = 1e-5 if gradient.dtype in (torch.float32, torch.float64) else 1e-2
        return bool((gradient - expected).norm() <= tolerance * expected.norm())

    def forget(self) -> None:
        """Forget the gradients of a backward pass that was part of no step."""
        self.arrived, self._expected, self._unknown = {}, [], set()

    def close(self) -> None:
        """Remove the hooks, and release the outputs."""
        for handle in self._handles:
            handle.remove()
        self.values, self._handles = [], []
        self.forget()


class _Arrival:
    """The hook on an output, with a weak reference: the graph holds it, the pass the graph."""

    def __init__(self, owner: OtherOutputs, number: int) -> None:
        self.owner, self.number = weakref.ref(owner), number

    def __call__(self, gradient: Tensor) -> None:
        owner = self.owner()
        if owner is not None and not foreign(gradient):
            owner.arrived[self.number] = gradient.detach()


def _reaches_leaves(value: Tensor, stops: set[Any]) -> bool:
    """Whether a tensor depends on leaves of the graph in other ways than by the nodes where to stop."""
    stack: list[Any] = [value.grad_fn]
    seen = set(stops) | {None}
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # accumulates the gradient of a leaf
            return True
        stack.extend(f for f, _ in node.next_functions)
    return False
