"""Inverse roots of factors, held as matrices, ``X = (A + ridge I)^(-1/p)``: residual, cache, application."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from gradmaker.linalg.diagnosis import unknown
from gradmaker.linalg.eigen import add_ridge, decompose, is_definite, symmetrise
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.factors import conjugate, identity, is_tiled
from gradmaker.linalg.fallbacks import Factorisation, Parts, keep_previous, none_of
from gradmaker.linalg.mode_products import apply_factors
from gradmaker.linalg.state import State

__all__ = [
    "InverseRoot",
    "Root",
    "apply_roots",
    "apply_roots_to_rows",
    "converted_roots",
    "held_roots",
    "in_parts",
    "integer_root",
    "keep_roots",
    "residual",
]


Root: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""``X``, or ``w``, ``Q`` of ``X = Q diag(w) Q^T``.  # (B, d, d) or (B, d); (B, d), (B, d, d)"""
SMALLEST = 64
"""Sides below which the calls of a root in parts cost more than its arithmetic saves."""


def integer_root(power: float, order: float) -> int:
    """``p = order / |power|``: the power ``-1/p`` of each factor gives ``C^power``. ValueError if it is not whole."""
    p = order / abs(power)
    if round(p) < 1 or abs(p - round(p)) > 1e-9:
        raise ValueError(f"power={power!r} needs the inverse root p = {p:g} of a factor: expected a whole p; use Eigh")
    return round(p)


def residual(A: Tensor, X: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """``max|X^h A X^(p-h) - I|``, ``h = floor(p / 2)``, and its tolerance ``50 u kappa``, within 1e-5 (float32: 6e-4) and 0.45.

    It equals ``A X^p - I``, since ``X`` commutes with ``A``. The coupled iterate of Newton's method is no substitute: it shows
    2e-7 where the root has an error of 3e-3. The power is split in halves so that rounding does not dominate: in float32, for
    a rank-deficient ``A`` with the customary ridge of 1e-6 ``lambda_max``, the residual is 0.03-0.1 (p = 1: 0.1-0.35) for a
    root with an error of 0.002-0.07, and that of ``A X^p`` up to 1.0. A root that is wrong by a factor of two gives 0.5 or
    more. A single wrong direction changes entries by about ``1/d`` only, so the caller also checks that ``A`` is positive.
    """  # (B, d, d), (B, d, d) -> (B,), (B,)
    u = torch.finfo(A.dtype).eps / 2
    right = torch.linalg.matrix_power(X, p - p // 2)
    product, kappa = A @ right, _norm(A) * _norm(right)
    if p > 1:
        left = torch.linalg.matrix_power(X, p // 2)
        product, kappa = left @ product, kappa * _norm(left)
    product.diagonal(dim1=-2, dim2=-1).sub_(1)
    return product.abs_().amax((-2, -1)), (50 * u * kappa).clamp(max(1e-5, 1e4 * u), 0.45)


def _norm(A: Tensor) -> Tensor:
    """The infinity norm.  # (B,)"""
    return A.abs().sum(-1).amax(-1)


@dataclass(frozen=True)
class InverseRoot(Factorisation):
    """Inverse root ``(A + ridge I)^(-1/p)``; parts are one tensor, (B, d, d) or (B, d).

    If ``described``, a second part (B, 3) holds iterations, residual and ridge of the attempt.
    """

    p: int
    described: ClassVar[bool] = False

    @property
    def summaries(self) -> int:
        return int(self.described)

    def parts(self, X: Tensor, iterations: Tensor | float, found: Tensor, ridge: Tensor) -> Parts:
        """The parts of an attempt.  # residual (B,), ridge (B,)"""
        return (X, torch.stack([torch.zeros_like(ridge) + iterations, found, ridge], -1)) if self.described else (X,)

    def diagonal(self, a: Tensor, ridge: Tensor) -> tuple[Parts, Tensor]:
        damped = a.clamp(min=0) + ridge.unsqueeze(-1)
        x = damped ** (-1 / self.p)
        found = (damped * x**self.p - 1).abs().amax(-1)
        return self.parts(x, 0, found, ridge), is_definite(a) & torch.isfinite(x).all(-1)

    def last_resort(self, A: Tensor, ridge: Tensor) -> tuple[Parts, Tensor]:
        s, Q, ok = decompose(A)
        X = conjugate(Q, (s.clamp(min=0) + ridge.unsqueeze(-1)) ** (-1 / self.p))
        found, tolerance = residual(add_ridge(A, ridge), X, self.p)
        return self.parts(X, 0, found, ridge), ok & (s.amin(-1) + ridge > 0) & (found <= tolerance)


def in_parts(interval: int | None, factors: Sequence[Tensor]) -> list[bool]:
    """Whether a root ``X = Q diag(w) Q^T`` of each factor is held as ``w``, ``Q``, not multiplied out.

    A matrix of ``R`` rows takes ``R d^2`` multiplications more in parts, and ``d^3`` are saved at a refresh. With an interval
    of one, every product chooses, as ``R`` is known only then: a gradient may come by its rows.

    interval: number of steps that one refresh serves; None: unknown, or many
    """
    sides = [F.shape[1] for F in factors]
    few = [interval is not None and (interval == 1 or interval * prod(sides) < d * d) for d in sides]
    return [
        short and F.ndim == 3 and not is_tiled(F) and F.device.type == "cpu" and F.shape[1] >= SMALLEST
        for short, F in zip(few, factors, strict=True)
    ]


def keep_roots(
    roots: Sequence[Root],
    failed: Tensor,
    previous: State | None,
    gain: float,
    diagnosis: Tensor | None = None,
    empty: Tensor | None = None,
    by_columns: bool = False,
) -> State:
    """A cache with one root for each factor. A failed member without a previous one gets ``P = gain I``.

    empty: as in `keep_previous`.  by_columns: whether eigenvectors are held as ``Q``, which may be the tensor of a statistic,
    and not as ``Q^T``, which is what LAPACK gives
    """
    new = State()
    for k, root in enumerate(roots):
        if isinstance(root, Tensor):
            new[f"root_{k}"] = root
        else:
            w, Q = root
            vectors, held = (f"basis_{k}", Q) if by_columns else (f"vectors_{k}", Q.mT)
            new[f"power_{k}"], new[vectors] = w, held
    if diagnosis is not None:
        new["diagnosis"] = diagnosis
    default = _without_root(new, gain ** (1 / len(roots))) if previous is None and not none_of(failed) else {}
    return keep_previous(new, failed, previous, default, empty)


def _without_root(new: State, share: float) -> State:
    """What members hold that failed at their first refresh."""
    found = {name: identity(x) for name, x in new.items() if name != "diagnosis"}
    scaled = {name: share * x for name, x in found.items() if name.startswith(("root_", "power_"))}
    return found | scaled | {name: unknown(x) for name, x in new.items() if name == "diagnosis"}


def converted_roots(saved: State, like: State) -> State:
    """The roots of a saved cache in the forms of another, as `in_parts` decided otherwise for it."""
    made = dict(saved)
    for k in range(len(like)):
        root, w, V, Q = f"root_{k}", f"power_{k}", f"vectors_{k}", f"basis_{k}"
        if w in like and root in saved:
            s, vectors = torch.linalg.eigh(symmetrise(made.pop(root).double()))
            made[w], made[V] = s.to(like[w].dtype), vectors.mT.to(like[V if V in like else Q].dtype)
        elif root in like and w in saved:
            made[root] = conjugate(made.pop(V).mT if V in saved else made.pop(Q), made.pop(w))
        for mine, wanted in ((V, Q), (Q, V)):
            if mine in made and wanted in like:
                made[wanted] = made.pop(mine).mT.contiguous()
    return made


def held_roots(cache: State) -> list[Tensor]:
    """The roots in a cache, one for each factor, where all are multiplied out.  # each (B, d, d) or (B, d)"""
    return [cache[f"root_{k}"] for k in range(sum(name.startswith("root_") for name in cache))]


def apply_roots_to_rows(cache: State, rows: FactoredGradient) -> FactoredGradient:
    """`apply_roots` of a matrix: the first root on the gradients of the outputs, the second, if there is one, on the inputs."""
    return FactoredGradient(_along(cache, rows.g, 0, 2), _along(cache, rows.a, 1, 2))


def apply_roots(cache: State, g: Tensor) -> Tensor:
    """``g x_1 X_1 x_2 X_2 ...`` with the roots in a cache; axes beyond have none.  # (B, d_1, ..., d_m)"""
    for k in range(g.ndim - 1):
        g = _along(cache, g, k, k + 1)
    return g


def _along(cache: State, g: Tensor, k: int, axis: int) -> Tensor:
    """The product with root ``k``, if there is one, along an axis.  # (B, d_1, ..., d_m)"""
    before, V, Q = [None] * (axis - 1), cache.get(f"vectors_{k}"), cache.get(f"basis_{k}")
    if Q is not None:
        V = Q.mT
    if V is None:
        return apply_factors([*before, cache.get(f"root_{k}")], g)
    w = cache[f"power_{k}"]
    if g[0].numel() >= V.shape[-1] ** 2:  # as many rows as columns: the matrix takes less
        return apply_factors([*before, conjugate(V.mT, w)], g)
    for F in (V, w, V.mT):
        g = apply_factors([*before, F], g)
    return g
