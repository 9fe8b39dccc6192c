"""Solver by the polar factor of a gradient: preconditioning by the second moment of this gradient alone.

Polynomials in ``X X^T`` map all singular values close to one; matrix products only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import inf, sqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradmaker.linalg.state import State
from gradmaker.options.checks import check_choice, check_interval
from gradmaker.representations.base import NO_LIMIT
from gradmaker.representations.capabilities import Momentary
from gradmaker.solvers.definition import DefinedByAxes

__all__ = ["PolarFactor", "Quintic", "polar_express", "polar_factor"]

Quintic = tuple[float, float, float]
"""Coefficients of ``a x + b x^3 + c x^5``."""
MUON: Quintic = (3.4445, -4.7750, 2.0315)
"""Muon's quintic: steep at zero; maps singular values to [0.7, 1.2], which suffices (Jordan et al. 2024)."""
CUSHION, SAFETY = 0.02407327424182761, 1.01


@lru_cache(maxsize=32)
def polar_express(lowest: float, steps: int) -> tuple[Quintic, ...]:
    """Odd quintics whose composition is nearest to one on ``[lowest, 1]``: each is minimax on the range of the one before.

    All but the last divide their argument by 1.01, so that rounding does not lead beyond one.

    Reference: Amsel, Persson, Musco, Gower, 2025, arXiv:2505.16932, theorem 3.1 and algorithm 1.
    """
    low, high, out = lowest, 1.0, list[Quintic]()
    for step in range(steps):
        a, b, c = _minimax(max(low, CUSHION * high), high)
        centre = 2 / (_value((a, b, c), low) + _value((a, b, c), high))
        quintic = (a * centre, b * centre, c * centre)
        low = _value(quintic, low)
        high = 2 - low
        s = SAFETY if step < steps - 1 else 1.0
        out.append((quintic[0] / s, quintic[1] / s**3, quintic[2] / s**5))
    return tuple(out)


def _value(quintic: Quintic, x: float) -> float:
    a, b, c = quintic
    return x * (a + x * x * (b + x * x * c))


def _minimax(low: float, high: float) -> Quintic:
    """The odd quintic nearest to one on ``[low, high]``, by Remez' exchange of the two inner extrema."""
    if low / high > 1 - 5e-6:  # the equations are singular here; the Padé quintic is as accurate
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    nodes, error = [low, (3 * low + high) / 4, (low + 3 * high) / 4, high], inf
    for _ in range(100):
        rows = [[x, x**3, x**5, (-1.0) ** k] for k, x in enumerate(nodes)]
        a, b, c, new = torch.linalg.solve(torch.tensor(rows, dtype=torch.float64), torch.ones(4, dtype=torch.float64)).tolist()
        if abs(error - new) < 1e-15:
            break
        root, error = sqrt(9 * b * b - 20 * a * c), new
        nodes[1:3] = [sqrt((-3 * b - root) / (10 * c)), sqrt((-3 * b + root) / (10 * c))]
    return a, b, c


def polar_factor(G: Tensor, quintics: tuple[Quintic, ...], dtype: torch.dtype | None = None) -> Tensor:
    """``U p(S) V^T`` of ``G = U S V^T`` over its Frobenius norm, ``p`` the composition; zero stays zero.  # (B, d, n)

    dtype: of the iteration and of the result; None: that of ``G``
    """
    norm = torch.linalg.matrix_norm(G)
    tall = G.shape[-2] > G.shape[-1]  # then the short Gram matrix is X^T X, and multiplies from the right
    side = min(G.shape[-2:])
    X = torch.empty(G.shape, dtype=dtype or G.dtype, device=G.device)
    torch.div(G, torch.where(norm > 0, norm, 1.0)[:, None, None], out=X)
    A, T, Y = X.new_empty(len(X), side, side), X.new_empty(len(X), side, side), torch.empty_like(X)
    for a, b, c in quintics:  # four buffers serve all steps: fresh ones cost as much as the products where memory is trimmed
        torch.bmm(*((X.mT, X) if tall else (X, X.mT)), out=A)
        torch.baddbmm(A, A, A, beta=b, alpha=c, out=T)
        X, Y = torch.baddbmm(X, *((X, T) if tall else (T, X)), beta=a, out=Y), X
    return X


@dataclass(frozen=True, kw_only=True)
class PolarFactor(DefinedByAxes[Momentary]):
    """``P G = gain (G G^T)^(-1/2) G = gain U V^T``: ``P`` is made of the gradient that it is applied to.

    - ``method="quintic"``: Muon's polynomial; ``"polar_express"``: minimax ones for singular values down to ``lowest`` of the
      norm; ``"svd"``: exact, without directions below 1e-12 of the norm.
    - ``nuclear`` scales by the sum of the singular values: steepest descent in the spectral norm.
    - ``half`` iterates in bfloat16; None, as published, for gradients that are not of float64.

    Reference: Jordan et al. 2024, Muon; Amsel et al. 2025, arXiv:2505.16932; Carlson et al., AISTATS 2015 (spectral descent).
    """

    linear: ClassVar[bool] = False
    inapplicable: ClassVar[dict[str, str]] = NO_LIMIT | dict.fromkeys(
        ("curvature_interval", "preconditioner_interval", "warmup_steps", "stagger"),
        "the polar factor is computed from the gradient of every step; fewer steps of the iteration make it cheaper",
    )

    method: Literal["quintic", "polar_express", "svd"] = "quintic"
    steps: int = 5
    lowest: float = 1e-3
    gain: float = 1.0
    nuclear: bool = False
    half: bool | None = None

    def __post_init__(self) -> None:
        check_choice("method", self.method, ("quintic", "polar_express", "svd"))
        check_interval("steps", self.steps, 1, 100, closed=True)
        check_interval("lowest", self.lowest, 0, 1)
        check_interval("gain", self.gain, 0, inf)

    @property
    def exponent(self) -> float:
        return -0.5

    def _quintics(self) -> tuple[Quintic, ...]:
        return (MUON,) * self.steps if self.method == "quintic" else polar_express(self.lowest, self.steps)

    def prepare(self, representation: Momentary, state: State, previous: State | None) -> State:
        held = next(iter(state.values()))
        failures = torch.zeros(len(held), dtype=torch.int64, device=held.device)
        return {"failures": failures if previous is None else previous["failures"].clone()}

    def axes(self, representation: Momentary, state: State) -> list[Tensor]:
        s, U = torch.linalg.eigh(representation.newest(state))
        norm = s.clamp(min=0).sum(-1, keepdim=True).sqrt()
        sigma = s.clamp(min=0).sqrt() / norm
        x = sigma
        for quintic in self._quintics() if self.method != "svd" else ():
            a, b, c = quintic
            x = x * (a + b * x**2 + c * x**4)
        x = torch.where(sigma > 1e-12, 1.0, 0.0) if self.method == "svd" else x
        ratio = torch.where(sigma > 1e-7, x / (sigma * norm), 0.0) * self.gain
        if self.nuclear:
            ratio = ratio * (sigma * norm * (x if self.method != "svd" else 1.0)).sum(-1, keepdim=True)
        return [(U * ratio.unsqueeze(-2)) @ U.mT]

    def solve(self, representation: Momentary, cache: State, g: Tensor) -> Tensor:
        G = representation.unfold(g)
        if self.method == "svd":
            U, s, Vh = torch.linalg.svd(G, full_matrices=False)
            X = (U * (s > 1e-12 * torch.linalg.vector_norm(s, dim=-1, keepdim=True)).unsqueeze(-2)) @ Vh
        else:
            half = G.dtype != torch.float64 if self.half is None else self.half
            X = polar_factor(G, self._quintics(), torch.bfloat16 if half else None)
        scale = G.new_full((len(G), 1, 1), self.gain)
        if self.nuclear:
            scale *= (X * G).sum((-2, -1), keepdim=True)  # the sum of the singular values, where p = 1
        out: Tensor = (X * scale).reshape(g.shape)
        return out
