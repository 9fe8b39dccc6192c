"""Solver for inverses of damped Kronecker factors by the Woodbury identity, for factors with few rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmaker.linalg.factors import average_trace
from gradmaker.linalg.fallbacks import keep_previous, scalars, try_all
from gradmaker.linalg.mode_products import apply_factors
from gradmaker.linalg.powers import axis_power, balanced_ridges
from gradmaker.linalg.state import State
from gradmaker.representations.capabilities import RowFactored
from gradmaker.solvers.base import InverseSolver
from gradmaker.solvers.cholesky import CholeskyInverse
from gradmaker.solvers.definition import DefinedByAxes

__all__ = ["FactorWoodbury"]


@dataclass(frozen=True, kw_only=True)
class FactorWoodbury(InverseSolver[RowFactored], DefinedByAxes[RowFactored]):
    """``P = (B + r_B I)^-1 (x) (A + r_A I)^-1`` with ``(X^T X + r I)^-1 = (I - X^T (r I + X X^T)^-1 X) / r``.

    The inverted matrix has a side for each row of ``X`` instead of each column. A factor that is given as a matrix is inverted
    as by `Cholesky`. The ridges are K-FAC's, ``r_A = pi sqrt(damping)``, ``r_B = sqrt(damping) / pi``. The small matrix is
    inverted in float64: for a small ``r`` the identity subtracts numbers that nearly cancel.
    A block whose refreshes have all failed gets ``g / damping``, the result for zero curvature.

    Reference: Tang et al., CVPR 2021 (SKFAC); ridges: Martens, Grosse, ICML 2015, arXiv:1503.05671, section 6.3.
    """

    def prepare(self, representation: RowFactored, state: State, previous: State | None) -> State:
        new: State = {}
        default: State = {}
        failures = []
        for k, (X, r) in enumerate(zip(representation.rows(state), self._ridges(representation, state), strict=True)):
            whole = X is None
            parts, failed = _invert(representation.factor(state, k) if X is None else X.double() @ X.double().mT, r)
            share = {"inverse": parts.to(r.dtype)} if X is None else {"rows": X, "core": parts.to(r.dtype), "ridge": r}
            new.update({f"{name}_{k}": x for name, x in share.items()})
            default.update({f"{name}_{k}": self._zero_curvature(name, x, whole) for name, x in share.items()})
            failures.append(failed)
        before = previous if previous is not None and _same_shapes(new, previous) else None
        return keep_previous(new, torch.stack(failures).any(0), before, default)

    def _zero_curvature(self, name: str, x: Tensor, whole: bool) -> Tensor:
        """Entries of the cache for a zero factor, whose inverse is ``I / sqrt(damping)``."""
        gain = self.damping**-0.5
        if whole:
            unit = x.new_full(x.shape[-1:], gain)
            return unit if x.ndim == 2 else torch.diag(unit)
        return x.new_tensor(1 / gain if name == "ridge" else 0.0)

    def _ridges(self, representation: RowFactored, state: State) -> list[Tensor]:
        """`pi_ridges` of the factors, without forming them.  # each (B,)"""
        traces = []
        for k, X in enumerate(representation.rows(state)):
            traces.append(average_trace(representation.factor(state, k)) if X is None else X.square().sum(1).mean(-1))
        t = torch.stack(traces)
        usable = (torch.isfinite(t) & (t > 0)).all(0)
        return list(torch.where(usable, t / t.log().mean(0).exp(), 1.0) * self.damping**0.5)

    def axes(self, representation: RowFactored, state: State) -> list[Tensor]:
        factors = [representation.factor(state, k) for k in range(2)]
        ridges = balanced_ridges(factors, self.damping**0.5)
        return [axis_power(F, r.unsqueeze(-1), -1.0) for F, r in zip(factors, ridges, strict=True)]

    def solve(self, representation: RowFactored, cache: State, g: Tensor) -> Tensor:
        rows, columns = (_apply(cache, k) for k in range(2))
        return columns(rows(representation.unfold(g)).mT).mT.reshape(g.shape)


def _apply(cache: State, k: int) -> Callable[[Tensor], Tensor]:
    """The function that multiplies by the inverse of factor ``k`` from the left."""
    if f"inverse_{k}" in cache:
        return lambda v: apply_factors([cache[f"inverse_{k}"]], v)
    X, core, r = (cache[f"{name}_{k}"] for name in ("rows", "core", "ridge"))
    return lambda v: (v - X.mT @ (core @ (X @ v))) / r.view(-1, 1, 1)


def _invert(F: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """``(F + r I)^-1``, and the members for which all fallbacks failed."""
    factors = scalars([F])
    ((inverse,),), failed = try_all(CholeskyInverse(1), factors, [ridge.to(F.dtype)])
    return inverse.reshape(F.shape), failed


def _same_shapes(new: State, previous: State) -> bool:
    """Whether the caches have equal shapes, so that a failed block can keep the last one: shapes depend on the batch."""
    return all(name in previous and previous[name].shape == x.shape for name, x in new.items())
