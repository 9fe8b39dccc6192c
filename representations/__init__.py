"""Representations: how a curvature matrix is held."""

from gradmaker.representations.base import Elementwise, Factored, Fold, Frame, Multiplies, Representation, State
from gradmaker.representations.dense import Dense
from gradmaker.representations.diagonal import Diagonal
from gradmaker.representations.kronecker import Kron, KronDims

REPRESENTATIONS: dict[str, type[Representation]] = {r.__name__: r for r in (Dense, Kron, KronDims, Diagonal)}

__all__ = [
    "REPRESENTATIONS",
    "Dense",
    "Diagonal",
    "Elementwise",
    "Factored",
    "Fold",
    "Frame",
    "Kron",
    "KronDims",
    "Multiplies",
    "Representation",
    "State",
]
