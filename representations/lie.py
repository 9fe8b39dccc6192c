"""PSGD: preconditioners on Lie groups of triangular matrices, fitted to pairs ``(v, h)`` by relative gradient steps.

``c(P) = E[h^T P h + v^T P^-1 v]`` with ``P = Q^T Q`` is least where ``P E[h h^T] P = E[v v^T]``: at ``|H|^-1`` for ``h = H v``
and unit ``v``. With ``dQ = E Q``, ``E`` upper triangular, the gradient is
``2 triu(a a^T - b b^T)``, ``a = Q h``, ``b = Q^-T v``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Contrast, Evidence, Pair
from gradmaker.representations.base import Fold, Frame, Grain, Representation, State
from gradmaker.representations.kronecker import apply_factors, expand, mode_matrix

__all__ = ["KronQ", "Normaliser", "TriangularQ", "relative_gradient"]

Normaliser: TypeAlias = Literal["slow", "max"]
"""What a step is divided by: the largest recent size of the two terms (2025), or the largest entry of the gradient (2018)."""

MEMORY = 0.9
"""Of the slow maximum."""


def relative_gradient(x: Tensor, z: Tensor) -> Tensor:
    """Half the gradient of the criterion on a triangular factor: ``triu(x x^T - z z^T)``.  # (B, d, c) -> (B, d, d)"""
    return torch.triu(x @ x.mT - z @ z.mT)


@dataclass(frozen=True)
class _Fitted(Representation):
    """``C = P^-1`` with a ``P`` that takes a step a pair: it has a memory of its own, and ``decay`` does not apply."""

    takes: ClassVar[tuple[type[Evidence], ...]] = (Pair, Contrast)

    rate: float = 0.1
    normaliser: Normaliser = "slow"

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ValueError(f"rate = {self.rate!r}: legal are numbers in (0, 1), where Q keeps a positive diagonal")
        if self.normaliser not in get_args(Normaliser):
            raise ValueError(f"normaliser = {self.normaliser!r}: legal are 'slow', 'max'")

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        assert isinstance(evidence, Pair)
        old = {name: x.clone() for name, x in state.items()}
        v, h = (self.unfold(x) for x in (evidence.v, evidence.cv))
        self._start(state, v, h)
        self.fit(state, v, h)
        # a pair that overflowed says nothing
        ok = torch.stack([torch.isfinite(x).reshape(len(x), -1).all(1) for x in state.values()]).all(0)
        for name, x in state.items():
            x.copy_(torch.where(ok.view(-1, *[1] * (x.ndim - 1)), x, old[name]))

    def _start(self, state: State, v: Tensor, h: Tensor) -> None:
        """``Q = (v^T v / h^T h)^(1/4) I`` before the first pair."""
        factors = self.held(state)
        size = (v.flatten(1).square().sum(1) / h.flatten(1).square().sum(1)) ** (0.25 / len(factors))
        scale = torch.where((state["age"] == 0) & torch.isfinite(size) & (size > 0), size, 1.0)
        for Q in factors:
            Q.mul_(scale.view(-1, *[1] * (Q.ndim - 1)))
        state["age"].add_(1)

    def gain(self, bound: Tensor, size: Tensor) -> Tensor:
        """The step on a factor.  bound: its slow maximum, advanced; size: of this pair's terms.  # (B,), (B,) -> (B,)"""
        if self.normaliser == "slow":
            bound.copy_(torch.maximum(MEMORY * bound + (1 - MEMORY) * size, size))
            size = bound
        return self.rate / (size + torch.finfo(size.dtype).tiny)

    @abstractmethod
    def fit(self, state: State, v: Tensor, h: Tensor) -> None:
        """One step on every factor, in place."""

    @abstractmethod
    def held(self, state: State) -> list[Tensor]:
        """The factors ``Q_k`` themselves, not copies.  # each (B, d, d), or (B, d) when diagonal"""

    @abstractmethod
    def unfold(self, g: Tensor) -> Tensor:
        """A block's gradient with one axis per factor.  # (B, d_1, ..., d_m)"""

    def apply(self, state: State, g: Tensor) -> Tensor:
        """``Q^T Q g``.  # (B, *shape)"""
        factors = self.held(state)
        x = apply_factors(factors, self.unfold(g))
        return apply_factors([Q if Q.ndim == 2 else Q.mT for Q in factors], x).reshape(g.shape)

    def to_dense(self, state: State) -> Tensor:
        inverses = [1 / Q if Q.ndim == 2 else torch.linalg.inv(Q) for Q in self.held(state)]
        return expand([R.square() if R.ndim == 2 else R @ R.mT for R in inverses])

    def matvec(self, state: State, v: Tensor) -> Tensor:
        x = self.unfold(v)
        for transposed in (True, False):
            for axis, Q in enumerate(self.held(state)):
                x = _divide(Q, x, axis, transposed)
        return x.reshape(v.shape)


@dataclass(frozen=True)
class TriangularQ(_Fitted):
    """``P = Q^T Q`` of all parameters as one vector, ``Q`` upper triangular.

    ``Q <- Q - (rate / size) triu(a a^T - b b^T) Q``, in ``O(P^2)``: the rows of the product are running sums.

    Reference: Li, IEEE TNNLS 2018, arXiv:1512.04202, section 4; the slow maximum as in the author's psgd_torch (2025).
    """

    granularity: Literal["full", "layer"] = "full"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity not in ("full", "layer"):
            raise ValueError(f"granularity = {self.granularity!r}: legal are 'full', 'layer'")

    @property
    def grain(self) -> Grain:
        return self.granularity

    def init(self, frame: Frame) -> State:
        P = frame.zeros(*frame.shape).flatten(1).shape[1]
        Q = frame.zeros(P, P) + torch.eye(P, dtype=frame.dtype, device=frame.device)
        return {"factor": Q, "bound": frame.zeros(), "age": torch.zeros(frame.stack, dtype=torch.int64, device=frame.device)}

    def fit(self, state: State, v: Tensor, h: Tensor) -> None:
        Q = state["factor"]
        a = Q @ h.unsqueeze(-1)
        b = torch.linalg.solve_triangular(Q.mT, v.unsqueeze(-1), upper=False)
        if self.normaliser == "max":
            size = relative_gradient(a, b).abs().amax((-2, -1))
        else:
            size = (a.square() + b.square()).sum((-2, -1))
        step = self.gain(state["bound"], size)[:, None, None]
        Q.sub_(step * (a * _sums_from_below(a * Q) - b * _sums_from_below(b * Q)))

    def held(self, state: State) -> list[Tensor]:
        return [state["factor"]]

    def unfold(self, g: Tensor) -> Tensor:
        return g.reshape(g.shape[0], -1)


@dataclass(frozen=True)
class KronQ(_Fitted):
    """``P = (x)_k Q_k^T Q_k``, one triangular factor for each axis, a diagonal where an axis is long.

    ``Q_k <- Q_k - (rate / size_k) triu(A_k A_k^T - Z_k Z_k^T) Q_k`` with the axis ``k`` of ``A = h x_1 Q_1 x_2 Q_2 ...`` and of
    ``Z = v x_1 Q_1^-T x_2 Q_2^-T ...`` as rows; then all factors get one largest entry. An axis of length ``d`` of a block with
    ``n`` elements has a diagonal if ``d > max_dim`` or ``d^2 > max_skew n``.

    Reference: Li, 2018, arXiv:1802.06132 (the Kronecker group), section 3; psgd_torch (2025) for ``max_skew`` and balancing.
    """

    factored_axes: ClassVar[bool] = True

    granularity: Literal["layer", "tensor"] = "layer"
    max_skew: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity not in ("layer", "tensor"):
            raise ValueError(f"granularity = {self.granularity!r}: legal are 'layer', 'tensor'")
        if self.max_skew is not None and not self.max_skew >= 0:
            raise ValueError(f"max_skew = {self.max_skew!r}: legal are non-negative numbers, or None for no such limit")

    @property
    def grain(self) -> Grain:
        return self.granularity

    def wide(self, shape: tuple[int, ...], max_dim: int) -> frozenset[int]:
        if self.max_skew is None:
            return super().wide(shape, max_dim)
        size = torch.Size(shape).numel()
        return frozenset(axis for axis, d in enumerate(shape) if d > max_dim or d * d > self.max_skew * size)

    def init(self, frame: Frame) -> State:
        state = {"age": torch.zeros(frame.stack, dtype=torch.int64, device=frame.device)}
        for axis, d in enumerate(frame.shape or (1,)):
            eye = torch.eye(d, dtype=frame.dtype, device=frame.device)
            diagonal = axis in frame.diagonal
            state[f"factor_{axis}"] = frame.zeros(d) + 1 if diagonal else frame.zeros(d, d) + eye
            state[f"bound_{axis}"] = frame.zeros()
        return state

    def fit(self, state: State, v: Tensor, h: Tensor) -> None:
        factors = self.held(state)
        A, Z = apply_factors(factors, h), v
        for axis, Q in enumerate(factors):
            Z = _divide(Q, Z, axis, transposed=True)
        for axis, Q in enumerate(factors):
            x, z = mode_matrix(A, axis), mode_matrix(Z, axis)
            bound = state[f"bound_{axis}"]
            if Q.ndim == 2:
                up, down = x.square().sum(-1), z.square().sum(-1)
                size = (up - down).abs().amax(-1) if self.normaliser == "max" else (up + down).amax(-1)
                Q.sub_(self.gain(bound, size)[:, None] * (up - down) * Q)
            else:
                E = relative_gradient(x, z)
                Q.sub_(self.gain(bound, self._size(E, x, z))[:, None, None] * (E @ Q))
        _balance(factors)

    def _size(self, E: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """The largest entry, or a bound on the largest eigenvalue of ``x x^T + z z^T``.  # (B,)"""
        if self.normaliser == "max":
            return E.abs().amax((-2, -1))
        M = x @ x.mT + z @ z.mT
        return torch.minimum(torch.linalg.matrix_norm(M), M.abs().sum(-1).amax(-1))

    def held(self, state: State) -> list[Tensor]:
        return [state[f"factor_{axis}"] for axis in range(sum(name.startswith("factor_") for name in state))]

    def unfold(self, g: Tensor) -> Tensor:
        return g if g.ndim > 1 else g.unsqueeze(1)


def _balance(factors: Sequence[Tensor]) -> None:
    """Scale the factors to one largest entry, which leaves their product."""
    largest = torch.stack([Q.abs().flatten(1).amax(1) for Q in factors])
    shares = largest.log().mean(0).exp() / largest
    for Q, share in zip(factors, shares, strict=True):
        Q.mul_(share.view(-1, *[1] * (Q.ndim - 1)))


def _sums_from_below(X: Tensor) -> Tensor:
    """``Y_ij = sum_(k >= i) X_kj``.  # (B, d, d)"""
    sums: Tensor = X.flip(-2).cumsum(-2).flip(-2)
    return sums


def _divide(Q: Tensor, x: Tensor, axis: int, transposed: bool) -> Tensor:
    """``Q^-1``, or ``Q^-T``, along an axis.  # x: (B, d_1, ..., d_m)"""
    if Q.ndim == 2:
        return x / Q.view(len(Q), *[1] * axis, -1, *[1] * (x.ndim - axis - 2))
    rows = x.movedim(axis + 1, 1)
    flat = rows.reshape(len(x), rows.shape[1], -1)
    solved: Tensor = torch.linalg.solve_triangular(Q.mT if transposed else Q, flat, upper=not transposed)
    return solved.reshape(rows.shape).movedim(1, axis + 1)
