"""Solver for inverses of damped Kronecker factors by the Woodbury identity, for factors with few rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.factors import average_trace
from gradmaker.linalg.fallbacks import keep_previous, none_of, scalars, try_all
from gradmaker.linalg.powers import axis_power, balanced_ridges
from gradmaker.linalg.state import State
from gradmaker.representations.capabilities import RowFactored
from gradmaker.solvers.base import InverseSolver
from gradmaker.solvers.cholesky import CholeskyInverse
from gradmaker.solvers.definition import DefinedByAxes
from gradmaker.solvers.roles import AppliesRows

__all__ = ["FactorWoodbury"]


@dataclass(frozen=True, kw_only=True)
class FactorWoodbury(InverseSolver[RowFactored], DefinedByAxes[RowFactored], AppliesRows[RowFactored]):
    """``P = (B + r_B I)^-1 (x) (A + r_A I)^-1`` with ``(X^T X + r I)^-1 = (I - X^T (r I + X X^T)^-1 X) / r``.

    The inverted matrix has a side for each row of ``X`` instead of each column. A factor that is given as a matrix is inverted
    as by `Cholesky`. The ridges are K-FAC's, ``r_A = pi sqrt(damping)``, ``r_B = sqrt(damping) / pi``. The small matrix is
    inverted in float64: for a small ``r`` the identity subtracts numbers that nearly cancel.
    A block whose refreshes have all failed gets ``g / damping``, the result for zero curvature.

    Reference: Tang et al., CVPR 2021 (SKFAC); ridges: Martens, Grosse, ICML 2015, arXiv:1503.05671, section 6.3.
    """

    def prepare(self, representation: RowFactored, state: State, previous: State | None) -> State:
        held = representation.rows(state)
        small = [representation.factor(state, k) if one is None else _gram(*one) for k, one in enumerate(held)]
        ridges = self._ridges(held, small)
        inverses, failed = _invert(small, ridges)
        new: State = {}
        for k, (one, inverse, r) in enumerate(zip(held, inverses, ridges, strict=True)):
            if one is None:
                new[f"inverse_{k}"] = inverse
            else:  # what the identity subtracts is X^T core X, with the rows as they are held
                X, mass = one
                core = (inverse / (r * mass)[:, None, None]).to(X.dtype)
                new |= {f"rows_{k}": X, f"core_{k}": core, f"gain_{k}": r.reciprocal(), f"own_{k}": inverse.to(X.dtype)}
        before = previous if previous is not None and _same_shapes(new, previous) else None
        alone = before is None and not none_of(failed)
        default = {name: self._zero_curvature(name, x) for name, x in new.items()} if alone else {}
        return keep_previous(new, failed, before, default)

    def _zero_curvature(self, name: str, x: Tensor) -> Tensor:
        """Entries of the cache for a zero factor, whose inverse is ``I / sqrt(damping)``."""
        gain = self.damping**-0.5
        if name.startswith(("inverse", "own")):
            unit = x.new_full(x.shape[-1:], gain)
            return unit if x.ndim == 2 else torch.diag(unit)
        return x.new_tensor(gain if name.startswith("gain") else 0.0)

    def _ridges(self, held: list[tuple[Tensor, Tensor] | None], small: list[Tensor]) -> list[Tensor]:
        """`pi_ridges` of the factors, without forming them.  small: factors, or Gram matrices of their rows  # each (B,)"""
        dtype = next((one[0].dtype for one in held if one is not None), small[0].dtype)
        traces = []
        for one, M in zip(held, small, strict=True):
            average = average_trace(M) if one is None else M.diagonal(dim1=-2, dim2=-1).sum(-1) / one[0].shape[-1]
            traces.append(average.to(dtype))
        t = torch.stack(traces)
        usable = (torch.isfinite(t) & (t > 0)).all(0)
        return list(torch.where(usable, t / t.log().mean(0).exp(), 1.0) * self.damping**0.5)

    def axes(self, representation: RowFactored, state: State) -> list[Tensor]:
        factors = [representation.factor(state, k) for k in range(2)]
        ridges = balanced_ridges(factors, self.damping**0.5)
        return [axis_power(F, r.unsqueeze(-1), -1.0) for F, r in zip(factors, ridges, strict=True)]

    def solve(self, representation: RowFactored, cache: State, g: Tensor) -> Tensor:
        G = representation.unfold(g)
        return _apply(cache, 0, _apply(cache, 1, G).mT).mT.reshape(g.shape)

    def solve_rows(self, representation: RowFactored, cache: State, rows: FactoredGradient) -> FactoredGradient:
        return FactoredGradient(*(_apply_rows(cache, k, v) for k, v in enumerate((rows.g, rows.a))))


def _gram(X: Tensor, mass: Tensor) -> Tensor:
    """``X X^T / m``, to be inverted in double precision.  # (B, n, n)"""
    return torch.bmm(X, X.mT).double() / mass[:, None, None]


def _apply(cache: State, k: int, v: Tensor) -> Tensor:
    """Vectors, as rows, times the inverse of factor ``k``.  # (B, ..., d)"""
    if (inverse := cache.get(f"inverse_{k}")) is not None:
        return v * inverse.unsqueeze(1) if inverse.ndim == 2 else v @ inverse
    X, core, gain = (cache[f"{name}_{k}"] for name in ("rows", "core", "gain"))
    out = v * gain.view(-1, 1, 1)
    return out.baddbmm_(torch.bmm(torch.bmm(v, X.mT), core), X, alpha=-1)


def _apply_rows(cache: State, k: int, v: Tensor) -> Tensor:
    """`_apply` to the rows of a gradient. For the rows ``X`` of the factor itself, as inputs are in the step of a refresh:

    ``X (X^T X / m + r)^-1 = (X X^T / m + r)^-1 X``, one product for three.
    """
    X = cache.get(f"rows_{k}")
    if X is not None and X.device.type == "cpu" and X.shape == v.shape and torch.equal(X, v):
        return torch.bmm(cache[f"own_{k}"], v)
    return _apply(cache, k, v)


def _invert(matrices: list[Tensor], ridges: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """``(M_k + r_k I)^-1``, and the members for which all fallbacks failed; in one stack where the shapes agree."""
    alike = len({(M.shape, M.dtype) for M in matrices}) == 1
    stacks = [torch.cat(matrices)] if alike else matrices
    added = [torch.cat(ridges)] if alike else ridges
    found, failed = try_all(CholeskyInverse(1), scalars(stacks), [r.to(M.dtype) for M, r in zip(stacks, added, strict=True)])
    inverses = [X.reshape(M.shape) for M, (X,) in zip(stacks, found, strict=True)]
    if not alike:
        return inverses, failed
    return list(inverses[0].chunk(len(matrices))), failed.view(len(matrices), -1).any(0)


def _same_shapes(new: State, previous: State) -> bool:
    """Whether the caches have equal shapes, so that a failed block can keep the last one: shapes depend on the batch."""
    return all(name in previous and previous[name].shape == x.shape for name, x in new.items())
