"""Averages of gradients that are held in the basis of a solver, by their coordinates there, and turn with it.

The average of coordinates is the coordinates of the average, so that the result is the same; a step projects one gradient,
which its statistic needs as well and which may be held by rows, in place of the average.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gradmaker.block_options import BlockOptions
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.rotation import coordinates, from_coordinates, turned
from gradmaker.linalg.state import State
from gradmaker.representations.base import Frame
from gradmaker.representations.capabilities import Rotated
from gradmaker.representations.roles import PROJECTED, Projects, SlowTensors
from gradmaker.solvers.roles import AveragesInBasis
from gradmaker.triple import Triple

__all__ = ["averaged", "basis_of", "converted", "empty_average", "is_gradient", "projected", "turned_average"]

GRADIENTS, COORDINATES = "average", "coordinates"


def basis_of(triple: Triple, options: BlockOptions, axes: int = 2) -> AveragesInBasis[Any] | None:
    """The solver, where gradients are averaged in its basis. What is grafted, or cast, is an average of gradients.

    axes: of the gradients; a vector has no basis
    """
    if not (options.beta1 and options.turns_average) or options.grafting or options.precision.application:
        return None
    matrices = axes > 1 and isinstance(triple.representation, SlowTensors)
    return triple.solver if matrices and isinstance(triple.solver, AveragesInBasis) else None


def empty_average(frame: Frame, basis: AveragesInBasis[Any] | None, options: BlockOptions) -> State:
    """The average before any gradient, by the name of its form, with its mass; empty where ``beta1`` is 0."""
    name = GRADIENTS if basis is None else COORDINATES
    return {name: frame.zeros(*frame.shape), "mass": frame.zeros()} if options.beta1 else {}


def averaged(average: State, g: Tensor, options: BlockOptions) -> tuple[Tensor, State]:
    """The running average of gradients, bias-corrected: ``m <- beta1 m + (1 - beta1) g``, ``m / (1 - beta1^t)``.

    With ``nesterov_average`` this gradient enters it twice: ``(beta1 m + (1 - beta1) g) / (1 - beta1^(t + 1))``. With
    ``beta1 = 0`` there is no average, and the gradient itself is returned. Also returns the new state of the average.

    g: the gradient, or its coordinates, as the average is held
    """
    beta1 = options.beta1
    if not beta1:
        return g, {}
    name = COORDINATES if COORDINATES in average else GRADIENTS
    moved = average[name].lerp(g, 1 - beta1)
    total = average["mass"] * beta1 + (1 - beta1)
    held, mass = {name: moved, "mass": total}, total.reshape(-1, *[1] * (g.ndim - 1))
    if options.nesterov_average:
        return moved.lerp(g, 1 - beta1).div_(beta1 * mass + 1 - beta1), held
    return moved / mass, held


def is_gradient(triple: Triple) -> bool:
    """Whether evidence is the gradient that a step solves for, whose projection serves both."""
    return isinstance(triple.representation, Projects) and triple.curvature.by_rows


def projected(state: State, triple: Triple, basis: AveragesInBasis[Any], cache: State, g: Tensor | FactoredGradient) -> Tensor:
    """The coordinates of a gradient: those that were measured, where the cache has the basis of the statistic.

    It has an earlier one where a member has failed. ``state``, of a draft, holds them no longer.
    """
    known, representation = state.pop(PROJECTED, None), triple.representation
    assert isinstance(representation, Rotated)
    if known is not None and all(P is Q for P, Q in zip(representation.bases(state), basis.bases(cache), strict=True)):
        return known
    return basis.coordinates(representation, cache, g)


def turned_average(
    average: State, basis: AveragesInBasis[Any] | None, representation: Any, before: State, cache: State, state: State
) -> State:
    """An average in the basis of a refreshed cache.

    before: the last cache; empty in a new plan, where the last statistic, ``state``, has the basis
    """
    if basis is None or not cache or COORDINATES not in average:
        return average
    assert isinstance(representation, Rotated)
    old = basis.bases(before) if before else representation.bases(state)
    return {**average, COORDINATES: turned(average[COORDINATES], old, basis.bases(cache))}


def converted(average: State, solver: Any, cache: State) -> State:
    """A saved average in the other of the two forms, for a config with another interval of refreshes.

    cache: that of the same state; empty where there was no step, whose average is zero
    """
    key, other = (GRADIENTS, COORDINATES) if GRADIENTS in average else (COORDINATES, GRADIENTS)
    x: Tensor = average[key]
    if cache:
        bases = solver.bases(cache)
        x = coordinates(bases, x) if key == GRADIENTS else from_coordinates(bases, x)
    return {other: x, **{name: each for name, each in average.items() if name != key}}
