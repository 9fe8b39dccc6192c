"""Solver for inverses of damped Kronecker factors by Cholesky decomposition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradmaker.linalg.certificates import certify_inverse, certify_triangle
from gradmaker.linalg.damping import equal_ridges, pi_ridges
from gradmaker.linalg.diagnosis import diagnose, estimate_largest, unknown
from gradmaker.linalg.eigen import add_ridge, decompose, symmetrise
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.factors import identity, is_tiled
from gradmaker.linalg.fallbacks import Parts, factorise, is_empty, keep_previous, none_of, scalars
from gradmaker.linalg.mode_products import apply_factors
from gradmaker.linalg.powers import axis_power, balanced_ridges
from gradmaker.linalg.roots import InverseRoot, integer_root, residual
from gradmaker.linalg.state import State
from gradmaker.linalg.triangles import apply_inverse, factor, holds_triangle, inverse_of, triangle_of_inverse
from gradmaker.options.checks import check_choice, check_count
from gradmaker.representations.capabilities import Factored
from gradmaker.solvers.base import InverseSolver
from gradmaker.solvers.definition import DefinedByAxes
from gradmaker.solvers.roles import AppliesRows, HeldInForms, Remade

__all__ = ["Cholesky", "CholeskyInverse"]


class CholeskyInverse(InverseRoot):
    """``(A + ridge I)^-1``."""

    larger_ridges = 5
    certified = True

    def attempt(self, F: Tensor, ridge: Tensor) -> tuple[Parts, Tensor]:
        if F.ndim == 2:
            return super().attempt(F, ridge)
        damped = add_ridge(F, ridge)
        U, info = factor(damped)
        X, found, ok = self.certify(damped, U, info == 0)
        return self.parts(X, 0, found, ridge), ok & (info == 0)

    def certify(self, damped: Tensor, U: Tensor, positive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is held, its residual, and the members accepted.  # (B, d, d), (B,), (B,)"""
        X = inverse_of(U, positive)
        return X, *certify_inverse(damped, X)

    def held(self, U: Tensor, X: Tensor) -> Tensor:
        """What is held of the two.  # (B, d, d)"""
        return X

    def matrix(self, A: Tensor, ridge: Tensor) -> tuple[Parts, Tensor]:
        damped = add_ridge(A, ridge)
        U, info = factor(damped)
        positive = info == 0
        X = symmetrise(inverse_of(U, positive))
        found, tolerance = residual(damped, X, 1)
        return self.parts(self.held(U, X), 0, found, ridge), positive & (found <= tolerance)


class CholeskyTriangle(CholeskyInverse):
    """``U`` of ``A + ridge I = U^T U``, accepted where the inverse would be."""

    def certify(self, damped: Tensor, U: Tensor, positive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return U, *certify_triangle(damped, U)

    def held(self, U: Tensor, X: Tensor) -> Tensor:
        return U

    def last_resort(self, A: Tensor, ridge: Tensor) -> tuple[Parts, Tensor]:
        (X, *rest), ok = super().last_resort(A, ridge)
        s, Q, _ = decompose(A)
        root = (s.clamp(min=0) + ridge.unsqueeze(-1)).sqrt().unsqueeze(-1) * Q.mT
        return (torch.linalg.qr(root)[1], *rest), ok


class _Described(CholeskyInverse):
    described: ClassVar[bool] = True


class _DescribedTriangle(CholeskyTriangle):
    described: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Cholesky(
    InverseSolver[Factored], DefinedByAxes[Factored], AppliesRows[Factored], HeldInForms[Factored], Remade[Factored]
):
    """``P = (F_1 + r_1 I)^-1 (x) (F_2 + r_2 I)^-1``; for a dense matrix ``(C + lambda I)^-1``.

    ``split`` is the rule for the ridges ``r``, see `gradmaker.linalg.damping`. A block whose refreshes have
    all failed gets ``g / damping``, the result for zero curvature.

    Reference: Martens, Grosse, ICML 2015, arXiv:1503.05671, sections 4.2 and 6.3.
    """

    undamped: ClassVar[bool] = True

    split: Literal["pi", "each"] = "pi"
    interval: int | None = None
    """Number of steps that one refresh serves: for few, triangular factors are held instead of inverses; None for inverses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("split", self.split, ("pi", "each"))
        if self.interval is not None:
            check_count("interval", self.interval, 1)

    def refuse(self, representation: Factored) -> str | None:
        if representation.order(2) == 1:
            return None
        return f"Cholesky inverts, and {type(representation).__name__} needs a root of every factor: use NewtonRoot or Eigh"

    def prepare(self, representation: Factored, state: State, previous: State | None) -> State:
        factors = scalars(representation.factors(state))
        p = integer_root(self.exponent, representation.order(len(factors)))
        if p != 1:
            raise ValueError(self.refuse(representation))
        triangles = self._triangles(factors)
        methods = [_DescribedTriangle(p) if triangle else _Described(p) for triangle in triangles]
        results, failed, retries = factorise(methods, factors, self._ridges(factors))
        new = {_name(k, triangle): X for k, ((X, _), triangle) in enumerate(zip(results, triangles, strict=True))}
        largest = [estimate_largest(F) for F in factors]
        new["diagnosis"] = diagnose([info for _, info in results], largest, retries)
        default = self._zero_curvature(new) if previous is None and not none_of(failed) else {}
        return keep_previous(new, failed, previous, default, is_empty(factors))

    def _zero_curvature(self, cache: State) -> State:
        """The cache of a member whose refreshes have all failed: ``P = 1 / damping``."""
        gain = (1 / self.damping if self.damping else 1.0) ** (1 / (len(cache) - 1))
        powers = {"triangle": -0.5, "root": 1.0}
        held = {name: gain ** powers[name.split("_")[0]] * identity(X) for name, X in cache.items() if name != "diagnosis"}
        return held | {"diagnosis": unknown(cache["diagnosis"])}

    def _triangles(self, factors: Sequence[Tensor]) -> list[bool]:
        """Whether the triangle of a factor is held, not its inverse."""
        sides = [F.shape[1] for F in factors]
        square = [F.ndim == 3 and not is_tiled(F) for F in factors]
        rows = [prod(sides) // d for d in sides]
        pairs = zip(factors, square, rows, strict=True)
        return [dense and holds_triangle(self.interval, F.shape[1], R, F.device) for F, dense, R in pairs]

    def converted(self, saved: State, like: State) -> State:
        """Triangles from inverses and inverses from triangles, as the intervals of a loaded state may be others."""
        made = dict(saved)
        for k in range(len(like)):
            triangle, root = _name(k, True), _name(k, False)
            if triangle in like and root in saved:
                made[triangle] = triangle_of_inverse(made.pop(root))
            elif root in like and triangle in saved:
                U = made.pop(triangle)
                made[root] = inverse_of(U, (U.diagonal(dim1=-2, dim2=-1) > 0).all(-1))
        return made

    def _ridges(self, factors: Sequence[Tensor]) -> list[Tensor]:
        if self.split == "pi":
            return pi_ridges(factors, self.damping ** (1 / len(factors)))
        return equal_ridges(factors, self.damping)

    def axes(self, representation: Factored, state: State) -> list[Tensor]:
        factors = representation.factors(state)
        if self.split == "each":
            return [axis_power(F, self.damping, -1.0) for F in factors]
        ridges = balanced_ridges(factors, self.damping ** (1 / len(factors)))
        return [axis_power(F, r.unsqueeze(-1), -1.0) for F, r in zip(factors, ridges, strict=True)]

    def solve(self, representation: Factored, cache: State, g: Tensor) -> Tensor:
        return _applied(cache, representation.unfold(g)).reshape(g.shape)

    def solve_rows(self, representation: Factored, cache: State, rows: FactoredGradient) -> FactoredGradient:
        return replace(rows, g=_along(cache, rows.g, 0, 2), a=_along(cache, rows.a, 1, 2))


def _name(k: int, triangle: bool) -> str:
    """The name in the cache of what is held of factor ``k``."""
    return f"triangle_{k}" if triangle else f"root_{k}"


def _applied(cache: State, g: Tensor) -> Tensor:
    """``g x_1 A_1^-1 x_2 A_2^-1 ...`` by what is held of each factor.  # (B, d_1, ..., d_m)"""
    for k in range(g.ndim - 1):
        g = _along(cache, g, k, k + 1)
    return g


def _along(cache: State, g: Tensor, k: int, axis: int) -> Tensor:
    """The product with the inverse of factor ``k``, if there is one, along an axis.  # (B, d_1, ..., d_m)"""
    if (U := cache.get(_name(k, True))) is not None:
        return apply_inverse(U, g, axis)
    return apply_factors([*[None] * (axis - 1), cache.get(_name(k, False))], g)
