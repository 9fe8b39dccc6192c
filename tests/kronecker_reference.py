"""Trajectories of methods on the axes of tensors, re-derived: blocks by loops, averages and lengths from the whole history.

Shares no code with the library. A rule is made once for each block and called with the gradient, the averaged gradient and the
step; it returns the direction of the block.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from tests import oracles
from tests.methods.test_trajectories import raw
from tests.models import Case

Rule = Callable[[Tensor, Tensor, int], Tensor]


def inverse_root(H: Tensor, ridge: float, power: float) -> Tensor:
    """``(H + ridge lambda_max I)^power``."""
    top = float(torch.linalg.eigvalsh(H)[-1])
    return oracles.matrix_power(H + ridge * top * torch.eye(len(H), dtype=H.dtype), power)


def unfolded(g: Tensor, axis: int) -> Tensor:
    return torch.stack([g.select(axis, j).reshape(-1) for j in range(g.shape[axis])])


def moments(history: list[Tensor], axis: int, decay: float | None, averaging: str = "corrected") -> Tensor:
    """The sum, or the mean with weights ``decay^age``, of the unfolding's outer product; or as ``averaging`` says."""
    weights = [1.0 if decay is None else decay**age for age in reversed(range(len(history)))]
    total = sum(w * unfolded(g, axis) @ unfolded(g, axis).T for w, g in zip(weights, history, strict=True))
    assert isinstance(total, Tensor)
    if decay is None or averaging == "raw":
        return total
    return total * (1 - decay) if averaging == "plain" else total / sum(weights)


def on_axis(X: Tensor, g: Tensor, axis: int) -> Tensor:
    return torch.tensordot(X, g, dims=([1], [axis])).movedim(0, axis)


def merged(shape: tuple[int, ...], merge: str, limit: int | None) -> tuple[int, ...]:
    if merge == "none":
        return shape
    kept = [d for d in shape if d > 1] or [1]
    if merge == "to_2d":
        return tuple(kept) if len(kept) < 3 else (kept[0], int(torch.tensor(kept[1:]).prod()))
    out = [kept[0]]
    for d in kept[1:]:
        if out[-1] * d > (limit or 1024):
            out.append(d)
        else:
            out[-1] *= d
    return tuple(out)


class Reference:
    """A whole method: ``rule()`` makes the rule of a block."""

    def __init__(self, rule: Callable[[], Rule], **options: Any) -> None:
        self.rule, self.rules = rule, dict[tuple[str, int], Rule]()
        known = {
            "merge": "none",
            "block": None,
            "rows": "left",
            "grafting": "none",
            "beta1": 0.0,
            "nesterov_average": False,
            "start": 0,
        }
        known |= {"grafting_decay": 0.999}
        assert options.keys() <= known.keys()
        self.options = {**known, **options}
        self.history: dict[tuple[str, int], list[Tensor]] = {}

    def __call__(self, case: Case, step: int) -> dict[str, Tensor]:
        out = {}
        for name, g in raw(case).items():
            shape = merged(tuple(g.shape), self.options["merge"], self.options["block"])
            whole, result = g.reshape(shape), torch.empty(shape, dtype=g.dtype)
            size = self.options["block"]
            starts = [range(0, d, size or d) for d in shape]
            for k, corner in enumerate(product(*starts)):
                where = tuple(slice(c, min(c + (size or d), d)) for c, d in zip(corner, shape, strict=True))
                result[where] = self.oriented((name, k), whole[where], step)
            out[name] = result.reshape(g.shape)
        return out

    def oriented(self, key: tuple[str, int], g: Tensor, step: int) -> Tensor:
        rows = self.options["rows"]
        turn = g.ndim == 2 and (rows == "right" or (rows == "short" and g.shape[0] > g.shape[1]))
        return self.block(key, g.T, step).T if turn else self.block(key, g, step)

    def block(self, key: tuple[str, int], g: Tensor, step: int) -> Tensor:
        history = self.history.setdefault(key, [])
        history.append(g)
        m = self.average(history)
        rule = self.rules.setdefault(key, self.rule())
        U = rule(g, m, step)
        target = self.target(history, m)
        if step < self.options["start"]:
            return g if target is None or self.options["grafting"] in ("keep", "sqrtn") else target
        return U if target is None else U * target.norm() / U.norm()

    def average(self, history: list[Tensor]) -> Tensor:
        b, T = self.options["beta1"], len(history)
        weights = torch.tensor([(1 - b) * b ** (T - 1 - s) for s in range(T)], dtype=torch.float64)
        if self.options["nesterov_average"]:
            weights = b * weights
            weights[-1] += 1 - b
        return torch.einsum("t,t...->...", weights, torch.stack(history)) / weights.sum()

    def target(self, history: list[Tensor], m: Tensor) -> Tensor | None:
        kind, T = self.options["grafting"], len(history)
        if kind == "none":
            return None
        if kind == "keep":
            return m
        if kind == "sqrtn":
            return m.sign()
        past = [g / g.norm() for g in history] if kind == "rmsprop_normalised" else history
        m = m / m.norm() if kind == "rmsprop_normalised" else m
        squares = torch.stack(past).square()
        if kind == "adagrad":
            return m / (squares.sum(0).sqrt() + 1e-10)
        d = self.options["grafting_decay"]
        weights = torch.tensor([(1 - d) * d ** (T - 1 - s) for s in range(T)], dtype=torch.float64)
        v = torch.einsum("t,t...->...", weights, squares)
        return m / ((v / weights.sum() if kind == "adam" else v).sqrt() + 1e-8)
