"""Solver for powers of a low-rank curvature ``C = J^T J`` by the Gram matrix ``J J^T`` of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal, get_args

import torch
from torch import Tensor

from gradmaker.linalg.damping import Placement
from gradmaker.linalg.factored_gradient import FactoredGradient, joined_rows
from gradmaker.linalg.fallbacks import count_failures, try_all
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_choice, check_interval
from gradmaker.representations.capabilities import LowRank
from gradmaker.representations.low_rank import form_rows
from gradmaker.representations.roles import SpansGradient
from gradmaker.solvers.cholesky import CholeskyInverse
from gradmaker.solvers.definition import Defined
from gradmaker.solvers.eigh import Decomposition
from gradmaker.solvers.roles import AppliesRows, SolvesOwn

__all__ = ["Gram", "Tail"]

Tail = Literal["eps", "none", "sigma_min"]
"""The gain of the part of a gradient that is orthogonal to all rows, see `Gram`."""

SMALLEST = 1e-6
"""Singular values of ``J`` below this share of the largest one count as zero."""
ROUNDOFFS = 10
"""A residual ``r`` of a gradient counts as zero below this many roundoffs of the gradient."""
LOSS = 1e-3
"""Largest relative error of ``P g`` by cancellation in the Woodbury identity, at worst ``roundoff |K| / damping``. Above it,
the gradient is first fitted by the rows: two more products with ``J`` and two with ``J^T``."""


@dataclass(frozen=True, kw_only=True)
class Gram(Defined[LowRank], SolvesOwn[LowRank], AppliesRows[LowRank]):
    """``P g = t g + J^T M J g`` with a small symmetric ``M`` from ``K = J J^T = V S V^T``, by the products of `LowRank`.

    With a spectrum, ``P g = J^T V f(S) S^-1 V^T J g + t r``, where ``r`` is the part of ``g`` orthogonal to the rows.

    - ``power=-1``: ``(C + damping)^-1``, so ``t = 1 / damping`` and ``M = -(K + damping)^-1 / damping`` (Woodbury). Where
      the damping is so small against ``K`` that this subtraction, of terms ``1 / damping`` times as large as the gradient,
      would cancel, the part of the gradient in the span of the rows gets ``P J^T y = J^T (K + damping)^-1 y``;
    - ``power=-1/2``: ``(C^(1/2) + damping)^-1``, with the damping added after the root; ``placement="before"`` adds it before
      the root, ``(C + damping)^(-1/2)``.

    ``mode="largest"`` is a damping relative to the largest eigenvalue of the matrix that it is added to. ``tail`` is ``t``:
    ``eps`` is the formula above; ``none`` is zero; ``sigma_min`` is the gain of the smallest singular value, in place of the
    damping. For ``power=-1/2`` only ``eps`` is damped. ``scale_preserving`` returns ``damping P g``.

    Small matrices are in double precision. A block that fails keeps its last cache, with the rows of that refresh; one whose
    refreshes have all failed gets the result for zero curvature, or keeps its gradient where the mode gives no scale.

    Reference: Ren & Goldfarb 2019, arXiv:1906.02353, section 3; Agarwal et al., ICML 2019, arXiv:1806.02958, section 2.
    """

    power: float = -1.0
    damping: float = 1e-3
    tail: Tail = "eps"
    scale_preserving: bool = False
    placement: Placement = "after"
    mode: Literal["absolute", "largest"] = "absolute"

    def __post_init__(self) -> None:
        if self.power not in (-1.0, -0.5):
            raise ValueError(f"power={self.power!r}: expected -1, -0.5")
        check_choice("tail", self.tail, get_args(Tail))
        check_interval("damping", self.damping, 0, inf, closed=self.tail != "eps" and not self.scale_preserving)
        if self.tail == "sigma_min" and self.power != -0.5:
            raise ValueError("tail='sigma_min': expected power=-0.5")
        check_choice("placement", self.placement, get_args(Placement))
        check_choice("mode", self.mode, ("absolute", "largest"))
        if self.placement == "before" and not (self.power == -0.5 and self.tail == "eps"):
            raise ValueError("placement='before': expected power=-0.5 and tail='eps': only there a root is damped")
        if self.mode == "largest" and (self.tail != "eps" or self.scale_preserving):
            raise ValueError("mode='largest': expected tail='eps', without scale_preserving")

    @property
    def exponent(self) -> float:
        return self.power

    @property
    def _direct(self) -> bool:
        """Whether ``M`` is an inverse, without an eigendecomposition."""
        return self.power == -1 and self.tail == "eps" and self.mode == "absolute"

    def refuse(self, representation: LowRank) -> str | None:
        if not _sampled(representation) or self._direct:
            return None
        return "Gram cannot take a root of rows that are sampled by coordinates: use power=-1, tail='eps', mode='absolute'"

    def prepare(self, representation: LowRank, state: State, previous: State | None) -> State:
        K = representation.gram(state).double()
        new, failed = self._invert(K, self._roundoff(representation, state)) if self._direct else self._decompose(K)
        unit = self.damping if self.scale_preserving else 1.0
        counters = count_failures(failed, previous)
        if bool((~failed).all()):
            scaled = {name: unit * new[name] for name in ("middle", "gain")}
            return {**state, **new, **scaled, **self._of_own(representation, state, K, scaled["middle"]), **counters}
        if previous is not None:  # with the rows of the same refresh
            return {**previous, **counters}
        nothing = {name: torch.zeros_like(x) for name, x in {**state, **new}.items()}
        return {**nothing, "gain": unit * torch.where(failed, self._default_gain(), new["gain"]), **counters}

    def _of_own(self, representation: LowRank, state: State, K: Tensor, middle: Tensor) -> State:
        """``z`` with ``P g = J^T z`` for the gradient ``g = J^T y`` of the step itself, if ``y`` is known.  # (B, N)"""
        y = representation.own(state) if isinstance(representation, SpansGradient) else None
        if y is None:
            return {}
        y = y.double().unsqueeze(-1)  # P J^T y = J^T (K + damping)^-1 y, without the cancellation of the identity
        return {"own": (-self.damping * (middle @ y) if self._direct else middle @ (K @ y)).squeeze(-1)}

    def _default_gain(self) -> float:
        """The gain for zero curvature."""
        if not self.damping or self.mode == "largest":
            return 1.0
        return self.damping**-0.5 if self.placement == "before" else 1 / self.damping

    def _roundoff(self, representation: LowRank, state: State) -> float | None:
        """Roundoff of products with the rows; None where the rows must not fit a gradient.

        A fit by sampled coordinates may be far larger than the gradient in the other coordinates.
        """
        if _sampled(representation):
            return None
        return max(torch.finfo(x.dtype).eps for x in state.values() if x.is_floating_point())

    def _invert(self, K: Tensor, roundoff: float | None) -> tuple[State, Tensor]:
        """``M``, ``t``, where needed ``(K + slack |K|)^-1``, and the failed members.  # (B, N, N), (B,), (B, N, N), (B,)"""
        ridges = [K.new_full(K.shape[:1], self.damping)]
        size = K.abs().sum(-1).amax(-1) if K.shape[-1] else K.new_zeros(K.shape[:1])  # upper bound of the largest eigenvalue
        if roundoff is not None and not bool((~(roundoff * size > LOSS * self.damping)).all()):
            ridges.append(torch.where(size > 0, ROUNDOFFS * roundoff * size, 1.0))
        found, failed = try_all(CholeskyInverse(1), [K] * len(ridges), ridges)
        inverse, *fits = (X for (X,) in found)
        cache = {"middle": -inverse / self.damping, "gain": K.new_full(K.shape[:1], 1 / self.damping)}
        return cache | dict(zip(("fit",), fits, strict=False)), failed

    def _decompose(self, K: Tensor) -> tuple[State, Tensor]:
        """``P`` on the span of the rows, the projector on it, ``t``.  # (B, N, N), (B, N, N), (B,), (B,)"""
        ((s, V),), failed = try_all(Decomposition(), [K], [K.new_zeros(K.shape[:1])])
        kept = s > s.amax(-1, keepdim=True) * SMALLEST**2
        values, tail = self._spectrum(s.sqrt(), kept)
        inverse = torch.where(kept, 1 / torch.where(kept, s, 1.0), 0.0)
        middle, projector = ((V * (entries * inverse).unsqueeze(-2)) @ V.mT for entries in (values, torch.ones_like(s)))
        return {"middle": middle, "projector": projector, "gain": tail}, failed | ~torch.isfinite(tail)

    def _spectrum(self, sigma: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues of ``P`` in the span of the rows, from singular values ``sigma`` of ``J``, and ``t``.  # (B, N), (B,)"""
        safe = torch.where(kept, sigma, 1.0)
        squared = self.power == -1 or self.placement == "before"
        top = sigma.amax(-1, keepdim=True) ** (2 if squared else 1)
        damping = self.damping * (top if self.mode == "largest" else torch.ones_like(top))
        exponent = -0.5 if self.placement == "before" else -1.0
        if squared or self.tail == "eps":
            values = ((safe.square() if squared else safe) + damping) ** exponent
        else:
            values = 1 / safe
        if self.tail == "eps":
            return values, damping.squeeze(-1) ** exponent
        if self.tail == "none":
            return values, sigma.new_zeros(sigma.shape[:1])
        return values, 1 / torch.where(kept, sigma, inf).amin(-1)

    def operator(self, representation: LowRank, state: State) -> Tensor:
        unit = self.damping if self.scale_preserving else 1.0
        if self._direct:
            C = representation.to_dense(state)
            eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
            inverse: Tensor = torch.linalg.inv(C + self.damping * eye)
            return unit * inverse
        _, sigma, Vh = torch.linalg.svd(form_rows(representation, state), full_matrices=False)
        kept = sigma > SMALLEST * sigma.amax(-1, keepdim=True)
        values, tail = self._spectrum(sigma, kept)
        entries = torch.where(kept, values - tail.unsqueeze(-1), 0.0)
        eye = torch.eye(Vh.shape[-1], dtype=Vh.dtype, device=Vh.device)
        P: Tensor = (Vh.mT * entries.unsqueeze(-2)) @ Vh + tail[:, None, None] * eye
        return unit * P

    def equation(self, representation: LowRank, state: State, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        unit = self.damping if self.scale_preserving else 1.0
        s, V = torch.linalg.eigh(representation.gram(state))
        sigma = s.clamp(min=0).sqrt()
        kept = sigma > SMALLEST * sigma.amax(-1, keepdim=True)
        values, tail = self._spectrum(sigma, kept)
        inner = torch.where(kept, (values - tail.unsqueeze(-1)) / torch.where(kept, s, 1.0), 0.0).unsqueeze(-1)
        z = V @ (inner * (V.mT @ representation.project(state, g).unsqueeze(-1)))
        return x, unit * (representation.combine(state, z.squeeze(-1)) + tail.view(-1, *[1] * (g.ndim - 1)) * g)

    def solve_own(self, representation: LowRank, state: State, cache: State) -> list[FactoredGradient | Tensor] | None:
        if not isinstance(representation, SpansGradient) or "own" not in cache:
            return None
        if any(cache.get(name) is not x for name, x in state.items()):  # rows of another step
            return None
        return representation.weighted(cache, cache["own"])

    def by_rows(self, representation: LowRank) -> bool:
        return isinstance(representation, SpansGradient) and representation.grain == "layer" and not _sampled(representation)

    def solve_rows(self, representation: LowRank, cache: State, rows: FactoredGradient) -> FactoredGradient | Tensor:
        assert isinstance(representation, SpansGradient)
        z = None if "fit" in cache or "projector" in cache else representation.project_rows(cache, rows)
        if z is None:  # what is orthogonal to the rows of the batch is found only in a gradient that is formed
            return self.solve(representation, cache, rows.form())
        spanned = representation.weighted(cache, (cache["middle"] @ z.double().unsqueeze(-1)).squeeze(-1))
        assert spanned is not None and isinstance(spanned[0], FactoredGradient)  # as they could be projected on
        return joined_rows([rows.scaled(cache["gain"].to(rows.g.dtype)), spanned[0]])

    def solve(self, representation: LowRank, cache: State, g: Tensor) -> Tensor:
        def combine(middle: str, z: Tensor) -> Tensor:
            weights = (cache[middle] @ z).squeeze(-1)
            spanned: Tensor = representation.combine(cache, weights.to(g.dtype)).to(g.dtype)
            return spanned

        def project(v: Tensor) -> Tensor:
            z: Tensor = representation.project(cache, v).double().unsqueeze(-1)
            return z

        z, rest = project(g), g
        if "fit" in cache:  # P g = J^T (K + damping)^-1 y + P (g - J^T y) for every y
            y = torch.zeros_like(z)
            for _ in range(2):  # again, for the error by the ridge of the fit
                y = y + cache["fit"] @ z
                rest = _beyond_rounding(rest - combine("fit", z), g)
                z = project(rest)
            z = z - self.damping * y
        spanned = combine("middle", z)
        if "projector" in cache and self.tail != "none":
            rest = rest - combine("projector", z)
            rest = _beyond_rounding(rest - combine("projector", project(rest)), g)  # again, for rows that are almost parallel
        return torch.addcmul(spanned, cache["gain"].to(g.dtype).view(-1, *[1] * (g.ndim - 1)), rest)


def _sampled(representation: LowRank) -> bool:
    """Whether products with rows use sampled coordinates only."""
    return getattr(representation, "coordinates", None) is not None


def _beyond_rounding(rest: Tensor, g: Tensor) -> Tensor:
    """The residual of ``g``, or zero where it is rounding, which a large gain would amplify.  # (B, *shape)"""
    left, whole = (torch.linalg.vector_norm(x.reshape(len(x), -1), dim=1) for x in (rest, g))
    small = left <= ROUNDOFFS * torch.finfo(g.dtype).eps * whole
    return torch.where(small.view(-1, *[1] * (g.ndim - 1)), 0.0, rest)
