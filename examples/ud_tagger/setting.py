"""What a result depends on."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from gradmaker.compare.errors import InputError
from gradmaker.config import read_mapping

__all__ = ["Point", "Setting", "read_setting"]

Point = dict[str, float]
"""A configuration: lr, one_minus_beta1, one_minus_beta2, weight_decay, warmup."""
SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "linear": lambda t, warm, steps: min(t / warm, (steps - t + 1) / max(1, steps - warm)),
    "inverse_sqrt": lambda t, warm, steps: min(t / warm, math.sqrt(warm / t)),
}
"""Share of the peak learning rate at step ``t``, of the number of warm-up steps and of all steps."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything that a result depends on besides the treebank; the defaults are the small version."""

    layers: int = 2
    heads: int = 4
    width: int = 128
    hidden: int = 512
    dropout: float = 0.1
    length: int = 64
    """Longer sentences are cut."""
    batch_size: int = 32
    fraction: float = 0.25
    """Share of the training sentences that are used."""
    least: int = 2
    """Rarer words of the training part are one unknown word."""
    steps: int = 500
    evaluate_every: int = 100
    schedule: str = "linear"
    interval: int = 20
    """Steps between two refreshes of roots."""
    max_dim: int = 1024
    """Longer axes, in the small version that of the vocabulary, have a diagonal factor."""
    block_size: int | None = None
    """Longest side of a block, each with factors and a length of its own; None does not cut."""
    trials: int = 10
    seeds: int = 8
    lr: tuple[float, float] = (1e-4, 1e-2)
    one_minus_beta1: tuple[float, float] = (0.01, 0.2)
    one_minus_beta2: tuple[float, float] = (1e-3, 0.1)
    weight_decay: tuple[float, float] = (1e-4, 0.5)
    """These four are drawn log-uniformly, the next is one of its values."""
    warmup: tuple[float, ...] = (0.02, 0.05, 0.1)
    """Share of the steps."""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise InputError(f"schedule {self.schedule!r}: legal are {', '.join(SCHEDULES)}")
        if self.width % (2 * self.heads):
            raise InputError(f"width {self.width}: expected a multiple of twice the {self.heads} heads")
        if self.seeds < 2 or min(self.trials, self.steps, self.evaluate_every) < 1:
            raise InputError("seeds have to be at least 2; trials, steps and evaluate_every at least 1")

    def share(self, t: int, warmup: float) -> float:
        """Of the peak learning rate, at step ``t`` of ``1, ..., steps``."""
        return SCHEDULES[self.schedule](t, max(1, round(warmup * self.steps)), self.steps)

    def points(self) -> list[Point]:
        """The search's configurations, the same for every method: a Latin hypercube, each range in `trials` strata."""
        generator = random.Random("search")
        points: list[Point] = [{} for _ in range(self.trials)]
        for name in ("lr", "one_minus_beta1", "one_minus_beta2", "weight_decay"):
            low, high = (math.log(end) for end in getattr(self, name))
            for point, stratum in zip(points, generator.sample(range(self.trials), self.trials), strict=True):
                point[name] = math.exp(low + (high - low) * (stratum + generator.random()) / self.trials)
        for point in points:
            point["warmup"] = generator.choice(self.warmup)
        return points


def read_setting(path: Path | None) -> Setting:
    """The defaults, or these with the values of a YAML file. InputError on an unknown key."""
    given = {} if path is None else read_mapping(path)
    legal = [f.name for f in fields(Setting)]
    if unknown := [key for key in given if key not in legal]:
        raise InputError(f"{path}: no setting {', '.join(unknown)}; legal are {', '.join(legal)}")
    return Setting(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})
