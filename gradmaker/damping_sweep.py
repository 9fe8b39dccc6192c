"""A damping sweep for one statistic: errors of the inverse roots of each solver, against float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradmaker.linalg.diagnosis import COLUMNS
from gradmaker.linalg.state import State
from gradmaker.representations.dense import Dense
from gradmaker.solvers import DenmanBeavers, Eigh, HigherOrder, NewtonRoot, NewtonSchulz
from gradmaker.solvers.base import InverseSolver

__all__ = ["Sweep", "SweepRow", "damping_sweep"]

DAMPINGS = tuple(10.0**-k for k in range(1, 13))


@dataclass(frozen=True)
class SweepRow:
    """One solver at one damping. The error is infinite where the solver failed."""

    solver: str
    damping: float
    """Damping relative to the largest eigenvalue."""
    kappa: float
    """Condition number of the damped matrix."""
    iterations: int
    residual: float
    """``max|A X^p - I|`` of the damped matrix, in the statistic's precision."""
    error: float
    """Relative error of the root, in the Frobenius norm, against the root of the same damped matrix in float64."""
    bias: float
    """Relative error by the damping: exact root of the damped matrix against exact root of the statistic."""
    retries: int


@dataclass(frozen=True)
class Sweep:
    """The rows of a damping sweep; prints as a table."""

    rows: list[SweepRow]

    def __str__(self) -> str:
        head = f"{'solver':<14}  damping    kappa  its  residual    error     bias  retries"
        lines = [
            f"{r.solver:<14}  {r.damping:7.0e}  {r.kappa:7.1e}  {r.iterations:3d}  {r.residual:8.1e} {r.error:8.1e} "
            f"{r.bias:8.1e}  {r.retries:7d}"
            for r in self.rows
        ]
        return "\n".join([head, "-" * len(head), *lines])

    def best(self) -> SweepRow:
        """The row with the smallest sum of error and bias."""
        return min(self.rows, key=lambda row: row.error + row.bias)


def damping_sweep(
    H: Tensor, p: int = 4, dampings: Sequence[float] = DAMPINGS, solvers: Mapping[str, InverseSolver[Dense]] | None = None
) -> Sweep:
    """Compute ``H^(-1/p)`` of a statistic by several solvers with relative dampings; waits for the device.

    H: symmetric positive semidefinite, in the dtype of the statistic  # (d, d)
    solvers: by name; their caches must have a root for each factor and a diagnosis. Default: all that can compute ``p``.
    ValueError for an ``H`` that is not square, floating point and finite.
    """
    if H.ndim != 2 or H.shape[0] != H.shape[1] or not H.is_floating_point():
        raise ValueError(f"damping_sweep: expected a square matrix of floating point numbers, got {tuple(H.shape)}, {H.dtype}")
    if not torch.isfinite(H).all():
        raise ValueError("damping_sweep: H has entries that are not finite: expected a finite matrix")
    H = H if H.dtype == torch.float64 else H.float()
    chosen = _solvers(p) if solvers is None else solvers
    s, Q = torch.linalg.eigh(H.double())
    rows = []
    for damping in dampings:
        for name, solver in chosen.items():
            rows.append(_row(name, replace(solver, damping=damping), H, s.clamp(min=0), Q, p, damping))
    return Sweep(rows)


def _solvers(p: int) -> dict[str, InverseSolver[Dense]]:
    every: dict[str, InverseSolver[Dense]] = {
        "Eigh": Eigh(power=-1 / p, split="each", mode="largest"),
        "NewtonRoot": NewtonRoot(power=-1 / p),
        "HigherOrder": HigherOrder(power=-1 / p),
        "NewtonSchulz": NewtonSchulz(power=-1 / p),
        "DenmanBeavers": DenmanBeavers(power=-1 / p),
    }
    return {name: solver for name, solver in every.items() if solver.refuse(Dense()) is None}


def _row(name: str, solver: InverseSolver[Dense], H: Tensor, s: Tensor, Q: Tensor, p: int, damping: float) -> SweepRow:
    state: State = {"matrix": H.unsqueeze(0), "mass": H.new_ones(1)}
    cache = solver.prepare(Dense(), state, None)
    found = dict(zip(COLUMNS, cache["diagnosis"][0, 0].tolist(), strict=True))
    damped = s + damping * s[-1]
    exact = (Q * damped ** (-1 / p)) @ Q.mT
    failed = bool(cache["failures"][0])
    root = cache["root_0"][0].double()
    undamped = (Q * s.clamp(min=torch.finfo(torch.float64).tiny) ** (-1 / p)) @ Q.mT
    return SweepRow(
        name,
        damping,
        float(damped[-1] / damped[0]),
        int(found["iterations"]),
        found["residual"],
        float("inf") if failed else float((root - exact).norm() / exact.norm()),
        float((exact - undamped).norm() / undamped.norm()),
        int(found["retries"]),
    )
