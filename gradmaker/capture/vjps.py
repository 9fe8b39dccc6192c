"""Vector-Jacobian products for a chunk of cotangents, with a pass for each example where the calls of a layer mix them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gradmaker.capture.sites import Site
from gradmaker.capture.tape import OutputGradients, Tape

__all__ = ["Source", "VJPs", "bytes_of_vjp", "vjps_of"]

AT_ONCE = 1 << 24
"""Entries of the cotangents that are formed at once where every example gets a pass of its own."""


@dataclass(frozen=True)
class Source:
    """Cotangents at one output, and the example that each entry of the output belongs to."""

    z: Tensor
    cotangents: Tensor  # (k, *z)
    owner: Tensor  # like z, integer; or () for a single example


@dataclass(frozen=True)
class VJPs:
    """Vector-Jacobian products for ``k`` cotangents of ``n`` examples."""

    together: OutputGradients  # (k, *output), all examples in one pass
    apart: OutputGradients = field(default_factory=dict)  # (k n, *output), a pass for each example, of modules that mix them
    direct: dict[nn.Parameter, Tensor] = field(default_factory=dict)  # (k n, *parameter), or (k, *parameter) summed


def vjps_of(
    tape: Tape,
    sites: Sequence[Site],
    sources: Sequence[Source],
    split: bool,
    together: OutputGradients | None = None,
    frozen: bool = True,
) -> VJPs:
    """The vector-Jacobian products that some sites need.

    split: whether examples that mix get a pass each; else they count as one, which is unbiased for cotangents that are drawn
    independently with mean zero. together: output gradients, if known. frozen: batch statistics as constants, by `FrozenNorms`
    """
    outputs, cotangents = [s.z for s in sources], [s.cotangents for s in sources]
    direct = list(dict.fromkeys(p for site in sites if site.direct(tape) for p in site.parameters.values()))
    modules = list(
        dict.fromkeys(m for site in sites if not site.direct(tape) and tape.apart(site.modules) for m in site.modules)
    )
    with tape.norms.held() if frozen else nullcontext():
        if together is None:
            together = tape.vjp(outputs, cotangents)
        split = split and tape.examples > 1
        if not split or not (direct or modules):
            summed = dict(zip(direct, tape.vjp_rows(outputs, cotangents, direct), strict=True)) if direct else {}
            return VJPs(together, {}, summed)
        found = [
            (tape.vjp(outputs, part, modules), tape.vjp_rows(outputs, part, direct)) for part in _each(sources, tape.examples)
        ]
    apart: OutputGradients = {
        m: [
            [torch.cat([gs[m][c][j] for gs, _ in found]) for j in range(len(call.shapes))]
            for c, call in enumerate(tape.calls[m])
        ]
        for m in modules
    }
    return VJPs(together, apart, {p: torch.cat([rows[j] for _, rows in found]) for j, p in enumerate(direct)})


def bytes_of_vjp(tape: Tape, sites: Sequence[Site]) -> int:
    """Memory of the gradients of one cotangent: every call's output once, times the examples where each gets a pass."""
    calls = [call for calls in tape.calls.values() for call in calls]
    total = sum(shape.numel() * call.dtype.itemsize for call in calls for shape in call.shapes)
    for site in sites:
        if site.direct(tape):
            total += tape.examples * sum(p.numel() * p.dtype.itemsize for p in site.parameters.values())
        elif tape.apart(site.modules):
            own = [call for m in site.modules for call in tape.calls[m]]
            total += tape.examples * sum(shape.numel() * call.dtype.itemsize for call in own for shape in call.shapes)
    return total


def _each(sources: Sequence[Source], n: int) -> Iterator[list[Tensor]]:
    """Cotangents restricted to one example each, by cotangent, then example, in chunks of about `AT_ONCE` entries."""
    k = len(sources[0].cotangents)
    step = max(1, AT_ONCE // max(1, sum(s.z.numel() for s in sources)))
    pairs = [(j, e) for j in range(k) for e in range(n)]
    for start in range(0, len(pairs), step):
        chosen = pairs[start : start + step]
        yield [torch.stack([torch.where(s.owner == e, s.cotangents[j], 0.0) for j, e in chosen]) for s in sources]
