"""PSGD: preconditioners on Lie groups, fitted to pairs ``(v, h)`` by relative gradient steps.

``c(P) = E[h^T P h + v^T P^-1 v]`` with ``P = Q^T Q`` is least where ``P E[h h^T] P = E[v v^T]``: at ``|H|^-1`` for ``h = H v``
and unit ``v``, at ``E[g g^T]^(-1/2)`` for ``h = g`` and independent noise ``v``. With ``dQ = E Q``, ``E`` upper triangular,
the gradient is ``2 triu(a a^T - b b^T)``, ``a = Q h``, ``b = Q^-T v``; `geometries` has other coordinates.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Evidence, Kind, Pair, kinds
from gradmaker.linalg.mode_products import apply_factors, kronecker_product, mode_matrix
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_choice, check_interval
from gradmaker.representations.base import Fold, Frame, Grain, Representation
from gradmaker.representations.geometries import GEOMETRIES, STARTS, Geometry, divide
from gradmaker.representations.roles import FactoredAxes, WholeLayers

__all__ = ["KronQ", "Normaliser", "TriangularQ", "relative_gradient"]

Normaliser: TypeAlias = Literal["slow", "max"]
"""The divisor of a step: the largest recent size of the two terms (2025), or the largest entry of the gradient (2018)."""

MEMORY = 0.9
"""Decay of the running maximum of ``slow``."""


def relative_gradient(x: Tensor, z: Tensor) -> Tensor:
    """Half the gradient of the criterion on a triangular factor: ``triu(x x^T - z z^T)``.  # (B, d, c) -> (B, d, d)"""
    return torch.triu(x @ x.mT - z @ z.mT)


@dataclass(frozen=True)
class _Fitted(Representation):
    """``C = P^-1`` with ``P`` fitted by one step for each pair: ``rate`` sets its memory, and ``decay`` does not apply.

    A pair that is not finite, or whose ``h`` is zero throughout, does not change the members that it is for.
    """

    takes: ClassVar[frozenset[Kind]] = kinds(Pair, (Pair, "noise_and_gradient"))
    inapplicable: ClassVar[dict[str, str]] = {"decay": "P is fitted by one step for each pair, not averaged; set rate"}

    rate: float = 0.1
    normaliser: Normaliser = "slow"

    def __post_init__(self) -> None:
        check_interval("rate", self.rate, 0, 1, hint=", where Q keeps a positive diagonal")
        check_choice("normaliser", self.normaliser, get_args(Normaliser))

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        assert isinstance(evidence, Pair)
        old = {name: x.clone() for name, x in state.items()}
        v, h = (self.unfold(x) for x in (evidence.v, evidence.cv))
        self._start(state, v, h)
        self.fit(state, v, h, independent=evidence.kind == "noise_and_gradient")
        ok = torch.stack([torch.isfinite(x).reshape(len(x), -1).all(1) for x in state.values()]).all(0)
        ok &= h.flatten(1).any(1)
        for name, x in state.items():
            x.copy_(torch.where(ok.view(-1, *[1] * (x.ndim - 1)), x, old[name]))

    def _start(self, state: State, v: Tensor, h: Tensor) -> None:
        """``P = (v^T v / h^T h)^(1/2) I`` before the first pair."""
        factors = self.held(state)
        power = (0.5 if self.direct else 0.25) / len(factors)
        size = (v.flatten(1).square().sum(1) / h.flatten(1).square().sum(1)) ** power
        scale = torch.where((state["age"] == 0) & torch.isfinite(size) & (size > 0), size, 1.0)
        for Q in factors:
            Q.mul_(scale.view(-1, *[1] * (Q.ndim - 1)))
        state["age"].add_(1)

    def gain(self, bound: Tensor, size: Tensor) -> Tensor:
        """The step on a factor.  bound: its running maximum, updated; size: of this pair's terms.  # (B,), (B,) -> (B,)"""
        if self.normaliser == "slow":
            bound.copy_(torch.maximum(MEMORY * bound + (1 - MEMORY) * size, size))
            size = bound
        return self.rate / (size + torch.finfo(size.dtype).tiny)

    @property
    def direct(self) -> bool:
        """Whether the factors are those of ``P`` itself, not of ``Q``."""
        return False

    @abstractmethod
    def fit(self, state: State, v: Tensor, h: Tensor, independent: bool = False) -> None:
        """Take one step on every factor, in place.  independent: whether ``v`` is independent of ``h``"""

    @abstractmethod
    def held(self, state: State) -> list[Tensor]:
        """The factors ``Q_k`` of the state, not copies.  # each (B, d, d), or (B, d) when diagonal"""

    @abstractmethod
    def unfold(self, g: Tensor) -> Tensor:
        """The gradient of a block with one axis for each factor.  # (B, d_1, ..., d_m)"""

    def apply(self, state: State, g: Tensor) -> Tensor:
        """``Q^T Q g``; with factors of ``P`` itself ``P g``.  # (B, *shape)"""
        factors = self.held(state)
        x = apply_factors(factors, self.unfold(g))
        if not self.direct:
            x = apply_factors([Q if Q.ndim == 2 else Q.mT for Q in factors], x)
        return x.reshape(g.shape)

    def to_dense(self, state: State) -> Tensor:
        inverses = [1 / Q if Q.ndim == 2 else torch.linalg.inv(Q) for Q in self.held(state)]
        if self.direct:
            return kronecker_product(inverses)
        return kronecker_product([R.square() if R.ndim == 2 else R @ R.mT for R in inverses])


@dataclass(frozen=True)
class TriangularQ(_Fitted, WholeLayers):
    """PSGD's dense preconditioner ``P = Q^T Q``, all parameters as one vector, ``Q`` upper triangular.

    ``Q <- Q - (rate / size) triu(a a^T - b b^T) Q``, in ``O(P^2)``: the rows of the product are running sums.

    Reference: Li, IEEE TNNLS 2018, arXiv:1512.04202, section 4; the slow maximum as in the author's psgd_torch (2025).
    """

    granularity: Literal["full", "layer"] = "full"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("granularity", self.granularity, ("full", "layer"))

    @property
    def grain(self) -> Grain:
        return self.granularity

    def init(self, frame: Frame) -> State:
        P = frame.zeros(*frame.shape).flatten(1).shape[1]
        age = torch.zeros(frame.stack, dtype=torch.int64, device=frame.device)
        return {"factor": frame.unit(P), "bound": frame.zeros(), "age": age}

    def fit(self, state: State, v: Tensor, h: Tensor, independent: bool = False) -> None:
        Q = state["factor"]
        a = Q @ h.unsqueeze(-1)
        b = torch.linalg.solve_triangular(Q.mT, v.unsqueeze(-1), upper=False)
        if self.normaliser == "max":
            size = relative_gradient(a, b).abs().amax((-2, -1))
        else:
            size = (a.square() + b.square()).sum((-2, -1))
        step = self.gain(state["bound"], size)[:, None, None]
        Q.sub_(step * (a * _sums_from_below(a * Q) - b * _sums_from_below(b * Q)))

    def matvec(self, state: State, v: Tensor) -> Tensor:
        x = self.unfold(v)
        for transposed in (True, False):
            x = divide(state["factor"], x, 0, transposed)
        return x.reshape(v.shape)

    def held(self, state: State) -> list[Tensor]:
        return [state["factor"]]

    def unfold(self, g: Tensor) -> Tensor:
        return g.reshape(g.shape[0], -1)


@dataclass(frozen=True)
class KronQ(_Fitted, FactoredAxes):
    """PSGD's Kronecker preconditioner ``P = (x)_k Q_k^T Q_k``: one factor for each axis, a diagonal for a long axis.

    ``geometry`` says how a step changes a factor: a name in `gradmaker.representations.geometries.GEOMETRIES`. ``EQ``:
    ``Q_k <- Q_k - (rate / size_k) triu(A_k A_k^T - Z_k Z_k^T) Q_k`` with the axis ``k`` of ``A = h x_1 Q_1 x_2 Q_2 ...`` and of
    ``Z = v x_1 Q_1^-T x_2 Q_2^-T ...`` as rows. Then the factors are balanced to one largest entry. An axis of length ``d`` of
    a block with ``n`` elements has a diagonal if ``d > max_dim`` or ``d^2 > max_skew n``.

    Reference: Li, 2018, arXiv:1802.06132 (the Kronecker group), section 3; Li, 2024, arXiv:2402.11858 (geometries); psgd_torch
    (2025) for ``max_skew`` and balancing.
    """

    granularity: Literal["layer", "tensor"] = "layer"
    max_skew: float | None = None
    geometry: str = "EQ"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("granularity", self.granularity, ("layer", "tensor"))
        if self.max_skew is not None:
            check_interval("max_skew", self.max_skew, 0, inf, closed=True, hint=", or None for no such limit")
        check_choice("geometry", self.geometry, GEOMETRIES)
        if self.normaliser == "max" and not self._geometry.triangular:
            raise ValueError(
                f"normaliser='max' with geometry={self.geometry!r}: expected normaliser='slow', or geometry='EQ': the largest "
                "entry bounds the diagonal alone, which is enough for a triangular factor"
            )

    @property
    def grain(self) -> Grain:
        return self.granularity

    @property
    def _geometry(self) -> Geometry:
        return GEOMETRIES[self.geometry]

    @property
    def direct(self) -> bool:
        """Whether the geometry has factors of ``P``."""
        return self._geometry.direct

    def long_axes(self, shape: tuple[int, ...], max_dim: int) -> frozenset[int]:
        if self.max_skew is None:
            return super().long_axes(shape, max_dim)
        size = torch.Size(shape).numel()
        return frozenset(axis for axis, d in enumerate(shape) if d > max_dim or d * d > self.max_skew * size)

    def init(self, frame: Frame) -> State:
        state = {"age": torch.zeros(frame.stack, dtype=torch.int64, device=frame.device)}
        for axis, d in enumerate(frame.shape or (1,)):
            state[f"factor_{axis}"] = frame.zeros(d) + 1 if axis in frame.diagonal else frame.unit(d)
            state[f"bound_{axis}"] = frame.zeros()
        return state

    def fit(self, state: State, v: Tensor, h: Tensor, independent: bool = False) -> None:
        factors, geometry = self.held(state), self._geometry
        X, Z = geometry.images(factors, v, h)
        for axis, Q in enumerate(factors):
            x, z, noise = (mode_matrix(T, axis) for T in (X, Z, v))
            noise = noise[..., :STARTS].mT
            E, size = geometry.gap(Q, x, None if independent and not geometry.triangular else z, noise)
            if self.normaliser == "max":
                size = E.abs().flatten(1).amax(1)
            Q.copy_(geometry.move(Q, E, self.gain(state[f"bound_{axis}"], size), noise))
        _balance(factors)

    def matvec(self, state: State, v: Tensor) -> Tensor:
        x = self.unfold(v)
        for transposed in (False,) if self.direct else (True, False):
            for axis, Q in enumerate(self.held(state)):
                x = divide(Q, x, axis, transposed, self._geometry.triangular)
        return x.reshape(v.shape)

    def held(self, state: State) -> list[Tensor]:
        return [state[f"factor_{axis}"] for axis in range(sum(name.startswith("factor_") for name in state))]

    def unfold(self, g: Tensor) -> Tensor:
        return g if g.ndim > 1 else g.unsqueeze(1)


def _balance(factors: Sequence[Tensor]) -> None:
    """Scale the factors to equal largest entries, which keeps their product."""
    largest = torch.stack([Q.abs().flatten(1).amax(1) for Q in factors])
    shares = largest.log().mean(0).exp() / largest
    for Q, share in zip(factors, shares, strict=True):
        Q.mul_(share.view(-1, *[1] * (Q.ndim - 1)))


def _sums_from_below(X: Tensor) -> Tensor:
    """``Y_ij = sum_(k >= i) X_kj``.  # (B, d, d)"""
    sums: Tensor = X.flip(-2).cumsum(-2).flip(-2)
    return sums
