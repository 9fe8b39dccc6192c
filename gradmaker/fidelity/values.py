"""The values of a comparison of curvatures, by approximation, layer and measure, with spectra and notes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from gradmaker.fidelity.layers import WHOLE

__all__ = ["Kept", "Mean", "Spectrum", "Value", "Values"]


@dataclass(frozen=True)
class Value:
    """One measure of one run; `error` is its standard error where it was measured with random probes."""

    approximation: str
    layer: str
    measure: str
    value: float
    error: float = 0.0
    batch: int = 0
    seed: int = 0
    step: int = 0


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues as point masses, whose weights sum to one."""

    approximation: str
    layer: str
    nodes: tuple[float, ...]
    weights: tuple[float, ...]
    step: int = 0


@dataclass(frozen=True)
class Kept:
    """What is known of an approximation beside its values."""

    label: str
    method: str
    options: str  # its config
    damping: float
    power: float
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Mean:
    """A mean over batches and seeds, and its standard error: of the spread of runs, and of the probes of each.

    The seeds of a batch share its data: of several batches, it is the spread of their means that counts.
    """

    value: float
    error: float
    runs: int


@dataclass(frozen=True)
class Values:
    """The values of all runs."""

    setting: Mapping[str, Any]
    layers: Sequence[Mapping[str, Any]]  # name, kind, parameters
    approximations: Sequence[Kept]
    values: Sequence[Value]
    spectra: Sequence[Spectrum] = ()
    coupling: Sequence[Sequence[float]] = ()  # |C_lk|_F / (|C_ll|_F |C_kk|_F)^(1/2) between layers
    notes: Sequence[str] = field(default_factory=tuple)

    # ---------------------------------------------------------------- reading
    @property
    def labels(self) -> list[str]:
        """The labels of the approximations."""
        return [a.label for a in self.approximations]

    @property
    def layer_names(self) -> list[str]:
        """The names of the layers, without that of the whole model."""
        return [str(layer["name"]) for layer in self.layers]

    @property
    def steps(self) -> list[int]:
        """The steps of a training at which values were measured."""
        return sorted({v.step for v in self.values})

    def mean(self, approximation: str, measure: str, layer: str = WHOLE, step: int | None = None) -> Mean | None:
        """The mean of a measure over batches and seeds at a step, the last by default; None where it was not measured."""
        at = self.steps[-1] if step is None and self.steps else step
        wanted = (approximation, measure, layer, at)
        runs = [v for v in self.values if (v.approximation, v.measure, v.layer, v.step) == wanted and math.isfinite(v.value)]
        if not runs:
            return None
        n = len(runs)
        mean = sum(v.value for v in runs) / n
        spread = _standard_error(runs)
        probes = math.sqrt(sum(v.error**2 for v in runs)) / n
        return Mean(mean, max(spread, probes), n)

    def value(self, approximation: str, measure: str, layer: str = WHOLE, step: int | None = None) -> float:
        """`mean` as a number. KeyError where it was not measured."""
        found = self.mean(approximation, measure, layer, step)
        if found is None:
            raise KeyError(f"{measure} of {approximation!r} in {layer!r} was not measured")
        return found.value

    def spectrum(self, approximation: str, layer: str = WHOLE, step: int | None = None) -> Spectrum | None:
        """The eigenvalues of the first run at a step; None where they are not known."""
        at = self.steps[-1] if step is None and self.steps else step
        found = [s for s in self.spectra if (s.approximation, s.layer, s.step) == (approximation, layer, at)]
        return found[0] if found else None

    def rows(self, measure: str, step: int | None = None) -> list[tuple[str, list[Mean | None]]]:
        """A measure by layer, the whole model last, with a mean for each approximation."""
        return [(k, [self.mean(a, measure, k, step) for a in self.labels]) for k in (*self.layer_names, WHOLE)]


def _standard_error(runs: Sequence[Value]) -> float:
    """Of the mean: from the means of batches, or of one batch from its seeds; 0 for one run."""
    by_batch: dict[int, list[float]] = {}
    for v in runs:
        by_batch.setdefault(v.batch, []).append(v.value)
    apart = [fmean(own) for own in by_batch.values()] if len(by_batch) > 1 else [v.value for v in runs]
    return stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else 0.0
