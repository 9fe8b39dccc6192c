"""Solvers for inverse roots of Kronecker factors, by the name of the algorithm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias, get_args

from gradmaker.linalg.damping import Mode
from gradmaker.linalg.factor_roots import ROOTINGS, FactorRoot
from gradmaker.options.checks import check_choice
from gradmaker.solvers.denman_beavers import DenmanBeavers
from gradmaker.solvers.eigh import Eigh
from gradmaker.solvers.higher_order import HigherOrder
from gradmaker.solvers.matrix_root import MatrixRoot
from gradmaker.solvers.newton_root import NewtonRoot
from gradmaker.solvers.newton_schulz import NewtonSchulz
from gradmaker.solvers.svd_root import SvdRoot

__all__ = ["Root", "Rooter", "rooting"]

Root: TypeAlias = Literal["eigh", "newton", "higher_order", "newton_schulz", "denman_beavers", "svd"]
"""The algorithm for inverse roots. ``svd`` needs statistics that are held by their square roots."""

Rooter: TypeAlias = Eigh | MatrixRoot | SvdRoot

ROOTS: dict[str, Callable[..., Rooter]] = {
    "newton": NewtonRoot,
    "higher_order": HigherOrder,
    "newton_schulz": NewtonSchulz,
    "denman_beavers": DenmanBeavers,
    "svd": SvdRoot,
}


def rooting(root: Root, damping: float, power: float = -0.5, mode: Mode = "largest", interval: int | None = None) -> Rooter:
    """The solver for ``(F_k + damping lambda_max(F_k) I)^power`` of every factor, or as another ``mode`` says.

    interval: see `Eigh`; the other algorithms form the roots anyway

    ValueError for an unknown root, or for a mode that needs eigenvalues, which iterations do not compute.
    """
    check_choice("root", root, get_args(Root))
    if root == "eigh":
        return Eigh(power=power, damping=damping, split="each", mode=mode, interval=interval)
    return ROOTS[root](power=power, damping=damping, mode=mode)


ROOTINGS.update({root: partial(rooting, root) for root in get_args(FactorRoot)})
