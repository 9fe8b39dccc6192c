"""Powers of low-rank curvature through the small matrix of inner products of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from gradmaker.representations.base import LowRank, State
from gradmaker.representations.low_rank import form_rows
from gradmaker.solvers.base import Solver
from gradmaker.solvers.cholesky import CholeskyInverse
from gradmaker.solvers.damping import check_choice, check_interval
from gradmaker.solvers.eigh import Decomposition
from gradmaker.solvers.ladder import climb

__all__ = ["Gram", "Tail"]

Tail = Literal["eps", "none", "sigma_min"]
"""What becomes of the part of a gradient that no row reaches, see `Gram`."""

SMALLEST = 1e-6
"""Singular values of ``J`` below this share of the largest one count as zero."""


@dataclass(frozen=True, kw_only=True)
class Gram(Solver):
    """``P g = t g + J^T M J g`` with a small symmetric ``M`` from ``K = J J^T = V S V^T``, by the products of `LowRank` alone.

    - ``power=-1``: ``(C + damping)^-1``, so ``t = 1 / damping`` and ``M = -(K + damping)^-1 / damping`` (Woodbury);
    - ``power=-1/2``: ``(C^(1/2) + damping)^-1``: the damping follows the root.

    ``tail`` is ``t``: ``eps`` is the formula above; ``none`` drops what the rows do not span, where Woodbury would subtract two
    large numbers for a gradient that they do span (push-through); ``sigma_min`` gives it the smallest singular value's gain, in
    place of the damping. For ``power=-1/2`` only ``eps`` is damped. ``scale_preserving`` returns ``damping P g``.

    All that is small is done in double precision. A block that fails keeps its last cache, with the rows of then; one that
    fails before it ever succeeded gets ``g / damping``, what a zero curvature would give.

    Reference: Ren & Goldfarb 2019, arXiv:1906.02353, section 3; Agarwal et al., ICML 2019, arXiv:1806.02958, section 2.
    """

    needs: ClassVar[type] = LowRank
    definite: ClassVar[bool] = True

    power: float = -1.0
    damping: float = 1e-3
    tail: Tail = "eps"
    scale_preserving: bool = False

    def __post_init__(self) -> None:
        if self.power not in (-1.0, -0.5):
            raise ValueError(f"power = {self.power!r}: legal are -1, -0.5")
        check_choice("tail", self.tail, get_args(Tail))
        check_interval("damping", self.damping, 0, inf, closed=self.tail != "eps" and not self.scale_preserving)
        if self.tail == "sigma_min" and self.power != -0.5:
            raise ValueError("tail = 'sigma_min': legal with power = -0.5")

    @property
    def exponent(self) -> float:
        return self.power

    def refuse(self, representation: Any) -> str | None:
        exact = getattr(representation, "coordinates", None) is None or (self.power == -1 and self.tail == "eps")
        return None if exact else "Gram cannot root what is sampled by coordinates: use power=-1 with tail='eps'"

    def prepare(self, representation: Any, state: State, previous: State | None) -> State:
        K = representation.gram(state)
        middle, gain, lost = self._invert(K.double()) if self.power == -1 and self.tail == "eps" else self._decompose(K)
        unit = self.damping if self.scale_preserving else 1.0
        held = state if representation.live else {name: x.clone() for name, x in state.items()}
        failures = lost.to(torch.int64) + (0 if previous is None else previous["failures"])
        if not bool(lost.any()):
            return {**held, "middle": unit * middle, "gain": unit * gain, "failures": failures}
        if previous is not None:  # with its own rows: they fit together
            return {**previous, "failures": failures}
        nothing = {name: torch.zeros_like(x) for name, x in held.items()}
        return {
            **nothing,
            "middle": torch.zeros_like(middle),
            "gain": unit * torch.where(lost, self._rest(), gain),
            "failures": failures,
        }

    def _rest(self) -> float:
        return 1 / self.damping if self.damping else 1.0

    def _invert(self, K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``M``, ``t`` and who is lost.  # (B, N, N), (B,), (B,)"""
        ((inverse,),), lost = climb(CholeskyInverse(1), [K], [K.new_full(K.shape[:1], self.damping)])
        return -inverse / self.damping, K.new_full(K.shape[:1], 1 / self.damping), lost

    def _decompose(self, K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (parts,), lost = climb(Decomposition(), [K.double()], [K.new_zeros(K.shape[:1], dtype=torch.float64)])
        s, V = parts
        kept = s > s.amax(-1, keepdim=True) * max(SMALLEST**2, 10 * torch.finfo(K.dtype).eps)
        values, tail = self._spectrum(s.sqrt(), kept)
        entries = torch.where(kept, (values - tail.unsqueeze(-1)) / torch.where(kept, s, 1.0), 0.0)
        return (V * entries.unsqueeze(-2)) @ V.mT, tail, lost

    def _spectrum(self, sigma: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """What ``P`` does in the directions of the singular values ``sigma`` of ``J``, and to the rest.  # (B, N), (B,)"""
        safe = torch.where(kept, sigma, 1.0)
        if self.power == -1:
            values = 1 / (safe.square() + self.damping)
        else:
            values = 1 / (safe + self.damping if self.tail == "eps" else safe)
        if self.tail == "eps":
            return values, sigma.new_full(sigma.shape[:1], 1 / self.damping)
        if self.tail == "none":
            return values, sigma.new_zeros(sigma.shape[:1])
        return values, 1 / torch.where(kept, sigma, inf).amin(-1)

    def operator(self, representation: Any, state: State) -> Tensor:
        unit = self.damping if self.scale_preserving else 1.0
        if self.power == -1 and self.tail == "eps":
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

    def solve(self, representation: Any, cache: State, g: Tensor) -> Tensor:
        z = cache["middle"] @ representation.project(cache, g).double().unsqueeze(-1)
        spanned = representation.combine(cache, z.squeeze(-1).to(g.dtype)).to(g.dtype)
        return torch.addcmul(spanned, cache["gain"].to(g.dtype).view(-1, *[1] * (g.ndim - 1)), g)
