"""The solver axis: how ``P g = C^power g`` is obtained from a representation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import inf
from typing import ClassVar, Generic, Literal, NoReturn, TypeAlias, TypeVar, get_args, get_origin

import torch
from torch import Tensor

from gradmaker.linalg.damping import damp
from gradmaker.linalg.factors import dense
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_interval
from gradmaker.representations.capabilities import Multiplies

__all__ = ["AnySolver", "Ask", "InverseSolver", "Needed", "PowerSolver", "Solver", "spectral_power"]


Ask: TypeAlias = Literal["definite", "steady", "squares", "factors", "search"]
"""``C`` is positive semidefinite; it is one and the same matrix throughout `Solver.solve`; auxiliary statistics, by their names
in `Curvature.auxiliary`; the loss and its gradient at displaced weights, for which a batch can be declared."""

Needed = TypeVar("Needed", bound=Multiplies, contravariant=True)
"""The capability that a solver needs. A solver of less serves a representation of more."""


class Solver(ABC, Generic[Needed]):
    """Turns a statistic into a preconditioned gradient: `prepare` now and then, `solve` at every step.

    Subclasses are frozen dataclasses of ``Solver[Capability]``. No method writes to ``state``. Every tensor of a cache leads
    with the stack axis. What a check may use besides `operator` is in `gradmaker.solvers.definition`.
    """

    needs: ClassVar[type]
    """The capability, a runtime-checkable protocol: the argument in ``Solver[Capability]``."""

    inapplicable: ClassVar[dict[str, str]] = {}
    """Options of a config that say nothing to this solver, with the reason and a way out: `custom` refuses them."""

    def __init_subclass__(cls, **options: object) -> None:
        """Read `needs` off the bases. TypeError where they say none, two, or one that cannot be checked."""
        super().__init_subclass__(**options)
        arguments = {each for base in cls.__dict__.get("__orig_bases__", ()) if _solves(base) for each in get_args(base)}
        given = [each for each in arguments if not isinstance(each, TypeVar)]
        if len(given) > 1 or (not arguments and not hasattr(cls, "needs")):
            said = ", ".join(sorted(each.__name__ for each in given)) or "none"
            raise TypeError(
                f"{cls.__name__}: its bases name {said} as the capability that it needs; name one, as in "
                f"class {cls.__name__}(Solver[Multiplies])"
            )
        if given:
            cls.needs = _checkable(cls.__name__, given[0])

    @property
    def asks(self) -> frozenset[Ask]:
        """What it takes for granted of ``C``, and what it makes use of beside ``C``."""
        return frozenset[Ask](("definite", "steady"))

    @property
    def exponent(self) -> float:
        """The power of ``C`` that `solve` applies: -1, -1/2, ..."""
        return -1.0

    def refuse(self, representation: Needed) -> str | None:
        """Why this very solver cannot serve a representation that has the capability; None if it can."""
        return None

    @abstractmethod
    def prepare(self, representation: Needed, state: State, previous: State | None) -> State:
        """Factorise, root or invert. ``previous`` is the last cache: what a failed block falls back to."""

    @abstractmethod
    def solve(self, representation: Needed, cache: State, g: Tensor) -> Tensor:
        """``P g``.  # (B, *shape)"""

    @abstractmethod
    def operator(self, representation: Needed, state: State) -> Tensor:
        """``P`` itself, formed from the definition with dense matrices: what `prepare` and `solve` are checked against.

        state: in float64  # (B, P, P)
        """


AnySolver: TypeAlias = Solver[NoReturn]
"""A solver, whatever it needs: what it can be given is known once a `Triple` has checked it."""


def _solves(base: object) -> bool:
    """Whether a base, as it is written, is a solver of a named capability."""
    origin = get_origin(base)
    return isinstance(origin, type) and issubclass(origin, Solver)


def _checkable(name: str, capability: type) -> type:
    """The capability. TypeError unless `isinstance` can tell who has it."""
    try:
        isinstance(None, capability)
    except TypeError:
        raise TypeError(
            f"{name} needs {capability}, which isinstance cannot check: decorate it with @runtime_checkable"
        ) from None
    return capability


@dataclass(frozen=True, kw_only=True)
class InverseSolver(Solver[Needed]):
    """Options of the solvers of ``(C + damping I)^-1``."""

    undamped: ClassVar[bool] = False
    """Whether a damping of zero is legal."""

    damping: float = 1e-3

    def __post_init__(self) -> None:
        check_interval("damping", self.damping, 0, inf, closed=self.undamped)


@dataclass(frozen=True, kw_only=True)
class PowerSolver(InverseSolver[Needed]):
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
