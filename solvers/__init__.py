"""Solvers: how a preconditioned gradient is obtained."""

from gradmaker.solvers.base import Solver
from gradmaker.solvers.cholesky import Cholesky
from gradmaker.solvers.conjugate_gradient import CG
from gradmaker.solvers.division import Division
from gradmaker.solvers.eigh import Eigh
from gradmaker.solvers.newton_root import NewtonRoot

SOLVERS: dict[str, type[Solver]] = {s.__name__: s for s in (Cholesky, Eigh, NewtonRoot, CG, Division)}

__all__ = ["CG", "SOLVERS", "Cholesky", "Division", "Eigh", "NewtonRoot", "Solver"]
