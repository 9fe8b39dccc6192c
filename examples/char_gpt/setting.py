"""What a result depends on."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

from gradmaker.compare.errors import InputError
from gradmaker.config import read_mapping

__all__ = ["Setting", "read_setting"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything that a result depends on besides the text and the rows."""

    layers: int = 6
    heads: int = 4
    width: int = 96
    context: int = 64
    batch_size: int = 16
    steps: int = 400
    trial_steps: int = 200
    """Steps of the trainings that choose learning rates; the schedule ends with them."""
    warmup: float = 0.1
    """Share of the steps with a rising learning rate."""
    weight_decay: float = 0.1
    beta2: float = 0.99
    """Of every Adam, also beside other methods."""
    evaluate_every: int = 20
    windows: int = 128
    """Windows of the validation part in an evaluation."""
    extensions: int = 3
    """Further learning rates, at most, for a row whose best one is at an end of its grid."""
    seeds: int = 3

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise InputError(f"width {self.width}: expected a multiple of the {self.heads} heads")
        if self.seeds < 2 or min(self.steps, self.trial_steps, self.evaluate_every) < 1:
            raise InputError("seeds have to be at least 2; steps, trial_steps and evaluate_every at least 1")

    def share(self, t: int, steps: int) -> float:
        """Of the peak learning rate, at step ``t = 1, ..., steps``: a linear rise, then half a cosine towards zero."""
        warm = max(1, round(self.warmup * steps))
        return min(t / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, t - warm) / max(1, steps - warm + 1)))


def read_setting(path: Path | None) -> Setting:
    """The defaults, or these with the values of a YAML file. InputError on an unknown key."""
    given = {} if path is None else read_mapping(path)
    legal = [f.name for f in fields(Setting)]
    if unknown := [key for key in given if key not in legal]:
        raise InputError(f"{path}: no setting {', '.join(unknown)}; legal are {', '.join(legal)}")
    return Setting(**given)
