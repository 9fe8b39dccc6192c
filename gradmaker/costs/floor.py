"""The floor of a step: its products, convolutions and decompositions alone, measured in the same run at the same sizes.

Each is recorded with its arguments while a step runs, and repeated by itself. What remains of a step is element-wise work,
copies, reads of the host and Python.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradmaker.costs.flops import DECOMPOSITIONS, FLOPS
from gradmaker.costs.timing import clock

__all__ = ["Floor", "Products", "floor", "record"]

LEAST = 4e-3  # seconds of one timing
ROUNDS = 3


@dataclass
class Floor:
    """FLOPs and seconds of the products and of the decompositions of a step."""

    flops: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Seconds of all kinds."""
        return sum(self.seconds.values())

    def add(self, kind: str, flops: float, seconds: float) -> None:
        """Add work of a kind."""
        self.flops[kind] = self.flops.get(kind, 0.0) + flops
        self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds

    def as_dict(self) -> dict[str, Any]:
        """Milliseconds and GFLOPs by kind, for JSON."""
        return {
            "ms": round(1e3 * self.total, 4),
            "gflop": {kind: round(n / 1e9, 4) for kind, n in self.flops.items()},
            "by": {kind: round(1e3 * s, 4) for kind, s in self.seconds.items()},
        }


@dataclass
class _Call:
    """An operator with its arguments."""

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    flops: float

    def seconds(self) -> float:
        """Seconds of the call alone: the median of some rounds."""
        now = clock(next((t.device for t in tree_leaves([self.args, self.kwargs]) if isinstance(t, Tensor)), "cpu"))

        def run(count: int) -> float:
            start = now()
            for _ in range(count):
                self.func(*self.args, **self.kwargs)
            return (now() - start) / count

        with torch.no_grad():
            one = run(1)
            if one > 20 * LEAST:
                return min(one, run(1))
            count = max(1, round(LEAST / max(run(1), 1e-7)))
            return median(run(min(count, 200)) for _ in range(ROUNDS))


class Products(TorchDispatchMode):
    """Records the operators that have FLOPs, by shapes and layouts."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[Any, _Call] = {}
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        formula = FLOPS.get(func.overloadpacket)
        if formula is None:
            return func(*args, **kwargs)
        key = (func, *map(_layout, args), *((name, _layout(value)) for name, value in kwargs.items()))
        new = key not in self.calls
        held = (tuple(map(_copy, args)), {name: _copy(value) for name, value in kwargs.items()}) if new else None
        out = func(*args, **kwargs)
        if held is not None:
            self.calls[key] = _Call(func, *held, float(formula(*args, **kwargs, out_val=out)))
        self.counts[key] += 1
        return out

    def gflop(self) -> float:
        """Of all that was recorded, in units of 10^9."""
        return sum(self.counts[key] * call.flops for key, call in self.calls.items()) / 1e9

    def floor(self) -> Floor:
        """FLOPs and seconds of all that was recorded."""
        made = Floor()
        for key, call in self.calls.items():
            kind = "decompositions" if call.func.overloadpacket in DECOMPOSITIONS else "products"
            made.add(kind, self.counts[key] * call.flops, self.counts[key] * call.seconds())
        return made


def _layout(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.stride()
    return tuple(map(_layout, value)) if isinstance(value, (list, tuple)) else str(value)


def _copy(value: Any) -> Any:
    """The same values and layout in memory of their own, so that a repeated call in place changes nothing else."""
    if isinstance(value, Tensor):
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        return made.copy_(value) if all(value.stride()) else value.clone()
    return type(value)(map(_copy, value)) if isinstance(value, (list, tuple)) else value


def record(step: Callable[[], object]) -> Products:
    """The operators of one step."""
    recorded = Products()
    with recorded:
        step()
    return recorded


def floor(step: Callable[[], object]) -> Floor:
    """The floor of one step."""
    return record(step).floor()
