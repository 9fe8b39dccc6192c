"""Krylov subspaces: the curvature restricted to the span of ``g, C g, C^2 g, ...`` and inverted there."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradmaker.representations.base import State
from gradmaker.representations.implicit import MatrixFree
from gradmaker.solvers.base import Solver
from gradmaker.solvers.carried import carry, keep_finite
from gradmaker.solvers.damping import check_interval

__all__ = ["Krylov"]


@dataclass(frozen=True, kw_only=True)
class Krylov(Solver):
    """``P g = V^T (|V C V^T| + lambda I)^-1 V g`` with orthonormal rows ``V`` (K, P).

    ``v_1`` is ``D^-1 g``, ``v_(k+1)`` is ``D^-1 C v_k`` made orthogonal to all before it, twice, and the last is the previous
    step. It is shorter where nothing new comes. ``|.|`` takes absolute eigenvalues: those of a positive semidefinite matrix
    are the same. ``D = max(g^2, 1e-4 max g^2)`` with ``precondition``, else one.

    Of a positive semidefinite ``C`` it is Krylov subspace descent, its search in the subspace replaced by the minimum of
    the quadratic model; of the Hessian it is saddle-free Newton by Lanczos vectors.

    Reference: Vinyals & Povey, AISTATS 2012, arXiv:1111.4259; Dauphin et al., NeurIPS 2014, arXiv:1406.2572, section 6.
    """

    needs: ClassVar[type] = MatrixFree
    definite: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    damping: float = 1e-3
    dimension: int = 20
    remember: bool = True
    """Whether the last step is the last vector."""
    precondition: bool = False

    def __post_init__(self) -> None:
        check_interval("damping", self.damping, 0, inf)
        check_interval("dimension", self.dimension, 1, inf, closed=True)

    @property
    def exponent(self) -> float:
        return -1.0

    def prepare(self, representation: Any, state: State, previous: State | None) -> State:
        return carry(representation, state, previous, {"solution": representation.origin(state)})

    def operator(self, representation: Any, state: State) -> Tensor:
        """The limit of many dimensions."""
        s, Q = torch.linalg.eigh(representation.to_dense(state))
        P: Tensor = (Q / (s.abs() + self.damping).unsqueeze(-2)) @ Q.mT
        return P

    def solve(self, representation: Any, cache: State, g: Tensor) -> Tensor:
        D = _floored(g.square()) if self.precondition else torch.ones_like(g)
        V, CV = self._basis(representation, cache, g / D, D)
        x = torch.zeros_like(g)
        if len(V):
            T = (V @ CV.mT).double()
            x = _invert(T, (V @ g[0]).double(), self.damping).to(g.dtype) @ V
            x = x.unsqueeze(0)
        x = keep_finite(cache, x, g / self.damping)
        cache["solution"] = x
        return x

    def _basis(self, representation: Any, cache: State, start: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
        """``V`` and ``C V``.  # (K, P), (K, P)"""
        V, CV = start.new_zeros(0, start.shape[1]), start.new_zeros(0, start.shape[1])
        remembers = self.remember and self.dimension > 1 and bool(cache["solution"].any())
        following = start
        while len(V) < self.dimension - remembers:
            v = _orthonormal(following, V)
            if v is None:
                break
            image = representation.matvec(cache, v)
            V, CV = torch.cat([V, v]), torch.cat([CV, image])
            following = image / D
        last = _orthonormal(cache["solution"], V) if remembers else None
        if last is not None:
            V, CV = torch.cat([V, last]), torch.cat([CV, representation.matvec(cache, last)])
        return V, CV


def _orthonormal(u: Tensor, V: Tensor) -> Tensor | None:
    """The part of ``u`` that is new, of length one; None if it is rounding. Twice is enough (Kahan).  # (1, P)"""
    size = u.norm()
    if not (size > 0 and torch.isfinite(size)):
        return None
    u = u / size
    for _ in range(2):
        u = u - (u @ V.mT) @ V
    left = u.norm()
    return u / left if left > max(1e-10, 1e3 * torch.finfo(u.dtype).eps) else None


def _invert(T: Tensor, b: Tensor, damping: float) -> Tensor:
    """``(|T| + damping)^-1 b``, NaN where ``T`` is not finite.  # (K, K), (K,) -> (K,)"""
    if not torch.isfinite(T).all():
        return torch.full_like(b, torch.nan)
    s, Q = torch.linalg.eigh((T + T.mT) / 2)
    x: Tensor = Q @ ((Q.mT @ b) / (s.abs() + damping))
    return x


def _floored(squares: Tensor) -> Tensor:
    """Vinyals & Povey, section 3.1: the smallest entries are noise."""
    largest = squares.amax()
    return torch.where(largest > 0, squares.clamp(min=1e-4 * float(largest)), 1.0)
