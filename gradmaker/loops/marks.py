"""Detection of changes of ``.grad``, by identities, version counters and norms."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gradmaker.capture.sharded import is_sharded, local, version, whole
from gradmaker.loops.checks import TWICE

__all__ = ["Marks", "any_nonzero", "refuse_second", "without_others"]


class Marks:
    """The present ``.grad`` of some parameters, by weak references and version counters."""

    def __init__(self, parameters: Iterable[nn.Parameter], norms: bool = False) -> None:
        """norms: whether to keep them for `changed`: some loops read a norm by clipping to infinity, a multiplication by 1"""
        self._then = [(p, None if p.grad is None else (weakref.ref(p.grad), version(p.grad))) for p in parameters]
        self._norms = _norms([p for p, then in self._then if then is not None]) if norms else {}

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

    def changed(self, among: Set[nn.Parameter], scaler: torch.amp.GradScaler | None = None) -> bool:
        """Whether any gradient of these parameters that existed has other values now, but for the scale of a scaler.

        Reads the host only if one was written.
        """
        written = [p for p, then in self._then if then is not None and p in among and not self._same(p, then)]
        now = _norms([p for p in written if p in self._norms])
        if len(now) < len(written):
            return True
        factors = (1.0,) if scaler is None or not written else (1.0, 1 / scaler.get_scale())
        return not any(all(_equal(now[p], self._norms[p] * factor, p) for p in now) for factor in factors)

    @staticmethod
    def _same(p: nn.Parameter, then: tuple[weakref.ref[Tensor], int] | None) -> bool:
        if then is None or p.grad is None:
            return then is None and p.grad is None
        return then[0]() is p.grad and then[1] == version(p.grad)


@torch.no_grad()
def _norms(parameters: Sequence[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """The norms of strided gradients, in float32 or better."""
    held = [(p, local(p.grad)) for p in parameters if p.grad is not None and p.grad.layout is torch.strided]
    found: dict[nn.Parameter, Tensor] = {}
    for dtype in dict.fromkeys(g.dtype for _, g in held):
        own = [(p, g) for p, g in held if g.dtype is dtype]
        norms = torch._foreach_norm([g for _, g in own], 2, dtype=torch.promote_types(dtype, torch.float32))
        found |= {p: norm for (p, _), norm in zip(own, norms, strict=True)}
    return found


def _equal(found: Tensor, expected: Tensor, p: nn.Parameter) -> bool:
    """Whether two norms are equal, but for the rounding of gradients that were divided by a scale."""
    return bool(torch.isclose(found, expected, rtol=torch.finfo(p.dtype).eps, atol=0.0, equal_nan=True))


@torch.no_grad()
def any_nonzero(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether any parameter has a gradient that is not all zero; reads the host."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    found = [whole(g.abs().sum()) if is_sharded(g) else g.count_nonzero() for g in gradients]  # the same on all ranks
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
