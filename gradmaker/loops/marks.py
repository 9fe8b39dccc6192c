"""Detection of changes of ``.grad``, by identities and version counters."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gradmaker.loops.checks import TWICE

__all__ = ["Marks", "any_nonzero", "refuse_second", "without_others"]


class Marks:
    """The present ``.grad`` of some parameters, by weak references and version counters."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._then = [(p, None if p.grad is None else (weakref.ref(p.grad), p.grad._version)) for p in parameters]

    def moved(self) -> bool:
        """Whether any gradient was added, removed or changed. Parameters without a gradient before and now are unchanged."""
        return any(not self._same(p, then) for p, then in self._then)

    def alive(self) -> bool:
        """Whether any of the gradients still exists: neither set to None, nor replaced, nor zeroed in place.

        Reads the host only if none is unchanged.
        """
        there = [(p, then) for p, then in self._then if then is not None and p.grad is not None and then[0]() is p.grad]
        if any(self._same(p, then) for p, then in there):
            return True
        return any_nonzero([p for p, _ in there])

    def changed(self, among: Set[nn.Parameter]) -> bool:
        """Whether any gradient of these parameters that existed has other values now."""
        return any(then is not None and p in among and not self._same(p, then) for p, then in self._then)

    @staticmethod
    def _same(p: nn.Parameter, then: tuple[weakref.ref[Tensor], int] | None) -> bool:
        if then is None or p.grad is None:
            return then is None and p.grad is None
        return then[0]() is p.grad and then[1] == p.grad._version


@torch.no_grad()
def any_nonzero(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether any parameter has a gradient that is not all zero; reads the host."""
    found = [p.grad.count_nonzero() for p in parameters if p.grad is not None]
    return bool(torch.stack([n.cpu() for n in found]).any()) if found else False


def refuse_second(before: Marks) -> None:
    """RuntimeError if a second backward pass of the same graph wrote into ``.grad``."""
    if before.moved():
        raise RuntimeError(TWICE)


@contextmanager
def without_others(model: nn.Module, served: Set[nn.Parameter]) -> Iterator[None]:
    """Hide, inside of the context, the gradients of parameters that the optimizer does not hold: no step uses them."""
    others = [(p, p.grad) for p in model.parameters() if p not in served and p.grad is not None]
    try:
        for p, _ in others:
            p.grad = None
        yield
    finally:
        for p, g in others:
            p.grad = g
