"""Solvers: how the preconditioned gradient ``P g`` is computed from a representation of the curvature.

One solver, one file. A `Solver` names the capability that it needs, prepares a cache from a statistic at every refresh, applies
the cache to the gradient at every step, and forms ``P`` from the definition for tests. Code that several solvers share is in
files of its own; matrix functions that do not depend on a representation are in `gradmaker.linalg`.
"""

from gradmaker.options.registry import Registry, register
from gradmaker.solvers.absolute import LU, AbsoluteDivision, AbsoluteEigh, SignedDivision
from gradmaker.solvers.apply import Apply
from gradmaker.solvers.axis_mean import AxisMean
from gradmaker.solvers.base import AnySolver, Solver
from gradmaker.solvers.cholesky import Cholesky
from gradmaker.solvers.conjugate_gradient import CG
from gradmaker.solvers.curveball import CurveBall
from gradmaker.solvers.denman_beavers import DenmanBeavers
from gradmaker.solvers.displaced_neumann import DisplacedNeumann
from gradmaker.solvers.division import Division
from gradmaker.solvers.eigh import Eigh
from gradmaker.solvers.factor_woodbury import FactorWoodbury
from gradmaker.solvers.gram import Gram
from gradmaker.solvers.held_root import HeldRoot
from gradmaker.solvers.higher_order import HigherOrder
from gradmaker.solvers.krylov import Krylov
from gradmaker.solvers.levenberg_marquardt import AdaptiveDamping, LevenbergMarquardt
from gradmaker.solvers.local_regression import LocalRegression
from gradmaker.solvers.neumann import Neumann
from gradmaker.solvers.newton_root import NewtonRoot
from gradmaker.solvers.newton_schulz import NewtonSchulz
from gradmaker.solvers.polar_factor import PolarFactor
from gradmaker.solvers.positive_root import PositiveRoot
from gradmaker.solvers.rotate import Rotate
from gradmaker.solvers.rotated_division import RotatedDivision
from gradmaker.solvers.svd_root import SvdRoot
from gradmaker.solvers.truncated_cg import TruncatedCG

SOLVERS: Registry[type[AnySolver]] = Registry("solver", Solver)
for _part in (
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
    AbsoluteEigh,
    LU,
    AbsoluteDivision,
    SignedDivision,
    TruncatedCG,
    Krylov,
    Neumann,
    DisplacedNeumann,
    CurveBall,
    Apply,
    LocalRegression,
    HigherOrder,
    NewtonSchulz,
    DenmanBeavers,
    SvdRoot,
    HeldRoot,
):
    register(_part)

__all__ = [
    "CG",
    "LU",
    "SOLVERS",
    "AbsoluteDivision",
    "AbsoluteEigh",
    "AdaptiveDamping",
    "AnySolver",
    "Apply",
    "AxisMean",
    "Cholesky",
    "CurveBall",
    "DenmanBeavers",
    "DisplacedNeumann",
    "Division",
    "Eigh",
    "FactorWoodbury",
    "Gram",
    "HeldRoot",
    "HigherOrder",
    "Krylov",
    "LevenbergMarquardt",
    "LocalRegression",
    "Neumann",
    "NewtonRoot",
    "NewtonSchulz",
    "PolarFactor",
    "PositiveRoot",
    "Rotate",
    "RotatedDivision",
    "SignedDivision",
    "Solver",
    "SvdRoot",
    "TruncatedCG",
]
