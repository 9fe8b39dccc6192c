"""The solver axis: how ``P g = C^power g`` is obtained from a representation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradmaker.representations.base import State

__all__ = ["Solver", "kronecker_power", "spectral_power"]


class Solver(ABC):
    """Turns a statistic into a preconditioned gradient: `prepare` now and then, `solve` at every step.

    Subclasses are frozen dataclasses. Neither method writes to ``state``. Every tensor of a cache leads with the stack axis.
    """

    needs: ClassVar[type]
    """The capability protocol that a representation must have."""
    definite: ClassVar[bool] = True
    """Whether ``C`` has to be positive semidefinite."""

    linear: ClassVar[bool] = True
    """Whether `solve` is linear: ``P`` does not depend on the gradient that it is applied to."""

    @property
    @abstractmethod
    def exponent(self) -> float:
        """The power of ``C`` that `solve` applies: -1, -1/2, ..."""

    def refuse(self, representation: Any) -> str | None:
        """Why this very solver cannot serve a representation that has the capability; None if it can."""
        return None

    @abstractmethod
    def prepare(self, representation: Any, state: State, previous: State | None) -> State:
        """Factorise, root or invert. ``previous`` is the last cache: what a failed block falls back to."""

    @abstractmethod
    def solve(self, representation: Any, cache: State, g: Tensor) -> Tensor:
        """``P g``.  # (B, *shape)"""

    @abstractmethod
    def operator(self, representation: Any, state: State) -> Tensor:
        """``P`` itself, formed from the definition with dense matrices: what `prepare` and `solve` are checked against.

        state: in float64  # (B, P, P)
        """


def spectral_power(C: Tensor, damping: float | Tensor, exponent: float) -> Tensor:
    """``(C + damping I)^exponent`` of a dense positive semidefinite matrix.  # (B, P, P)"""
    s, Q = torch.linalg.eigh(C)
    powered: Tensor = (s.clamp(min=0) + damping) ** exponent
    result: Tensor = (Q * powered.unsqueeze(-2)) @ Q.mT
    return result


def kronecker_power(factors: Sequence[Tensor], ridges: Sequence[Tensor], exponent: float) -> Tensor:
    """``(F_1 + r_1 I)^exponent (x) (F_2 + r_2 I)^exponent (x) ...``, formed.  # (B, P, P)"""
    out: Tensor | None = None
    for F, r in zip(factors, ridges, strict=True):
        root = spectral_power(torch.diag_embed(F) if F.ndim == 2 else F, r.unsqueeze(-1), exponent)
        if out is not None:
            size = out.shape[-1] * root.shape[-1]
            root = torch.einsum("bij,bkl->bikjl", out, root).reshape(-1, size, size)
        out = root
    assert out is not None
    return out
