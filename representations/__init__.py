"""Representations: how a curvature matrix is held."""

from gradmaker.representations.alternating_inverse import AlternatingInverse
from gradmaker.representations.base import (
    Elementwise,
    Factored,
    Fold,
    Frame,
    LowRank,
    Multiplies,
    Representation,
    Rotated,
    RowFactored,
    State,
)
from gradmaker.representations.cross_dims import CrossDims
from gradmaker.representations.dense import Dense
from gradmaker.representations.diagonal import Diagonal
from gradmaker.representations.eigenbasis import Eigenbasis
from gradmaker.representations.inverse_dims import InverseDims
from gradmaker.representations.kron_rows import KronRows
from gradmaker.representations.kronecker import Kron, KronDims
from gradmaker.representations.kronecker_sum import KronSum
from gradmaker.representations.low_rank import Truncated, Window
from gradmaker.representations.one_sided import OneSided, ZeroHistory
from gradmaker.representations.rotated_dims import RotatedDims
from gradmaker.representations.rows import Rows
from gradmaker.representations.sketched import Sketched
from gradmaker.representations.tensor_normal import TensorNormal

REPRESENTATIONS: dict[str, type[Representation]] = {
    r.__name__: r
    for r in (
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
    )
}

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
    "InverseDims",
    "Kron",
    "KronDims",
    "KronRows",
    "KronSum",
    "LowRank",
    "Multiplies",
    "OneSided",
    "Representation",
    "Rotated",
    "RotatedDims",
    "RowFactored",
    "Rows",
    "Sketched",
    "State",
    "TensorNormal",
    "Truncated",
    "Window",
    "ZeroHistory",
]
