"""Triples: a method as curvature x representation x solver, and which triples are legal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar, cast, get_args, get_type_hints

from gradmaker.curvature import CURVATURES
from gradmaker.curvature.base import Curvature
from gradmaker.curvature.evidence import Outer
from gradmaker.curvature.evidence_kinds import kinds
from gradmaker.curvature.roles import OfProducts
from gradmaker.curvature.tied import Tied
from gradmaker.representations import REPRESENTATIONS
from gradmaker.representations.base import Representation
from gradmaker.solvers import SOLVERS
from gradmaker.solvers.base import AnySolver, Solver

__all__ = ["Triple", "TripleError", "legality"]

Part = TypeVar("Part")


class TripleError(ValueError):
    """The parts of a triple do not fit together."""


@dataclass(frozen=True, init=False)
class Triple:
    """Curvature x representation x solver. TripleError at construction if they do not fit."""

    curvature: Curvature
    representation: Representation
    solver: Solver[Representation]

    def __init__(self, curvature: Curvature, representation: Representation, solver: AnySolver) -> None:
        reason, paired = refusal(curvature, representation, solver), _paired(representation, solver)
        if reason or paired is None:
            raise TripleError(reason)
        for name, part in (("curvature", curvature), ("representation", representation), ("solver", paired)):
            object.__setattr__(self, name, part)

    @property
    def holds_ties(self) -> bool:
        """Whether the two uses of a tied table are measured and held apart; else it is a parameter without a rule."""
        return kinds(Outer) <= self.curvature.gives and kinds(Tied) <= self.representation.takes

    def __str__(self) -> str:
        return f"{self.curvature} x {self.representation} x {self.solver}"


def _paired(representation: Representation, solver: AnySolver) -> Solver[Representation] | None:
    """The solver, typed for this representation; None if the representation lacks the capability that it needs."""
    return cast("Solver[Representation]", solver) if isinstance(representation, solver.needs) else None


def refusal(curvature: Curvature, representation: Representation, solver: AnySolver) -> str | None:
    """Why three parts do not fit, and the parts that would; None if they fit."""
    c, r, s = (type(part).__name__ for part in (curvature, representation, solver))
    if not _feeds(curvature, representation):
        gives, takes = (", ".join(sorted(map(str, kinds))) for kinds in (curvature.gives, representation.takes))
        fits = _names(CURVATURES, lambda part: _feeds(part, representation) and _places(part, representation))
        return f"{r} is built from {takes}, but {c} gives {gives}. Curvatures that fit {r}: {fits}"
    if not _places(curvature, representation):
        fits = _names(CURVATURES, lambda part: _feeds(part, representation) and _places(part, representation))
        hint = f"Use {r}(granularity='layer'). " if hasattr(representation, "granularity") else ""
        return (
            f"{c} is measured by layers, but {r} was asked to hold single parameter tensors. "
            f"{hint}Curvatures that fit {r} of single tensors: {fits}"
        )
    reason = _unsolvable(curvature, representation, solver)
    if reason is None:
        return None
    fits = _names(SOLVERS, lambda part: _unsolvable(curvature, representation, part()) is None)
    return f"{reason}. Solvers that fit {c} in {r}: {fits}"


def _unsolvable(curvature: Curvature, representation: Representation, solver: AnySolver) -> str | None:
    """Why a solver cannot solve with this curvature in this representation; None if it can."""
    c, r, s = (type(part).__name__ for part in (curvature, representation, solver))
    paired = _paired(representation, solver)
    if paired is None:
        return f"{s} needs a representation with the capability {solver.needs.__name__}, and {r} is not one"
    if "definite" in solver.asks and not curvature.definite:
        return f"{s} needs a positive semidefinite matrix, and {c} need not be one"
    if "steady" in solver.asks and isinstance(curvature, OfProducts) and not curvature.steady:
        return f"{s} needs one and the same matrix throughout a solve, and {c}(fresh=True) draws another for every product"
    auxiliary = curvature.auxiliary if isinstance(curvature, OfProducts) else ()
    unread = [name for name in auxiliary if name not in solver.asks]
    if unread:
        return f"{c}({unread[0]}=True) measures {unread[0]} that {s} does not read"
    return paired.refuse(representation)


def _feeds(curvature: Curvature | type[Curvature], representation: Representation) -> bool:
    return curvature.gives <= representation.takes


def _places(curvature: Curvature | type[Curvature], representation: Representation) -> bool:
    """Whether a curvature that is measured by layers meets a representation of layers."""
    return not (curvature.layerwise and representation.grain == "tensor")


def _names(registry: Mapping[str, Part], fits: Callable[[Part], bool]) -> str:
    return ", ".join(name for name, part in registry.items() if fits(part)) or "none"


def legality() -> Iterator[tuple[str, str, str, str | None]]:
    """Every combination of the registered parts, by name, with the reason for which it is refused."""
    for c, make_c in CURVATURES.items():
        for label, r in _granularities():
            for s, make_s in SOLVERS.items():
                yield c, label, s, refusal(make_c(), r, make_s())


def _granularities() -> Iterator[tuple[str, Representation]]:
    for name, make in REPRESENTATIONS.items():
        grains = get_args(get_type_hints(make).get("granularity"))
        if not grains:
            yield name, make()
        for grain in grains:
            yield f"{name}({grain})", make(granularity=grain)  # type: ignore[call-arg]
