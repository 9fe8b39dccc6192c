"""The approximations to be compared: names, configs, mappings, triples, makers, each with a label."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradmaker.capture.borrowing import borrowing
from gradmaker.config import GradientConfig
from gradmaker.fidelity.problem import Batch, Problem
from gradmaker.fidelity.represented import HeldCurvature
from gradmaker.linalg.damping import Mode
from gradmaker.methods import from_config
from gradmaker.methods.custom import CustomGradientConfig
from gradmaker.options.registry import METHODS
from gradmaker.plan import FALLBACK
from gradmaker.preconditioner import PreconditionedGradientMaker
from gradmaker.triple import Triple

__all__ = ["Approximation", "Given", "Measured", "Refused", "measured_of", "read_approximations"]

Given: TypeAlias = str | Mapping[str, Any] | GradientConfig | Triple | PreconditionedGradientMaker
EXPECTED = "expected a method's name, a mapping with 'method', a config, a Triple, a maker, or a pair (label, one of these)"
ABSOLUTE: Mode = "absolute"
DAMPING = 1e-3
"""Damping of the exact inverse where an approximation has none in the units of the curvature."""


@dataclass(frozen=True)
class Approximation:
    """A labelled approximation: a config for makers of its own, or a maker with the statistics that it holds."""

    label: str
    method: str
    config: GradientConfig
    maker: PreconditionedGradientMaker | None = None

    def make(self, problem: Problem, seed: int) -> PreconditionedGradientMaker:
        """A maker without statistics, with another seed of sampled targets and probes."""
        maker = METHODS[self.method](problem.model, replace(self.config, seed=self.config.seed + seed))
        assert isinstance(maker, PreconditionedGradientMaker)
        return maker


@dataclass(frozen=True)
class Refused:
    """An approximation that its method refuses, and why."""

    label: str
    method: str
    reason: str


def read_approximations(given: Any, problem: Problem) -> list[Approximation | Refused]:
    """The approximations with distinct labels. ValueError for what is none, and where each is refused."""
    if isinstance(given, (str, Triple, GradientConfig, PreconditionedGradientMaker)) or (
        isinstance(given, Mapping) and "method" in given
    ):
        given = [given]
    items = list(given.items()) if isinstance(given, Mapping) else list(given)
    found: list[Approximation | Refused] = []
    for item in items:
        label, one = item if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) else (None, item)
        read = _read(label, one, problem)
        taken = {a.label for a in found}
        if read.label in taken:
            if label is not None:
                raise ValueError(f"approximations: the label {label!r} is given twice")
            read = replace(read, label=next(f"{read.label} {k}" for k in range(2, 99) if f"{read.label} {k}" not in taken))
        found.append(read)
    if not found:
        raise ValueError(f"approximations: {EXPECTED}; got none")
    if all(isinstance(one, Refused) for one in found):
        raise ValueError("; ".join(one.reason for one in found if isinstance(one, Refused)))
    return found


def _read(label: str | None, given: Any, problem: Problem) -> Approximation | Refused:
    if isinstance(given, PreconditionedGradientMaker):
        if given.model is not problem.model:
            raise ValueError("approximations: a maker of another model; give one that was made for this model, or its config")
        method = _method_of(given.config)
        return Approximation(label or f"{method} (held)", method, given.config, given)
    if isinstance(given, Triple):
        given = CustomGradientConfig(
            curvature=given.curvature,
            representation=given.representation,
            solver=given.solver,
        )
    if isinstance(given, GradientConfig):
        method = _method_of(given)
        return Approximation(label or method, method, given)
    if not isinstance(given, (str, Mapping)):
        raise ValueError(f"approximations: {EXPECTED}; got {type(given).__name__}")
    mapping: Mapping[str, Any] = {"method": given} if isinstance(given, str) else given
    name = str(mapping.get("method"))
    try:
        maker = from_config(problem.model, mapping)
    except ValueError as error:
        return Refused(label or _label(name, mapping), name, str(error))
    if not isinstance(maker, PreconditionedGradientMaker):
        return Refused(label or _label(name, mapping), name, f"approximations: {name!r} has no curvature matrix to compare")
    return Approximation(label or _label(name, mapping), name, maker.config)


def _method_of(config: GradientConfig) -> str:
    for name, maker in METHODS.items():
        if maker.Config is type(config):
            return name
    raise ValueError(f"approximations: {type(config).__name__} is the config of no registered method")


def _label(name: str, mapping: Mapping[str, Any]) -> str:
    others = [f"{k}={_short(v)}" for k, v in mapping.items() if k != "method"]
    return " ".join([name, *others])


def _short(value: Any) -> str:
    return "/".join(value) if isinstance(value, Mapping) else str(value)


# ------------------------------------------------------------------ measured on batches
@dataclass
class Measured:
    """What an approximation holds and does after batches."""

    held: HeldCurvature
    triples: list[Triple]
    draws: bool  # whether another seed gives another approximation
    direction: Tensor  # (P,) P g, in float64
    gradient: Tensor  # (P,) g of the last batch, as it was preconditioned
    damping: float | None
    power: float
    seconds: float
    bytes: int
    notes: list[str] = field(default_factory=list)


def measured_of(
    approximation: Approximation, problem: Problem, batches: Sequence[Batch], seed: int, repeats: int, double: bool
) -> Measured:
    """Measure a fresh maker on batches at constant weights; a given maker as it is, without a change of it.

    repeats: how often each batch is measured; double: whether matrices are formed in float64
    """
    if approximation.maker is not None:
        return _held(approximation.maker, problem, batches[-1], double)
    maker = approximation.make(problem, seed)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for batch in [*batches] * repeats:
                started = time.perf_counter()
                _step(maker, problem, batch)
                seconds = time.perf_counter() - started
            direction = _direction(problem)
            if any(block.held.fresh for block in maker.plan.blocks):  # the first step is left out
                _step(maker, problem, batches[-1])
                direction = _direction(problem)
            held = HeldCurvature(maker, problem.layers, double)
            if len(batches) == 1 and seconds < 1.0:  # the first step has made the self-checks
                seconds = _time(maker, problem, batches[-1])
    finally:
        maker.remove()
    notes = list(dict.fromkeys(str(w.message).splitlines()[0] for w in caught))
    gradient = _gradient(problem, batches[-1])
    damping, power = _solver_of(maker)
    left = sorted(maker.plan.plain)
    if left:
        notes.append(f"left to the plain gradient: {', '.join(left[:6])}{', ...' if len(left) > 6 else ''}")
    triples = _triples(maker)
    draws = any("seed" not in triple.curvature.inapplicable for triple in triples)
    bytes_ = sum(b.bytes for b in maker.plan.blocks)
    return Measured(held, triples, draws, direction, gradient, damping, power, seconds, bytes_, notes)


def _step(maker: PreconditionedGradientMaker, problem: Problem, batch: Batch) -> None:
    for p in problem.model.parameters():
        p.grad = None
    problem.declare(maker, batch)
    with problem.seeded(), borrowing():  # another maker may be attached to the model
        maker.forward_and_backward()


def _time(maker: PreconditionedGradientMaker, problem: Problem, batch: Batch) -> float:
    """The median time of three steps."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        _step(maker, problem, batch)
        times.append(time.perf_counter() - started)
    return sorted(times)[1]


def _direction(problem: Problem) -> Tensor:
    return problem.layers.flat([p.grad for p in problem.layers.parameters]).double()


def _gradient(problem: Problem, batch: Batch) -> Tensor:
    loss = problem.evaluate(batch)[1]
    found = torch.autograd.grad(loss, problem.layers.parameters, allow_unused=True)
    return problem.layers.flat(found).double()


def _solver_of(maker: PreconditionedGradientMaker) -> tuple[float | None, float]:
    """The damping in force, in units of the curvature, and the power, of the method's own blocks."""
    blocks = [b for b in maker.plan.blocks if b.options.method != FALLBACK] or maker.plan.blocks
    solver = blocks[0].triple.solver
    damping = getattr(solver, "damping", None)
    absolute = getattr(solver, "mode", ABSOLUTE) == ABSOLUTE and getattr(solver, "split", "exact") != "each"
    return (float(damping) if damping is not None and absolute else None), solver.exponent


def _held(maker: PreconditionedGradientMaker, problem: Problem, batch: Batch, double: bool) -> Measured:
    held = HeldCurvature(maker, problem.layers, double)
    if not held.matrix_known:
        raise ValueError(
            f"approximations: the maker of {type(maker).__name__} holds no curvature matrix: it has to have made a step, and "
            "a matrix-free method holds none between steps"
        )
    gradient = _gradient(problem, batch)
    damping, power = _solver_of(maker)
    bytes_ = sum(b.bytes for b in maker.plan.blocks)
    triples = _triples(maker)
    return Measured(held, triples, False, held.inverse_product(gradient), gradient, damping, power, float("nan"), bytes_)


def _triples(maker: PreconditionedGradientMaker) -> list[Triple]:
    return list(dict.fromkeys(block.triple for block in maker.plan.blocks))
