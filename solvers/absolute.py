"""Direct solvers for dense or diagonal indefinite matrices: with absolute eigenvalues, or with signed ones."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradmaker.linalg.eigen import decompose, symmetrise
from gradmaker.linalg.fallbacks import keep_previous
from gradmaker.linalg.state import State
from gradmaker.representations.capabilities import Elementwise, Factored
from gradmaker.representations.dense import Dense
from gradmaker.solvers.base import Ask, InverseSolver
from gradmaker.solvers.definition import Defined

__all__ = ["LU", "AbsoluteDivision", "AbsoluteEigh", "SignedDivision"]


@dataclass(frozen=True, kw_only=True)
class _DenseSolver(InverseSolver[Factored], Defined[Factored]):
    @property
    def asks(self) -> frozenset[Ask]:
        return frozenset[Ask](("steady",))

    def refuse(self, representation: Factored) -> str | None:
        if isinstance(representation, Dense):
            return None
        return f"{type(self).__name__} needs the matrix itself, and {type(representation).__name__} holds factors of it"


@dataclass(frozen=True, kw_only=True)
class AbsoluteEigh(_DenseSolver):
    """``P g = Q ((Q^T g) / (|s| + damping))`` with ``C = Q diag(s) Q^T``: the damping is added after the absolute value.

    ``entries`` keeps only the diagonal of ``|C|``, ``P g = g / (diag |C| + damping)``: at least ``|diag C|``, at most
    ``diag(C^2)^(1/2)``, entry by entry. A block whose refreshes have all failed gets ``g / damping``.

    Reference: Dauphin et al., NeurIPS 2014, arXiv:1406.2572, section 5 (saddle-free Newton, dense).
    """

    entries: bool = False

    def prepare(self, representation: Factored, state: State, previous: State | None) -> State:
        C = symmetrise(representation.to_dense(state))
        finite = torch.isfinite(C).flatten(1).all(1)
        eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
        s, Q, ok = decompose(torch.where(finite[:, None, None], C, eye))
        new, default = (
            {"scale": 1 / (s.abs() + self.damping), "basis": Q},
            {"scale": C.new_tensor(1 / self.damping), "basis": eye},
        )
        if self.entries:
            new, default = {"scale": 1 / (_entries(s, Q) + self.damping)}, {"scale": default["scale"]}
        return keep_previous(new, ~(ok & finite), previous, default)

    def equation(self, representation: Factored, state: State, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """By the dense `operator`, which is no larger than the state."""
        return x, (self.operator(representation, state) @ g.reshape(len(g), -1, 1)).reshape(g.shape)

    def operator(self, representation: Factored, state: State) -> Tensor:
        s, Q = torch.linalg.eigh(representation.to_dense(state))
        if self.entries:
            return torch.diag_embed(1 / (((Q * s.abs().unsqueeze(-2)) @ Q.mT).diagonal(dim1=-2, dim2=-1) + self.damping))
        P: Tensor = (Q / (s.abs() + self.damping).unsqueeze(-2)) @ Q.mT
        return P

    def solve(self, representation: Factored, cache: State, g: Tensor) -> Tensor:
        if self.entries:
            return g * cache["scale"].reshape(g.shape)
        Q = cache["basis"]
        rotated = Q.mT @ g.reshape(len(g), -1, 1)
        return (Q @ (cache["scale"].unsqueeze(-1) * rotated)).reshape(g.shape)


def _entries(s: Tensor, Q: Tensor) -> Tensor:
    """``diag(Q |s| Q^T)``, without forming the matrix.  # (B, P), (B, P, P) -> (B, P)"""
    return (Q.square() @ s.abs().unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class LU(_DenseSolver):
    """``P g = (C + damping I)^-1 g`` of any symmetric matrix. Where ``C`` is indefinite, the step may ascend.

    With a damping below ``-lambda_min`` of ``C`` some directions ascend, and steps converge to saddle points; the default is
    the initial one of Hessian-free optimization. A block whose refreshes have all failed gets ``g / damping``.

    Reference: Golub & Van Loan, Matrix Computations, section 3.4.
    """

    implicit: ClassVar[bool] = True

    damping: float = 1.0

    def prepare(self, representation: Factored, state: State, previous: State | None) -> State:
        C = representation.to_dense(state)
        eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
        finite = torch.isfinite(C).flatten(1).all(1)
        factors, pivots, info = torch.linalg.lu_factor_ex(torch.where(finite[:, None, None], C, eye) + self.damping * eye)
        order = torch.arange(1, C.shape[-1] + 1, dtype=pivots.dtype, device=C.device)
        new, default = {"factors": factors, "pivots": pivots}, {"factors": self.damping * eye, "pivots": order}
        return keep_previous(new, ~finite | (info != 0), previous, default)

    def operator(self, representation: Factored, state: State) -> Tensor:
        C = representation.to_dense(state)
        P: Tensor = torch.linalg.inv(C + self.damping * torch.eye(C.shape[-1], dtype=C.dtype, device=C.device))
        return P

    def equation(self, representation: Factored, state: State, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return representation.matvec(state, x) + self.damping * x, g

    def solve(self, representation: Factored, cache: State, g: Tensor) -> Tensor:
        x: Tensor = torch.linalg.lu_solve(cache["factors"], cache["pivots"], g.reshape(len(g), -1, 1))
        return x.reshape(g.shape)


@dataclass(frozen=True, kw_only=True)
class _DiagonalSolver(InverseSolver[Elementwise], Defined[Elementwise]):
    @property
    def asks(self) -> frozenset[Ask]:
        return frozenset[Ask](("steady",))

    @abstractmethod
    def _denominator(self, d: Tensor) -> Tensor:
        """The denominator of ``P g``.  # any shape"""

    def prepare(self, representation: Elementwise, state: State, previous: State | None) -> State:
        new = self._denominator(representation.diagonal(state))
        flat = new.reshape(len(new), -1)
        failed = ~torch.isfinite(flat.sum(1)) | (flat == 0).any(1)
        return keep_previous({"denominator": new}, failed, previous, {"denominator": new.new_tensor(self.damping)})

    def operator(self, representation: Elementwise, state: State) -> Tensor:
        d = representation.diagonal(state)
        return torch.diag_embed(1 / self._denominator(d.reshape(d.shape[0], -1)))

    def equation(self, representation: Elementwise, state: State, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self._denominator(representation.diagonal(state)), g

    def solve(self, representation: Elementwise, cache: State, g: Tensor) -> Tensor:
        return g / cache["denominator"]


@dataclass(frozen=True, kw_only=True)
class AbsoluteDivision(_DiagonalSolver):
    """``P g = g / (|d| + damping)`` with the diagonal ``d`` of a matrix that may be indefinite.

    A block whose refreshes have all failed gets ``g / damping``.

    Reference: Dauphin et al., NeurIPS 2014, arXiv:1406.2572, with the diagonal in place of the matrix; Becker & LeCun 1988.
    """

    def _denominator(self, d: Tensor) -> Tensor:
        return d.abs() + self.damping


@dataclass(frozen=True, kw_only=True)
class SignedDivision(_DiagonalSolver):
    """``P g = g / (d + damping)`` with the diagonal ``d`` of a matrix that may be indefinite: `LU` of that diagonal.

    Entries ascend where ``d < -damping`` and are very large where ``d`` is close to ``-damping``; the refresh fails where they
    are equal.
    A block whose refreshes have all failed gets ``g / damping``.

    Reference: Becker & LeCun 1988, "Improving the convergence of back-propagation learning with second order methods".
    """

    damping: float = 1.0

    def _denominator(self, d: Tensor) -> Tensor:
        return d + self.damping
