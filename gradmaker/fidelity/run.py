"""One run: a batch and a seed, its values and spectra; what dense runs and runs by probes share."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

from torch import Tensor

from gradmaker.fidelity.approximations import Measured
from gradmaker.fidelity.dense import quadratic_decrease
from gradmaker.fidelity.layers import WHOLE
from gradmaker.fidelity.line_search import best_step
from gradmaker.fidelity.problem import Batch, Problem
from gradmaker.fidelity.values import Spectrum, Value

__all__ = ["NODES", "Options", "Run", "thinned"]

NODES = 256
"""Point masses of a spectrum that is kept."""


@dataclass(frozen=True)
class Options:
    """The options of a comparison that its runs read."""

    damping: float | None
    repeats: int
    dense: bool  # by matrices of the whole model
    probes: int
    iterations: int
    seed: int
    line_searches: str  # all, whole, none
    layerwise: bool  # measures by products with single layers, where they are not dense


@dataclass
class Run:
    """The values of a batch and a seed."""

    problem: Problem
    batch: Batch
    number: int
    seed: int
    values: list[Value] = field(default_factory=list)
    spectra: list[Spectrum] = field(default_factory=list)
    coupling: list[list[float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    measured: dict[str, Measured] = field(default_factory=dict)
    loss: float = 0.0

    def add(self, label: str, layer: str, values: dict[str, float], errors: dict[str, float] | None = None) -> None:
        """Add measures of an approximation in a layer."""
        errors = errors or {}
        for name, value in values.items():
            self.values.append(Value(label, layer, name, value, errors.get(name, 0.0), self.number, self.seed))

    def add_spectrum(self, label: str, layer: str, nodes: Tensor, weights: Tensor | None = None) -> None:
        """Add eigenvalues of the first run."""
        if self.number == self.seed == 0:
            self.spectra.append(thinned(Spectrum(label, layer, *_as_tuples(nodes, weights))))

    def decreases(self, label: str, layer: str, d: Tensor, slope: float, curvature: float, searched: bool) -> None:
        """The decrease of the quadratic model, and of the loss, along a direction of all parameters.  # d: (P,)"""
        model, start = quadratic_decrease(slope, curvature)
        values = {"quadratic": model}
        if searched:
            values["decrease"] = best_step(lambda step: self.problem.loss_at(self.batch, -step * d), start, self.loss)[0]
        self.add(label, layer, values)

    def of_seed(self, seed: int) -> Run:
        """An empty run of the same batch with another seed."""
        return replace(self, seed=seed, values=[], spectra=[], coupling=[], notes=[], measured={})


def _as_tuples(nodes: Tensor, weights: Tensor | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    s, order = nodes.double().reshape(-1).sort()
    w = s.new_full(s.shape, 1 / max(1, len(s))) if weights is None else weights.double().reshape(-1)[order]
    return tuple(s.tolist()), tuple(w.tolist())


def thinned(spectrum: Spectrum, most: int = NODES) -> Spectrum:
    """The same with at most so many point masses: runs of neighbours at their mean. The largest half are kept as they are."""
    n = len(spectrum.nodes)
    if n <= most:
        return spectrum
    kept, rest = most // 2, n - most // 2
    bounds = [rest * k // (most - kept) for k in range(most - kept + 1)]
    nodes, weights = [], []
    for start, stop in itertools.pairwise(bounds):
        mass = sum(spectrum.weights[start:stop])
        moment = sum(x * w for x, w in zip(spectrum.nodes[start:stop], spectrum.weights[start:stop], strict=True))
        nodes.append(moment / mass if mass else spectrum.nodes[start])
        weights.append(mass)
    return replace(spectrum, nodes=(*nodes, *spectrum.nodes[rest:]), weights=(*weights, *spectrum.weights[rest:]))


def searched(options: Options, layer: str) -> bool:
    """Whether the loss is searched along directions of a layer."""
    return options.line_searches == "all" or (options.line_searches == "whole" and layer == WHOLE)
