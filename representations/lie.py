"""PSGD: preconditioners on Lie groups, fitted to pairs ``(v, h)`` by relative gradient steps.

``c(P) = E[h^T P h + v^T P^-1 v]`` with ``P = Q^T Q`` is least where ``P E[h h^T] P = E[v v^T]``: at ``|H|^-1`` for ``h = H v``
and unit ``v``, at ``E[g g^T]^(-1/2)`` for ``h = g`` and independent noise ``v``. With ``dQ = E Q``, ``E`` upper triangular,
the gradient is ``2 triu(a a^T - b b^T)``, ``a = Q h``, ``b = Q^-T v``; `geometries` has other coordinates.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Evidence, Pair
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.linalg.factored_gradient import FactoredGradient, ProbedRows
from gradmaker.linalg.finite import finite_members
from gradmaker.linalg.halves import apply_triangles
from gradmaker.linalg.mode_products import apply_factors, kronecker_product, mode_matrix
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_choice, check_interval
from gradmaker.representations.base import Fold, Frame, Grain, Representation
from gradmaker.representations.geometries import GEOMETRIES, STARTS, Geometry, divide
from gradmaker.representations.roles import FactoredAxes, FoldsRows, PreconditionsRows, WholeLayers

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
        v, h = (self.unfold(x) for x in (evidence.v, evidence.cv))
        start = self._started(state, v, lambda: h.flatten(1).square().sum(1))
        new = self.fitted(start, v, h, independent=evidence.kind == "noise_and_gradient")
        self._accept(state, new, h.flatten(1).abs().amax(1) > 0)

    def _accept(self, state: State, new: State, ok: Tensor) -> None:
        """Write what was fitted, for the members whose factors are finite.  ok: other condition  # (B,)"""
        new = new | {"age": state["age"] + 1}
        ok = ok & finite_members(*(x for x in new.values() if x.is_floating_point()))
        every = ok.device.type == "cpu" and bool(ok.all())
        for name, x in new.items():
            state[name].copy_(x if every else torch.where(ok.view(-1, *[1] * (x.ndim - 1)), x, state[name]))

    def _started(self, state: State, v: Tensor, size_of_h: Callable[[], Tensor]) -> State:
        """The statistic with ``P = (v^T v / h^T h)^(1/2) I`` before the first pair; not a copy after it.  # (B,)"""
        new = state["age"] == 0
        if new.device.type == "cpu" and not bool(new.any()):
            return state
        factors = [name for name in state if name.startswith("factor")]
        size = (v.flatten(1).square().sum(1) / size_of_h()) ** ((0.5 if self.direct else 0.25) / len(factors))
        scale = torch.where(new & torch.isfinite(size) & (size > 0), size, 1.0)
        return state | {k: state[k] * scale.view(-1, *[1] * (state[k].ndim - 1)) for k in factors}

    def gain(self, bound: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """The step on a factor, and the running maximum.  bound: that of before; size: of this pair's terms  # each (B,)"""
        if self.normaliser == "slow":
            size = bound = torch.maximum(MEMORY * bound + (1 - MEMORY) * size, size)
        return self.rate / (size + torch.finfo(size.dtype).tiny), bound

    @property
    def direct(self) -> bool:
        """Whether the factors are those of ``P`` itself, not of ``Q``."""
        return False

    @property
    def triangular(self) -> bool:
        """Whether the factors are upper triangular."""
        return True

    @abstractmethod
    def fitted(self, state: State, v: Tensor, h: Tensor, independent: bool = False) -> State:
        """Factors and bounds after a step on every factor, as new tensors.  independent: whether ``v`` is so of ``h``"""

    @abstractmethod
    def held(self, state: State) -> list[Tensor]:
        """The factors ``Q_k`` of the state, not copies.  # each (B, d, d), or (B, d) when diagonal"""

    @abstractmethod
    def unfold(self, g: Tensor) -> Tensor:
        """The gradient of a block with one axis for each factor.  # (B, d_1, ..., d_m)"""

    def apply(self, state: State, g: Tensor) -> Tensor:
        """``Q^T Q g``; with factors of ``P`` itself ``P g``.  # (B, *shape)"""
        return self._multiplied(self.held(state), self.unfold(g)).reshape(g.shape)

    def _multiplied(self, factors: Sequence[Tensor | None], x: Tensor) -> Tensor:
        """`apply` along the axes, where None stands for the identity."""
        if self.triangular:
            return apply_triangles(factors, apply_triangles(factors, x), transposed=True)
        x = apply_factors(factors, x)
        return x if self.direct else apply_factors([Q if Q is None or Q.ndim == 2 else Q.mT for Q in factors], x)

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

    def fitted(self, state: State, v: Tensor, h: Tensor, independent: bool = False) -> State:
        Q = state["factor"]
        a = Q @ h.unsqueeze(-1)
        b = torch.linalg.solve_triangular(Q.mT, v.unsqueeze(-1), upper=False)
        if self.normaliser == "max":
            size = relative_gradient(a, b).abs().amax((-2, -1))
        else:
            size = (a.square() + b.square()).sum((-2, -1))
        step, bound = self.gain(state["bound"], size)
        moved = torch.addcmul(Q, step[:, None, None] * a, _sums_from_below(a * Q), value=-1)
        return {"factor": moved.addcmul_(step[:, None, None] * b, _sums_from_below(b * Q)), "bound": bound}

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
class KronQ(_Fitted, FactoredAxes, FoldsRows, PreconditionsRows):
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

    @property
    def triangular(self) -> bool:
        return self._geometry.triangular

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

    def fitted(self, state: State, v: Tensor, h: Tensor, independent: bool = False) -> State:
        X, Z = self._geometry.images(self.held(state), v, h)
        unfold = [[mode_matrix(T, axis) for axis in range(v.ndim - 1)] for T in (X, Z, v)]
        x, z, noise = unfold
        counts = [each.shape[-1] for each in x]
        alone = independent and not self.triangular
        return self._fitted(state, x, None if alone else z, [each[..., :STARTS].mT for each in noise], counts)

    def apply_rows(self, state: State, rows: FactoredGradient) -> FactoredGradient:
        left, right = self.held(state)
        return FactoredGradient(self._multiplied([None, left], rows.g), self._multiplied([None, right], rows.a))

    def update_rows(self, state: State, rows: FactoredGradient, fold: Fold) -> None:
        """By a pair of independent noise and the gradient, whose images have as few columns as rows."""
        assert isinstance(rows, ProbedRows)
        v = rows.noise
        if self.triangular:  # compares with the image of the noise itself
            return self.update(state, Pair(v, rows.form(), "noise_and_gradient"), fold)
        start = self._started(state, v, rows.squared_norm)
        images = self.apply_rows(start, rows)
        x = [images.columns(axis) for axis in (0, 1)]
        noise = [mode_matrix(v, axis)[..., :STARTS].mT for axis in (0, 1)]
        new = self._fitted(start, x, None, noise, (v.shape[2], v.shape[1]))
        self._accept(state, new, x[0].abs().amax((1, 2)) > 0)

    def _fitted(
        self, state: State, x: Sequence[Tensor], z: Sequence[Tensor] | None, noise: Sequence[Tensor], counts: Sequence[int]
    ) -> State:
        """`fitted` by the images of every axis.  x, z: (B, d, r), z None for its expectation; counts: columns of a pair"""
        new, geometry = {}, self._geometry
        for axis, Q in enumerate(self.held(state)):
            E, size = geometry.gap(Q, x[axis], None if z is None else z[axis], noise[axis], counts[axis])
            if self.normaliser == "max":
                assert isinstance(E, Tensor)
                size = E.abs().flatten(1).amax(1)
            step, new[f"bound_{axis}"] = self.gain(state[f"bound_{axis}"], size)
            new[f"factor_{axis}"] = geometry.move(Q, E, step, noise[axis])
        _balance(self.held(new))
        return new

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
