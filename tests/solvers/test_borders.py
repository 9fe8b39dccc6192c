"""What a solver has to say, where it says what it needs, and that none is without an oracle."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import isabstract
from typing import Any, Literal, Protocol, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import CustomGradientConfig, CustomGradientMaker
from gradmaker.curvature import BatchGradient, FisherExact, Hessian
from gradmaker.linalg.state import State
from gradmaker.representations import Dense, Diagonal, Implicit, Kron
from gradmaker.representations.capabilities import Elementwise, Factored, Multiplies
from gradmaker.solvers import (
    LU,
    SOLVERS,
    AbsoluteDivision,
    AbsoluteEigh,
    Cholesky,
    DisplacedNeumann,
    Krylov,
    Neumann,
    SignedDivision,
    Solver,
    TruncatedCG,
)
from gradmaker.solvers.base import Needed, PowerSolver
from gradmaker.solvers.definition import Defined
from gradmaker.triple import Triple, TripleError

TO_KNOW = {"needs", "inapplicable", "asks", "exponent", "refuse", "prepare", "solve", "operator"}


@dataclass(frozen=True, kw_only=True)
class Scaled(Solver[Multiplies]):
    """``P = rate I``: nothing but what has to be said."""

    rate: float = 0.5

    def prepare(self, representation: Multiplies, state: State, previous: State | None) -> State:
        return {"failures": torch.zeros(len(next(iter(state.values()))), dtype=torch.int64)}

    def solve(self, representation: Multiplies, cache: State, g: Tensor) -> Tensor:
        return self.rate * g

    def operator(self, representation: Multiplies, state: State) -> Tensor:
        C = representation.to_dense(state)
        return self.rate * torch.eye(C.shape[-1], dtype=C.dtype).expand_as(C)


# --- names ----------------------------------------------------------------------------------------------------------------
def test_eight_names_have_to_be_known() -> None:
    said = {*vars(Solver), *Solver.__annotations__}
    assert {name for name in said if not name.startswith("_")} == TO_KNOW
    assert Solver.__abstractmethods__ == {"prepare", "solve", "operator"}


def test_a_solver_needs_what_its_base_is_given() -> None:
    class Generic(PowerSolver[Needed]):
        """Options, for any capability."""

    class Concrete(Generic[Elementwise], Defined[Elementwise]):
        """Of a diagonal."""

    class Further(Concrete):
        """The same."""

    assert not hasattr(Generic, "needs")
    assert Scaled.needs is Multiplies and Cholesky.needs is Factored
    assert Concrete.needs is Further.needs is Elementwise


def test_what_a_solver_needs_is_one_capability_that_can_be_checked() -> None:
    class Unchecked(Protocol):
        """One that `isinstance` refuses."""

        def matvec(self, state: State, v: Tensor) -> Tensor: ...

    with pytest.raises(TypeError, match=r"Silent: expected one capability in its base classes, got none: .*Multiplies"):

        class Silent(Solver):  # type: ignore[type-arg]
            pass

    with pytest.raises(TypeError, match="Both: expected one capability in its base classes, got Elementwise, Factored: write"):

        class Both(Defined[Factored], PowerSolver[Elementwise]):  # type: ignore[misc]
            pass

    with pytest.raises(TypeError, match=r"Blind needs .*Unchecked.*decorate it with @runtime_checkable"):

        class Blind(Solver[Unchecked]):  # type: ignore[type-var]
            pass

    Other = TypeVar("Other", bound=Multiplies, contravariant=True)

    class Open(Solver[Other]):
        pass

    assert not hasattr(Open, "needs")


ASKS: dict[Solver[Any], set[str]] = {
    AbsoluteEigh(): {"steady"},
    LU(): {"steady"},
    AbsoluteDivision(): {"steady"},
    SignedDivision(): {"steady"},
    DisplacedNeumann(): {"steady"},
    Neumann(): set(),
    Krylov(): {"steady"},
    Krylov(precondition=True, search="bfgs"): {"steady", "squares", "search"},
    TruncatedCG(): {"steady", "squares", "factors"},
    TruncatedCG(preconditioner=0.0): {"steady", "factors"},
}


def test_what_solvers_ask_of_a_curvature() -> None:
    assert {solver: set(solver.asks) for solver in ASKS} == ASKS
    others = set(SOLVERS.values()) - set(map(type, ASKS))
    assert all(make().asks == {"definite", "steady"} for make in others)


def test_examples_that_are_drawn_for_every_product_want_a_series() -> None:
    drawn = Hessian(examples=2, fresh=True)
    assert Triple(drawn, Implicit(), Neumann()).solver.asks == set()
    with pytest.raises(TripleError, match=r"Krylov needs one and the same matrix .*Hessian\(fresh=True\)"):
        Triple(drawn, Implicit(), Krylov())


@pytest.mark.parametrize("search", ["model", "bfgs"])
def test_a_batch_is_declared_for_a_search_alone(search: Literal["model", "bfgs"]) -> None:
    config = CustomGradientConfig(curvature=Hessian(), representation=Implicit(), solver=Krylov(search=search))
    maker = CustomGradientMaker(nn.Linear(3, 2), config)
    assert ("search" in maker.plan.purposes()) == (search == "bfgs")


# --- oracles --------------------------------------------------------------------------------------------------------------
def test_every_solver_has_an_oracle() -> None:
    assert [name for name, make in SOLVERS.items() if isabstract(make) or not issubclass(make, Defined)] == []


def test_a_solver_without_an_oracle_is_none() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Blind(Solver[Multiplies]):
        prepare, solve = Scaled.prepare, Scaled.solve

    make: Any = Blind
    with pytest.raises(TypeError, match="operator"):
        Triple(BatchGradient(), Diagonal(), make())


@pytest.mark.parametrize(("side", "unchecked"), [(4, False), (46, True)])
def test_an_operator_alone_checks_small_blocks(side: int, unchecked: bool) -> None:
    """A definition is wanted from 2048 parameters on; without one, a block of them is said not to be checked."""
    torch.manual_seed(0)
    config = CustomGradientConfig(curvature=BatchGradient(), representation=Diagonal(), solver=Scaled())
    maker = CustomGradientMaker(nn.Linear(side, side, bias=False), config)
    y = maker.setup_model_call(maker.model, torch.randn(5, side))
    maker.setup_loss_call(F.mse_loss, y, torch.randn(5, side))
    maker.forward_and_backward()
    (check,) = maker.verify().checks
    if unchecked:
        assert check.solve is None and "Scaled has no equation for blocks of 2116 parameters" in check.unchecked["solve"]
    else:
        assert check.solve is not None and check.solve < 1e-6


# --- triples --------------------------------------------------------------------------------------------------------------
def test_a_triple_asks_for_the_capability_and_for_the_matrix() -> None:
    assert Triple(FisherExact(), Kron(), Scaled()).solver == Scaled()
    with pytest.raises(TripleError, match="Cholesky needs a representation with the capability Factored, and Diagonal is not"):
        Triple(BatchGradient(), Diagonal(), Cholesky())
    with pytest.raises(TripleError, match="Scaled needs a positive semidefinite matrix, and Hessian need not be one"):
        Triple(Hessian(), Dense(), Scaled())


def test_a_triple_compares_prints_and_is_made_again_from_its_parts() -> None:
    from copy import deepcopy
    from dataclasses import replace

    triple = Triple(FisherExact(), Kron(), Cholesky(damping=0.1))
    assert triple == Triple(FisherExact(), Kron(), Cholesky(damping=0.1)) == deepcopy(triple)
    assert hash(triple) == hash(deepcopy(triple))
    assert replace(triple, solver=Cholesky(damping=0.2)) != triple
    with pytest.raises(TripleError, match="Diagonal is not one"):
        replace(triple, curvature=BatchGradient(), representation=Diagonal())
