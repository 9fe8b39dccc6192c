"""Representations: the second axis, how a curvature matrix is held.

One part, one file: a `Representation` folds evidence into the statistic of a stack of equal blocks, in place, and forms the
dense matrix that it represents, which is its oracle. `base` has the contract of all representations, `capabilities` the
protocols that solvers ask for. No representation counts steps: intervals are options of a method.
"""

from gradmaker.linalg.state import State
from gradmaker.options.registry import Registry, register
from gradmaker.representations.alternating_inverse import AlternatingInverse
from gradmaker.representations.base import Fold, Frame, Representation, average
from gradmaker.representations.capabilities import (
    Elementwise,
    Factored,
    LowRank,
    Multiplies,
    Preconditions,
    Rotated,
    RowFactored,
)
from gradmaker.representations.cross_dims import CrossDims
from gradmaker.representations.dense import Dense
from gradmaker.representations.diagonal import Diagonal
from gradmaker.representations.eigenbasis import Eigenbasis
from gradmaker.representations.gaussian_graph import GaussianGraph
from gradmaker.representations.implicit import Implicit, MatrixFree
from gradmaker.representations.inverse_dims import InverseDims
from gradmaker.representations.kron_pairs import KronPairs
from gradmaker.representations.kron_rows import KronRows
from gradmaker.representations.kronecker import Kron, KronDims
from gradmaker.representations.kronecker_sum import KronSum
from gradmaker.representations.lie import KronQ, TriangularQ
from gradmaker.representations.low_rank import Truncated, Window
from gradmaker.representations.memory import Pairs
from gradmaker.representations.one_sided import OneSided, ZeroHistory
from gradmaker.representations.one_way_dims import OneWayDims
from gradmaker.representations.position import Position
from gradmaker.representations.probe_diagonal import ProbeDiagonal
from gradmaker.representations.root_dims import RootKronDims
from gradmaker.representations.rotated_dims import RotatedDims
from gradmaker.representations.rows import Rows
from gradmaker.representations.sketched import Sketched
from gradmaker.representations.tensor_normal import TensorNormal

REPRESENTATIONS: Registry[type[Representation]] = Registry("representation", Representation)
for _part in (
    Dense,
    Kron,
    KronRows,
    Eigenbasis,
    KronDims,
    TensorNormal,
    Diagonal,
    OneSided,
    KronSum,
    Rows,
    Sketched,
    Window,
    Truncated,
    RotatedDims,
    InverseDims,
    ZeroHistory,
    CrossDims,
    AlternatingInverse,
    Implicit,
    Position,
    GaussianGraph,
    ProbeDiagonal,
    TriangularQ,
    KronQ,
    Pairs,
    KronPairs,
    RootKronDims,
    OneWayDims,
):
    register(_part)

__all__ = [
    "REPRESENTATIONS",
    "AlternatingInverse",
    "CrossDims",
    "Dense",
    "Diagonal",
    "Eigenbasis",
    "Elementwise",
    "Factored",
    "Fold",
    "Frame",
    "GaussianGraph",
    "Implicit",
    "InverseDims",
    "Kron",
    "KronDims",
    "KronPairs",
    "KronQ",
    "KronRows",
    "KronSum",
    "LowRank",
    "MatrixFree",
    "Multiplies",
    "OneSided",
    "OneWayDims",
    "Pairs",
    "Position",
    "Preconditions",
    "ProbeDiagonal",
    "Representation",
    "RootKronDims",
    "Rotated",
    "RotatedDims",
    "RowFactored",
    "Rows",
    "Sketched",
    "State",
    "TensorNormal",
    "TriangularQ",
    "Truncated",
    "Window",
    "ZeroHistory",
    "average",
]
