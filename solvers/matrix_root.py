"""Base classes of inverse roots by iterations: `NewtonRoot`, `HigherOrder`, `NewtonSchulz` and `DenmanBeavers`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import inf
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradmaker.linalg.damping import RIDGES, ridge_unit
from gradmaker.linalg.diagnosis import diagnose
from gradmaker.linalg.eigen import add_ridge, largest_eigenvalue
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.factors import average_trace, map_blocks, widest
from gradmaker.linalg.fallbacks import Parts, factorise, is_empty, scalars
from gradmaker.linalg.powers import axis_power
from gradmaker.linalg.roots import InverseRoot, apply_roots, apply_roots_to_rows, keep_roots, residual
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_choice, check_interval
from gradmaker.representations.capabilities import Factored
from gradmaker.solvers.definition import DefinedByAxes
from gradmaker.solvers.factor_solver import FactorSolver
from gradmaker.solvers.roles import AppliesRows

__all__ = ["IteratedRoot", "MatrixRoot", "fraction"]

LARGEST = 64
"""Largest numerator and denominator of a fractional root."""


def fraction(power: float, order: float) -> Fraction:
    """``p = order / |power|`` such that a factor's ``-1/p`` gives ``C^power``, as a fraction of small integers.

    ValueError where there is none with numbers up to `LARGEST`.
    """
    p = Fraction(order / abs(power)).limit_denominator(LARGEST)
    if not 0 < p.numerator <= LARGEST or abs(p - order / abs(power)) > 1e-9:
        raise ValueError(
            f"power={power!r} needs the inverse root p = {order / abs(power):g} of a factor: expected a/b with whole "
            f"a, b <= {LARGEST}; use Eigh"
        )
    return p


@dataclass(frozen=True)
class IteratedRoot(InverseRoot):
    """`InverseRoot` by an iteration, accepted where the matrix is positive definite and the residual small."""

    described: ClassVar[bool] = True
    larger_ridges = 5

    @abstractmethod
    def root(self, A: Tensor) -> tuple[Tensor, Tensor]:
        """``A^(-1/p)`` and the number of iterations.  # (B, d, d), (B,)"""

    def matrix(self, A: Tensor, ridge: Tensor) -> tuple[Parts, Tensor]:
        damped = add_ridge(A, ridge)
        X, iterations = self.root(damped)
        positive = torch.linalg.cholesky_ex(damped)[1] == 0  # the residual can miss one negative eigenvalue among many
        found, tolerance = residual(damped, X, self.p)
        return self.parts(X, iterations, found, ridge), positive & (found <= tolerance)


@dataclass(frozen=True, kw_only=True)
class MatrixRoot(FactorSolver[Factored], DefinedByAxes[Factored], AppliesRows[Factored]):
    """``C^power`` from ``(F_k + damping lambda_max(F_k) I)^(-1/p)`` of every factor, ``p = order / |power|``.

    ``mode`` puts the average eigenvalue or 1 in the place of ``lambda_max``, see `gradmaker.linalg.damping`. Factors are
    divided by their average trace first and roots scaled back, so that no scale under- or overflows. A block that fails before
    it ever succeeded keeps its gradient; with absolute damping it gets ``damping^power g``, the result for zero curvature.
    """

    power: float = -0.5
    damping: float = 1e-6
    mode: Literal["absolute", "largest", "trace"] = "largest"
    iterations: int = 100
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("mode", self.mode, RIDGES)
        check_interval("iterations", self.iterations, 1, inf, closed=True)
        check_interval("tolerance", self.tolerance, 0, 1e-4)

    @property
    def accuracy(self) -> float:
        return 10 * self.tolerance

    def least(self, d: int) -> float:
        """Lower bound of ridge / lambda_max for a d x d factor; 0 where unknown."""
        return {"largest": self.damping, "trace": self.damping / d}.get(self.mode, 0.0)

    @abstractmethod
    def root_and_power(self, order: float) -> tuple[int, int]:
        """``a``, ``b`` of ``p = a / b``: the root of the iteration and the power that it is raised to. ValueError if none."""

    @abstractmethod
    def method(self, p: int, d: int) -> IteratedRoot:
        """The iteration for the root ``p`` of d x d matrices."""

    def refuse(self, representation: Factored) -> str | None:
        return self.refuse_order(representation.order(1))

    def refuse_order(self, order: float) -> str | None:
        try:
            self.root_and_power(order)
        except ValueError as error:
            return f"{type(self).__name__} with {error}"
        return None

    def prepare(self, representation: Factored, state: State, previous: State | None) -> State:
        factors = representation.factors(state)
        return self.prepare_factors(factors, representation.order(len(factors)), previous)

    def prepare_factors(self, held: Sequence[Tensor], order: float, previous: State | None) -> State:
        factors = scalars(held)
        a, b = self.root_and_power(order)
        traces = [average_trace(F) for F in factors]
        scales = [torch.where(t > 0, t, 1.0) for t in traces]
        normal = [F / s.view(-1, *[1] * (F.ndim - 1)) for F, s in zip(factors, scales, strict=True)]
        largest = [F.amax(-1) if F.ndim == 2 else widest(_largest, F) for F in normal]
        method = self.method(a, max(F.shape[1] for F in factors))
        units = [ridge_unit(self.mode, top, average_trace(F)) for top, F in zip(largest, normal, strict=True)]
        if self.mode == "absolute":
            units = [1 / s for s in scales]
        results, failed, retries = factorise(method, normal, [self.damping * unit for unit in units])
        powered = [_raise(X, b) for X, _ in results]
        roots = [X * s.view(-1, *[1] * (X.ndim - 1)) ** (-b / a) for X, s in zip(powered, scales, strict=True)]
        diagnosis = diagnose([info for _, info in results], largest, retries, scales)
        gain = self.damping**self.power if self.mode == "absolute" and self.damping else 1.0
        return keep_roots(roots, failed, previous, gain, diagnosis, is_empty(factors))

    def axes(self, representation: Factored, state: State) -> list[Tensor]:
        factors = representation.factors(state)
        exponent = self.power / representation.order(len(factors))
        return [axis_power(F, self.damping, exponent, self.mode) for F in factors]

    def solve(self, representation: Factored, cache: State, g: Tensor) -> Tensor:
        return apply_roots(cache, representation.unfold(g)).reshape(g.shape)

    def solve_rows(self, representation: Factored, cache: State, rows: FactoredGradient) -> FactoredGradient:
        return apply_roots_to_rows(cache, rows)


def _raise(X: Tensor, b: int) -> Tensor:
    """``X^b``, of a matrix or a diagonal; itself for one."""
    if b == 1:
        return X
    return X**b if X.ndim == 2 else map_blocks(lambda x: torch.linalg.matrix_power(x, b), X)


def _largest(F: Tensor) -> Tensor:
    """`largest_eigenvalue`, which knows no zero matrix."""
    return largest_eigenvalue(F).nan_to_num(0.0)
