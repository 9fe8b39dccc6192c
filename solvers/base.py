"""Base classes of solvers: ``P g = C^power g`` from a representation of the curvature ``C``."""

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
"""What a solver requires or uses: ``definite``, a positive semidefinite ``C``; ``steady``, a ``C`` that is constant in `solve`;
``squares`` and ``factors``, statistics of `Curvature.auxiliary`; ``search``, the loss and its gradient at displaced weights,
for which a user can declare a batch of its own."""

Needed = TypeVar("Needed", bound=Multiplies, contravariant=True)
"""The capability that a solver needs. Contravariant: a solver of less accepts a representation of more."""


class Solver(ABC, Generic[Needed]):
    """Computes the preconditioned gradient: `prepare` at a refresh of the preconditioner, `solve` at every step.

    Subclasses are frozen dataclasses of ``Solver[Capability]``. No method writes to ``state``. The first axis of every cache
    tensor is the stack axis. Solvers of large matrices also define an equation for checks: `gradmaker.solvers.definition`.
    """

    needs: ClassVar[type]
    """The capability, a runtime-checkable protocol: the argument in ``Solver[Capability]``."""

    inapplicable: ClassVar[dict[str, str]] = {}
    """Options of a config without effect on this solver, each with a reason and an alternative; `custom` refuses them."""

    def __init_subclass__(cls, **options: object) -> None:
        """Set `needs` from the base classes. TypeError unless they name one capability that isinstance can check."""
        super().__init_subclass__(**options)
        arguments = {each for base in cls.__dict__.get("__orig_bases__", ()) if _solves(base) for each in get_args(base)}
        given = [each for each in arguments if not isinstance(each, TypeVar)]
        if len(given) > 1 or (not arguments and not hasattr(cls, "needs")):
            said = ", ".join(sorted(each.__name__ for each in given)) or "none"
            raise TypeError(
                f"{cls.__name__}: expected one capability in its base classes, got {said}: write "
                f"class {cls.__name__}(Solver[Multiplies])"
            )
        if given:
            cls.needs = _checkable(cls.__name__, given[0])

    @property
    def asks(self) -> frozenset[Ask]:
        """What the solver requires of ``C``, and what it uses besides ``C``."""
        return frozenset[Ask](("definite", "steady"))

    @property
    def exponent(self) -> float:
        """The power of ``C`` that `solve` applies: -1, -1/2, ..."""
        return -1.0

    def refuse(self, representation: Needed) -> str | None:
        """The reason why a representation that has the capability does not fit the options of this solver; None if it fits."""
        return None

    @abstractmethod
    def prepare(self, representation: Needed, state: State, previous: State | None) -> State:
        """The cache: a factorisation, root or inverse. A block that fails keeps its part of ``previous``, the last cache."""

    @abstractmethod
    def solve(self, representation: Needed, cache: State, g: Tensor) -> Tensor:
        """``P g``.  # (B, *shape)"""

    @abstractmethod
    def operator(self, representation: Needed, state: State) -> Tensor:
        """The dense matrix ``P`` from the definition, which checks of `prepare` and `solve` compare with.

        state: in float64  # (B, P, P)
        """


AnySolver: TypeAlias = Solver[NoReturn]
"""A solver that needs any capability; `Triple` checks that the representation has it."""


def _solves(base: object) -> bool:
    """Whether a base class, as written, is a parametrised `Solver`."""
    origin = get_origin(base)
    return isinstance(origin, type) and issubclass(origin, Solver)


def _checkable(name: str, capability: type) -> type:
    """Return the capability. TypeError unless it is a runtime-checkable protocol or a class."""
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
