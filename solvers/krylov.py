"""Solver in a Krylov subspace: the curvature is restricted to the span of ``g, C g, C^2 g, ...`` and inverted there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradmaker.linalg.state import State
from gradmaker.options.checks import check_choice, check_interval
from gradmaker.representations.implicit import MatrixFree
from gradmaker.solvers.base import Ask
from gradmaker.solvers.carried import carry, keep_finite
from gradmaker.solvers.definition import Defined
from gradmaker.solvers.quasi_newton import minimise_bfgs

__all__ = ["Krylov"]


@dataclass(frozen=True, kw_only=True)
class Krylov(Defined[MatrixFree]):
    """``P g = -V^T a`` with orthonormal rows ``V`` (K, P); ``a`` minimises the quadratic model, or the loss.

    ``v_1`` is ``D^-1 g``, ``v_(k+1)`` is ``D^-1 C v_k`` made orthogonal to all before it, twice; the last vector is the
    previous step. The basis ends early where ``v_(k+1)`` vanishes. ``D = max(S, 1e-4 max S)`` with ``precondition``, else 1;
    ``S`` is the mean of squared per-example gradients where the curvature measures it (``squares``), else the squared gradient.

    - ``search="model"``: ``a = -(T + lambda)^-1 V g`` with ``T = |V C V^T|``, by absolute eigenvalues, which for a positive
      semidefinite matrix changes nothing. Eigenvalues below ``floor max T`` are raised to it.
    - ``search="bfgs"``: ``a`` minimises ``L(theta + V^T a) + lambda |a|^2 / 2`` from zero, by `minimise_bfgs` from that
      inverse with at most ``2 K`` iterations; ``L`` is the loss on the search batch, where one is declared.

    With a positive semidefinite ``C`` this is Krylov subspace descent; with the Hessian and ``search="model"`` it is
    saddle-free Newton in a Lanczos basis.

    Reference: Vinyals & Povey, AISTATS 2012, arXiv:1111.4259, sections 3-4; Dauphin et al., NeurIPS 2014, arXiv:1406.2572,
    section 6.
    """

    linear: ClassVar[bool] = False

    damping: float = 1e-3
    dimension: int = 20
    remember: bool = True
    """Whether the previous step is the last basis vector."""
    precondition: bool = False
    floor: float = 0.0
    search: Literal["model", "bfgs"] = "model"

    def __post_init__(self) -> None:
        check_interval("floor", self.floor, 0, 1, closed=True)
        check_interval("damping", self.damping, 0, inf, closed=self.floor > 0)
        check_interval("dimension", self.dimension, 1, inf, closed=True)
        check_choice("search", self.search, ["model", "bfgs"])

    @property
    def asks(self) -> frozenset[Ask]:
        taken: dict[Ask, bool] = {"steady": True, "squares": self.precondition, "search": self.search == "bfgs"}
        return frozenset(ask for ask, wanted in taken.items() if wanted)

    def prepare(self, representation: MatrixFree, state: State, previous: State | None) -> State:
        return carry(representation, state, previous, {"solution": representation.origin(state)})

    def operator(self, representation: MatrixFree, state: State) -> Tensor:
        """``P`` of a subspace that spans everything."""
        C = representation.to_dense(state)
        return torch.stack([self._inverse(member) for member in C])

    def equation(self, representation: MatrixFree, state: State, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return representation.matvec(state, x) + self.damping * x, g

    def limit(self) -> Krylov:
        """The limit for a positive semidefinite matrix."""
        floor, dimension = 0.0 if self.damping else self.floor, max(self.dimension, 20)
        return replace(self, search="model", precondition=False, remember=False, floor=floor, dimension=dimension)

    def solve(self, representation: MatrixFree, cache: State, g: Tensor) -> Tensor:
        D = self._diagonal(representation, cache, g)
        V, CV = self._basis(representation, cache, g / D, D)
        x = torch.zeros_like(g)
        if len(V):
            H = self._inverse((V @ CV.mT).double())
            a = -(H @ (V @ g[0]).double())
            if self.search == "bfgs" and torch.isfinite(H).all():
                a = minimise_bfgs(partial(self._objective, representation, cache, V), H, 2 * len(V))
            x = -(a.to(g.dtype) @ V).unsqueeze(0)
        x = keep_finite(cache, x, g / (self.damping or 1.0))
        cache["solution"] = x
        return x

    def _objective(self, representation: MatrixFree, cache: State, V: Tensor, a: Tensor) -> tuple[float, Tensor]:
        """``L(theta + V^T a) + lambda |a|^2 / 2`` and its gradient in ``a``. RuntimeError without a loss.  # (K,) -> , (K,)"""
        found = representation.loss_and_gradient_at(cache, (a.to(V.dtype) @ V).unsqueeze(0))
        if found is None:
            raise RuntimeError(
                "Krylov(search='bfgs') needs the loss at displaced weights, which this curvature lacks: use search='model'"
            )
        loss, gradient = found
        return float(loss) + self.damping * float(a @ a) / 2, (V @ gradient[0]).double() + self.damping * a

    def _inverse(self, T: Tensor) -> Tensor:
        """``(|T| + damping)^-1`` with eigenvalues of at least the floor; NaN where ``T`` is not finite.  # (K, K)"""
        if not torch.isfinite(T).all():
            return torch.full_like(T, torch.nan)
        s, Q = torch.linalg.eigh((T + T.mT) / 2)
        s = s.abs()
        P: Tensor = (Q / (s.clamp(min=self.floor * float(s.max())) + self.damping)) @ Q.mT
        return P

    def _diagonal(self, representation: MatrixFree, cache: State, g: Tensor) -> Tensor:
        if not self.precondition:
            return torch.ones_like(g)
        squares = representation.squares(cache)
        return _floored(g.square() if squares is None else squares.to(g.dtype))

    def _basis(self, representation: MatrixFree, cache: State, start: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
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
    """The part of ``u`` orthogonal to ``V``, normalised; None where it is rounding. Twice is enough (Kahan).  # (1, P)"""
    size = u.norm()
    if not (size > 0 and torch.isfinite(size)):
        return None
    u = u / size
    for _ in range(2):
        u = u - (u @ V.mT) @ V
    left = u.norm()
    return u / left if left > max(1e-10, 1e3 * torch.finfo(u.dtype).eps) else None


def _floored(squares: Tensor) -> Tensor:
    """Squares of at least 1e-4 of the largest, as in Vinyals & Povey, section 3.1."""
    largest = squares.amax()
    return torch.where(largest > 0, squares.clamp(min=1e-4 * float(largest)), 1.0)
