"""Gradients as they were at one moment: what has become of them since is told by identities and version counters."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gradmaker.loops.checks import TWICE

__all__ = ["Marks", "any_nonzero", "apart", "refuse_second"]


class Marks:
    """``.grad`` of some parameters at the moment when this is made, without holding it."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._then = [(p, None if p.grad is None else (weakref.ref(p.grad), p.grad._version)) for p in parameters]

    def moved(self) -> bool:
        """Whether any gradient has come, gone or changed. Parameters without a gradient then and now are as they were."""
        return any(not self._same(p, then) for p, then in self._then)

    def alive(self) -> bool:
        """Whether any of the gradients is still there: neither set to None, nor replaced, nor zeroed in place.

        Reads the host only where none is untouched.
        """
        there = [(p, then) for p, then in self._then if then is not None and p.grad is not None and then[0]() is p.grad]
        if any(self._same(p, then) for p, then in there):
            return True
        return any_nonzero([p for p, _ in there])

    def changed(self) -> bool:
        """Whether a gradient that was there has other values now."""
        return any(then is not None and not self._same(p, then) for p, then in self._then)

    @staticmethod
    def _same(p: nn.Parameter, then: tuple[weakref.ref[Tensor], int] | None) -> bool:
        if then is None or p.grad is None:
            return then is None and p.grad is None
        return then[0]() is p.grad and then[1] == p.grad._version


@torch.no_grad()
def any_nonzero(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether any of them has a gradient that is not zero throughout; reads the host."""
    found = [p.grad.count_nonzero() for p in parameters if p.grad is not None]
    return bool(torch.stack([n.cpu() for n in found]).any()) if found else False


def refuse_second(before: Marks) -> None:
    """RuntimeError where a pass was differentiated once more, into ``.grad``."""
    if before.moved():
        raise RuntimeError(TWICE)


@contextmanager
def apart(model: nn.Module, served: Set[nn.Parameter]) -> Iterator[None]:
    """Parameters that the optimizer does not hold have no gradient inside: nobody zeroes it, and nobody steps."""
    others = [(p, p.grad) for p in model.parameters() if p not in served and p.grad is not None]
    try:
        for p, _ in others:
            p.grad = None
        yield
    finally:
        for p, g in others:
            p.grad = g
