"""Check of examples: are they on the axis where they are expected, and independent of each other?

The gradient at the outputs is scaled by a power of two for each example. Then the rows of this example, and no others, have to
scale in every layer. Powers of two commute with rounding, so that correct models give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from gradmaker.capture.arrangement import Key, key_of
from gradmaker.capture.rules.calls import ORDERS, Call, LayerRule, Layout, Order, example_axis
from gradmaker.capture.sites import Site
from gradmaker.capture.tape import OutputGradients, Tape
from gradmaker.loss.head import Head
from gradmaker.self_checks.findings import Findings

__all__ = ["Pair", "check_examples", "vjp_pair"]

LEVELS = 8
"""Number of powers of two: confused examples escape one check in so many, and each check draws anew."""
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Relative to the largest entry of a call. Correct models: 0 (float16: 4e-4, from underflow); wrong ones: 3e-2 and more."""

Pair = tuple[OutputGradients, OutputGradients]


@torch.no_grad()
def levels(n: int, generator: torch.Generator) -> Tensor:
    """A power of two for each example, different for up to `LEVELS` of them.  # (n,)"""
    order = torch.randperm(n, generator=generator) % LEVELS
    shift = torch.randperm(LEVELS, generator=generator)
    return torch.pow(2.0, shift[order].double() - LEVELS // 2)


def vjp_pair(tape: Tape, head: Head, generator: torch.Generator) -> tuple[Pair, Tensor]:
    """Output gradients for a random gradient at the outputs and for the scaled one, and the scales.  # ..., (n,)"""
    n = tape.batch
    c, first, second = levels(n, generator), [], []
    for z, owner, counted in zip(head.outputs, head.owners(n), head.counted(), strict=True):
        r = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z) * counted.to(z)
        first.append(r.unsqueeze(0))
        second.append((r * c.to(z)[owner]).unsqueeze(0))
    with tape.norms.held():
        return (tape.vjp(head.outputs, first), tape.vjp(head.outputs, second)), c


@torch.no_grad()
def check_examples(tape: Tape, sites: Sequence[Site], pair: Pair, c: Tensor, found: Findings) -> None:
    """Find the order of examples in every call; None where none fits."""
    for key, calls in _by_key(tape, sites).items():
        module = key[0]
        own = [use for s in sites for use in s.each_use if module in use.modules]
        rules = list(dict.fromkeys(use.rule for use in own if use.rule is not None))
        used = [
            (call, a, b)
            for call, a, b in _gradients(tape, calls, pair)
            if any(float(g.abs().max()) > 0 for g in a if g.numel())
        ]
        if not used:
            continue
        found.orders[key] = _order(rules, used, c) if rules else _axis(used, c)


def _by_key(tape: Tape, sites: Sequence[Site]) -> Mapping[Key, list[Call]]:
    watched: Iterable[nn.Module] = dict.fromkeys(m for s in sites for m in s.modules)
    keys: dict[Key, list[Call]] = {}
    for module in watched:
        for call in tape.calls.get(module, ()):
            keys.setdefault(key_of(call, tape.batch), []).append(call)
    return keys


def _gradients(tape: Tape, calls: Sequence[Call], pair: Pair) -> Iterable[tuple[Call, list[Tensor], list[Tensor]]]:
    for call in calls:
        j = next(j for j, other in enumerate(tape.calls[call.module]) if other is call)
        yield call, pair[0][call.module][j], pair[1][call.module][j]


def _order(rules: Sequence[LayerRule], used: Sequence[tuple[Call, list[Tensor], list[Tensor]]], c: Tensor) -> Order | None:
    """The first order in which the rows of every example scale like the example."""
    for order in ORDERS:
        layout = Layout(len(c), order)
        if all(_scales(rule, call, a, b, layout, c) for rule in rules for call, a, b in used):
            return order
    return None


def _scales(rule: LayerRule, call: Call, a: list[Tensor], b: list[Tensor], layout: Layout, c: Tensor) -> bool:
    try:
        rows, scaled = (rule.of_outputs(call.module, call, g, layout) for g in (a, b))  # (1, G, n, r, o)
    except ValueError:  # the shapes do not allow this order
        return False
    return _same(scaled, rows * c.to(rows).view(1, 1, -1, 1, 1), call.dtype)


def _axis(used: Sequence[tuple[Call, list[Tensor], list[Tensor]]], c: Tensor) -> Order | None:
    """The order of a call without a rule: whether every output has an axis of examples that `example_axis` finds."""
    n = len(c)
    for call, a, b in used:
        for j, (x, y) in enumerate(zip(a, b, strict=True)):
            axis = example_axis(call, x[0], n, j == 0)
            if axis is None:
                return None
            scale = c.to(x).view(-1, *[1] * (x[0].ndim - 1)).movedim(0, axis) if x[0].ndim > 1 else c.to(x)
            if not _same(y[0], x[0] * scale, call.dtype):
                return None
    return "first"


def _same(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    worst = (found - expected).abs().max()
    return bool(worst <= TOLERANCES.get(dtype, 1e-5) * expected.abs().max())
