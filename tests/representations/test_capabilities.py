"""What a representation claims, it has: every member of a capability, with the signature of the protocol."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor

from gradmaker.linalg.state import State
from gradmaker.representations import REPRESENTATIONS, Diagonal, Kron, KronSum, Representation
from gradmaker.representations.capabilities import Elementwise, Factored, Multiplies, Summed
from gradmaker.solvers import SOLVERS


def lineage(capability: type) -> list[type]:
    """A capability and those that it extends."""
    return [each for each in capability.__mro__ if Multiplies in each.__mro__]


CAPABILITIES = {each.__name__: each for solver in SOLVERS.values() for each in lineage(solver.needs)}


def members(capability: type) -> dict[str, Any]:
    """Methods and properties of a protocol, those that it extends included."""
    found = {name: member for each in reversed(lineage(capability)) for name, member in vars(each).items()}
    return {name: member for name, member in found.items() if not name.startswith("_")}


def mismatches(representation: Representation, capability: type) -> list[str]:
    """Members of a capability that a representation has otherwise than the protocol says."""
    found = []
    for name, member in members(capability).items():
        own = inspect.getattr_static(type(representation), name, None)
        if isinstance(member, property):
            right = type(getattr(representation, name)) is get_type_hints(member.fget)["return"]
        else:
            right = inspect.isfunction(own) and said(own) == said(member)
        if not right:
            found.append(name)
    return found


def said(function: Any) -> list[tuple[object, ...]]:
    """Names, kinds, defaults and types of the arguments, and the type of the result."""
    hints = get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default, hints.get(p.name)) for p in parameters] + [("return", hints["return"])]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_signatures_are_those_of_the_capability(name: str, capability: str) -> None:
    representation = REPRESENTATIONS[name]()
    if isinstance(representation, CAPABILITIES[capability]):
        assert mismatches(representation, CAPABILITIES[capability]) == []


def test_every_capability_is_claimed_and_extends_multiplication() -> None:
    made = [make() for make in REPRESENTATIONS.values()]
    assert all(any(isinstance(each, capability) for each in made) for capability in CAPABILITIES.values())
    assert all(isinstance(each, Multiplies) for each in made)
    assert len(CAPABILITIES) == 16
    assert set(members(Multiplies)) == {"matvec", "to_dense"}


@dataclass(frozen=True)
class WithoutArgument(Kron):
    def order(self) -> float:  # type: ignore[override]
        return 1.0


@dataclass(frozen=True)
class AsText(Kron):
    order: str = "first"  # type: ignore[assignment]


@dataclass(frozen=True)
class OtherNames(Kron):
    def factors(self, statistic: State) -> list[Tensor]:
        return super().factors(statistic)


@dataclass(frozen=True)
class OtherTypes(Diagonal):
    def diagonal(self, state: State) -> list[Tensor]:  # type: ignore[override]
        return [torch.ones(1)]


@dataclass(frozen=True)
class OtherFlag(KronSum):
    square_roots: int = 0  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("make", "capability", "name"),
    [
        (WithoutArgument, Factored, "order"),
        (AsText, Factored, "order"),
        (OtherNames, Factored, "factors"),
        (OtherTypes, Elementwise, "diagonal"),
        (OtherFlag, Summed, "square_roots"),
    ],
)
def test_another_signature_is_found(make: type[Representation], capability: type, name: str) -> None:
    representation = make()
    assert isinstance(representation, capability)
    assert mismatches(representation, capability) == [name]
