"""A sweep of the damping for one statistic: what each solver makes of it, held against float64."""

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
    """One solver at one damping. What a solver did not manage is infinite."""

    solver: str
    damping: float
    """Relative to the largest eigenvalue."""
    kappa: float
    """Condition of the damped matrix."""
    iterations: int
    residual: float
    """``max|A X^p - I|`` of the damped matrix, in the statistic's precision."""
    error: float
    """Of the root, to the root of the same damped matrix in float64; relative, Frobenius norm."""
    bias: float
    """Of the damping: the exact root of the damped matrix to that of the statistic itself."""
    retries: int


@dataclass(frozen=True)
class Sweep:
    """All rows; prints as a table."""

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
    """Root a statistic, ``H^(-1/p)``, by several solvers with relative dampings; reads the host.

    H: symmetric and positive semidefinite, in the dtype in which the library would hold it  # (d, d)
    solvers: by name; those whose caches hold one root a factor and a diagnosis. Default: all that can do this ``p``.
    """
    if H.ndim != 2 or H.shape[0] != H.shape[1] or not H.is_floating_point():
        raise ValueError(f"damping_sweep: expected a square matrix of floating point numbers, got {tuple(H.shape)}, {H.dtype}")
    if not torch.isfinite(H).all():
        raise ValueError("damping_sweep: the statistic is not finite")
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
    lost = bool(cache["failures"][0])
    root = cache["root_0"][0].double()
    undamped = (Q * s.clamp(min=torch.finfo(torch.float64).tiny) ** (-1 / p)) @ Q.mT
    return SweepRow(
        name,
        damping,
        float(damped[-1] / damped[0]),
        int(found["iterations"]),
        found["residual"],
        float("inf") if lost else float((root - exact).norm() / exact.norm()),
        float((exact - undamped).norm() / undamped.norm()),
        int(found["retries"]),
    )
