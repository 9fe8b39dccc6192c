"""Solvers: how a preconditioned gradient is obtained."""

from gradmaker.solvers.axis_mean import AxisMean
from gradmaker.solvers.base import Solver
from gradmaker.solvers.cholesky import Cholesky
from gradmaker.solvers.conjugate_gradient import CG
from gradmaker.solvers.division import Division
from gradmaker.solvers.eigh import Eigh
from gradmaker.solvers.factor_woodbury import FactorWoodbury
from gradmaker.solvers.gram import Gram
from gradmaker.solvers.newton_root import NewtonRoot
from gradmaker.solvers.polar_factor import PolarFactor
from gradmaker.solvers.positive_root import PositiveRoot
from gradmaker.solvers.rotate import Rotate
from gradmaker.solvers.rotated_division import RotatedDivision

SOLVERS: dict[str, type[Solver]] = {
    s.__name__: s
    for s in (
        Cholesky,
        Eigh,
        NewtonRoot,
        FactorWoodbury,
        Rotate,
        Gram,
        CG,
        Division,
        AxisMean,
        RotatedDivision,
        PositiveRoot,
        PolarFactor,
    )
}

__all__ = [
    "CG",
    "SOLVERS",
    "AxisMean",
    "Cholesky",
    "Division",
    "Eigh",
    "FactorWoodbury",
    "Gram",
    "NewtonRoot",
    "PolarFactor",
    "PositiveRoot",
    "Rotate",
    "RotatedDivision",
    "Solver",
]
