"""The solver axis: how ``P g = C^power g`` is obtained from a representation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradmaker.linalg.damping import damp
from gradmaker.linalg.definition import along_axes
from gradmaker.linalg.factors import dense
from gradmaker.linalg.mode_products import kronecker_product
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_interval

__all__ = ["InverseSolver", "PowerSolver", "Solver", "spectral_power"]


class Solver(ABC):
    """Turns a statistic into a preconditioned gradient: `prepare` now and then, `solve` at every step.

    Subclasses are frozen dataclasses. Neither method writes to ``state``. Every tensor of a cache leads with the stack axis.
    """

    needs: ClassVar[type]
    """The capability protocol that a representation must have."""
    definite: ClassVar[bool] = True
    """Whether ``C`` has to be positive semidefinite."""

    steady: ClassVar[bool] = True
    """Whether ``C`` has to be one and the same matrix throughout `solve`."""
    linear: ClassVar[bool] = True
    """Whether `solve` is linear: ``P`` does not depend on the gradient that it is applied to."""
    implicit: ClassVar[bool] = False
    """Whether `equation` multiplies ``x``, so that it holds up to the rounding of ``x`` times a condition number."""
    rounds_to_limit: ClassVar[int] = 1
    """Solves of one gradient after which a `limit` is reached."""
    inapplicable: ClassVar[dict[str, str]] = {}
    """Options of a config that say nothing to this solver, with the reason and a way out: `custom` refuses them."""

    @property
    def exponent(self) -> float:
        """The power of ``C`` that `solve` applies: -1, -1/2, ..."""
        return -1.0

    @property
    def accuracy(self) -> float:
        """Relative error of ``P g`` at which its own stopping rule may end; 0 without one."""
        return 0.0

    @property
    def reads(self) -> frozenset[str]:
        """What it makes use of beside ``C``: names as in `Curvature.auxiliary`."""
        return frozenset()

    @property
    def searches(self) -> bool:
        """Whether it evaluates the loss and its gradient at displaced weights, for which a batch can be declared."""
        return False

    def refuse(self, representation: Any) -> str | None:
        """Why this very solver cannot serve a representation that has the capability; None if it can."""
        return None

    @abstractmethod
    def prepare(self, representation: Any, state: State, previous: State | None) -> State:
        """Factorise, root or invert. ``previous`` is the last cache: what a failed block falls back to."""

    @abstractmethod
    def solve(self, representation: Any, cache: State, g: Tensor) -> Tensor:
        """``P g``.  # (B, *shape)"""

    def operator(self, representation: Any, state: State) -> Tensor:
        """``P`` itself, formed from the definition with dense matrices: what `prepare` and `solve` are checked against.

        That of `axes`, unless it is overridden.

        state: in float64  # (B, P, P)
        """
        axes = self.axes(representation, state)
        if axes is None:
            raise NotImplementedError(f"{type(self).__name__} defines neither operator nor axes")
        P: Tensor = representation.widen(state, kronecker_product(axes))
        return P

    def axes(self, representation: Any, state: State) -> list[Tensor] | None:
        """The factors of ``P`` on the axes of an unfolded gradient, from the definition; None where it has none.

        state: in float64  # each (B, d, d), (B, d) or tiled
        """
        return None

    def equation(self, representation: Any, state: State, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Two sides that are equal where ``x = P g``, for blocks that are too large for `operator`; None: there are none.

        state, g, x: in float64  # -> any shape, twice
        """
        axes = self.axes(representation, state)
        return None if axes is None else (x, along_axes(axes, representation.unfold(g)).reshape(g.shape))

    def limit(self) -> Solver:
        """Itself, with options under which a few steps from nothing reach what `operator` and `equation` say."""
        return self


@dataclass(frozen=True, kw_only=True)
class InverseSolver(Solver):
    """Options of the solvers of ``(C + damping I)^-1``."""

    undamped: ClassVar[bool] = False
    """Whether a damping of zero is legal."""

    damping: float = 1e-3

    def __post_init__(self) -> None:
        check_interval("damping", self.damping, 0, inf, closed=self.undamped)


@dataclass(frozen=True, kw_only=True)
class PowerSolver(InverseSolver):
    """Options of the solvers of any negative power of ``C``."""

    undamped: ClassVar[bool] = True

    power: float = -1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_interval("power", self.power, -inf, 0)

    @property
    def exponent(self) -> float:
        return self.power


def spectral_power(C: Tensor, damping: float | Tensor, exponent: float, mode: str = "absolute") -> Tensor:
    """``(C + damping I)^exponent`` of a dense positive semidefinite matrix, or as another `Mode` says.  # (B, P, P)"""
    s, Q = torch.linalg.eigh(dense(C))
    powered: Tensor = damp(s.clamp(min=0), damping, mode) ** exponent
    result: Tensor = (Q * powered.unsqueeze(-2)) @ Q.mT
    return result
