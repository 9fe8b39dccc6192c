"""CurveBall: one gradient step on the damped linear system at every step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from gradmaker.linalg.inner_products import double_dot
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_interval
from gradmaker.representations.implicit import MatrixFree
from gradmaker.solvers.carried import carry
from gradmaker.solvers.definition import Defined
from gradmaker.solvers.levenberg_marquardt import LevenbergMarquardt

__all__ = ["CurveBall"]

_RATE = 0.999**5


@dataclass(frozen=True, kw_only=True)
class CurveBall(Defined[MatrixFree]):
    """``P g = -z``, ``z <- rho z - beta (A z + g)``, ``A = C + lambda I``: a step to ``-A^-1 g`` from the last ``z``.

    ``rho`` and ``beta`` None minimise ``z^T A z / 2 + g^T z`` over the plane of ``z`` and ``A z + g``. Every
    ``interval`` steps ``adapt`` compares the loss at ``theta + z`` with that model and changes ``lambda``.

    Reference: Henriques, Ehrhardt, Albanie & Vedaldi, ICCV 2019, arXiv:1805.08095, algorithm 1 and section 3; constants of the
    authors' code.
    """

    linear: ClassVar[bool] = False
    rounds_to_limit: ClassVar[int] = 40

    damping: float = 1.0
    rho: float | None = None
    beta: float | None = None
    adapt: LevenbergMarquardt | None = LevenbergMarquardt(low=0.5, high=1.5, grow=1 / _RATE, shrink=_RATE)
    interval: int = 5

    def __post_init__(self) -> None:
        check_interval("damping", self.damping, 0, inf, closed=True)
        check_interval("interval", self.interval, 1, inf, closed=True)
        if (self.rho is None) != (self.beta is None):
            raise ValueError(f"rho={self.rho!r}, beta={self.beta!r}: give both, or neither to choose them at every step")
        if self.rho is not None and self.beta is not None:
            check_interval("rho", self.rho, 0, 1 + 1e-12, closed=True)
            check_interval("beta", self.beta, 0, inf)

    def prepare(self, representation: MatrixFree, state: State, previous: State | None) -> State:
        zero = representation.origin(state)
        count = torch.zeros(1, dtype=torch.int64, device=zero.device)
        return carry(representation, state, previous, {"z": zero, "damping": zero[:, 0] + self.damping, "count": count})

    def operator(self, representation: MatrixFree, state: State) -> Tensor:
        """The fixed point, at the initial damping."""
        C = representation.to_dense(state)
        P: Tensor = torch.linalg.inv(C + self.damping * torch.eye(C.shape[-1], dtype=C.dtype, device=C.device))
        return P

    def equation(self, representation: MatrixFree, state: State, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return representation.matvec(state, x) + self.damping * x, g

    def limit(self) -> CurveBall:
        return replace(self, rho=None, beta=None, adapt=None)

    def solve(self, representation: MatrixFree, cache: State, g: Tensor) -> Tensor:
        z, damping = cache["z"], cache["damping"]
        Az = representation.matvec(cache, z) + damping * z
        delta = Az + g
        if self.rho is None or self.beta is None:
            A_delta = representation.matvec(cache, delta) + damping * delta
            rho, beta = _best(g, z, delta, Az, A_delta)
        else:
            A_delta, rho, beta = None, z.new_tensor(self.rho), z.new_tensor(self.beta)
        following = rho * z - beta * delta
        failed = ~torch.isfinite(following).all()
        cache["failures"] = cache["failures"] + failed
        cache["z"] = torch.where(failed, torch.zeros_like(z), following)
        cache["count"] = cache["count"] + 1
        if self.adapt is not None and int(cache["count"]) % self.interval == 0:
            cache["damping"] = self._adapted(self.adapt, representation, cache, g)
        return -cache["z"]

    def _adapted(self, rule: LevenbergMarquardt, representation: MatrixFree, cache: State, g: Tensor) -> Tensor:
        z = cache["z"]
        now, then = (representation.loss_at(cache, d) for d in (torch.zeros_like(z), z))
        if now is None or then is None:
            return cache["damping"]
        predicted = double_dot(z, representation.matvec(cache, z) + cache["damping"] * z) / 2 + double_dot(z, g)
        return rule.adapt(cache["damping"], (then - now).double(), predicted)


def _best(g: Tensor, z: Tensor, delta: Tensor, Az: Tensor, A_delta: Tensor) -> tuple[Tensor, Tensor]:
    """``rho`` and ``beta`` that minimise ``m(rho z - beta delta)``; for parallel vectors, the pair of least norm.  # (), ()

    Both vectors are normalised first: a system of unequal scales would lose the smaller one to rounding.
    """
    a, b = (torch.where(v.any(), v.norm(), 1.0) for v in (delta, z))
    cross = double_dot(z / b, A_delta / a)
    M = torch.stack([double_dot(delta / a, A_delta / a), cross, cross, double_dot(z / b, Az / b)]).reshape(2, 2)
    right = torch.stack([double_dot(g, delta / a), double_dot(g, z / b)])
    if not torch.isfinite(M).all():
        return torch.full_like(a, torch.nan), torch.full_like(a, torch.nan)
    first, second = torch.linalg.pinv(M, rtol=1e-12, hermitian=True) @ right
    return (-second / b.double()).to(z.dtype), (first / a.double()).to(z.dtype)
