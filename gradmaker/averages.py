"""Averages of gradients that are held in the basis of a solver, by their coordinates there, and turn with it.

The average of coordinates is the coordinates of the average, so that the result is the same; a step projects one gradient,
which its statistic needs as well and which may be held by rows, in place of the average.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gradmaker.block_options import BlockOptions
from gradmaker.linalg.rotation import coordinates, from_coordinates, turned
from gradmaker.linalg.state import State
from gradmaker.representations.base import Frame
from gradmaker.representations.capabilities import Rotated
from gradmaker.representations.roles import SlowTensors
from gradmaker.solvers.roles import AveragesInBasis
from gradmaker.triple import Triple

__all__ = ["average_key", "basis_of", "converted", "turned_average"]

GRADIENTS, COORDINATES = "average", "coordinates"


def basis_of(triple: Triple, options: BlockOptions, frame: Frame) -> AveragesInBasis[Any] | None:
    """The solver, where a block's gradients are averaged in its basis. What is grafted, or cast, is an average of gradients."""
    if not (options.beta1 and options.turns_average) or options.grafting or options.precision.application:
        return None
    matrices = len(frame.shape) > 1 and isinstance(triple.representation, SlowTensors)
    return triple.solver if matrices and isinstance(triple.solver, AveragesInBasis) else None


def average_key(basis: AveragesInBasis[Any] | None) -> str:
    """The name of the average in a state."""
    return GRADIENTS if basis is None else COORDINATES


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
