"""What a new representation has to know, and which parts play which of the roles beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmaker import CustomGradientConfig, CustomGradientMaker
from gradmaker.capture.one_hot import OneHot
from gradmaker.curvature import BatchGradient, Evidence, Gradient, Outer, kinds
from gradmaker.curvature.products import Product
from gradmaker.linalg.state import State
from gradmaker.representations import (
    REPRESENTATIONS,
    AlternatingInverse,
    CrossDims,
    Dense,
    Eigenbasis,
    GaussianGraph,
    Implicit,
    Kron,
    KronPairs,
    KronQ,
    KronRows,
    OneSided,
    Pairs,
    Position,
    Representation,
    RotatedDims,
    Rows,
    TriangularQ,
    Window,
    ZeroHistory,
    roles,
)
from gradmaker.representations.base import Fold, Frame, Grain, average
from gradmaker.solvers import CG, Apply
from tests import oracles

TO_KNOW = {"takes", "inapplicable", "grain", "init", "update", "refresh", "to_dense", "matvec"}

PLAYED = {
    roles.FactoredAxes: "Kron KronRows KronDims RootKronDims Eigenbasis TensorNormal OneSided ZeroHistory KronSum RotatedDims "
    "InverseDims CrossDims AlternatingInverse OneWayDims KronQ",
    roles.Compact: "Rows Sketched Window Truncated Implicit Position GaussianGraph Pairs KronPairs",
    roles.WholeLayers: "Dense Rows Sketched Window Truncated TriangularQ Pairs",
    roles.ByExample: "Kron KronRows Eigenbasis",
    roles.SpansGradient: "Rows Sketched",
    roles.FoldsMoments: "Kron",
    roles.FoldsLast: "Kron Eigenbasis KronDims RotatedDims ZeroHistory RootKronDims",
    roles.Additive: "Dense Kron Diagonal",
    roles.PreconditionsRows: "KronQ KronPairs",
    roles.Unstacked: "KronRows Rows Sketched Window Truncated Implicit",
    roles.Snapshots: "Implicit KronPairs",
    roles.SpansGradient: "Rows Sketched Window Truncated",
    roles.SlowTensors: "Eigenbasis RotatedDims CrossDims OneWayDims",
    roles.FoldsRows: "KronDims RootKronDims TensorNormal OneSided ZeroHistory KronSum CrossDims OneWayDims InverseDims KronQ "
    "RotatedDims",
    roles.Renewed: "Eigenbasis RotatedDims AlternatingInverse Pairs Implicit Position",
    roles.PerStep: "Implicit Position",
    roles.Projects: "RotatedDims",
    roles.OwnOrder: "Eigenbasis RotatedDims AlternatingInverse OneWayDims",
}


class Trace(Representation):
    """``C ~ mean(g * g) I``: nothing but what has to be said."""

    takes = kinds(Gradient)

    @property
    def grain(self) -> Grain:
        return "tensor"

    def init(self, frame: Frame) -> State:
        return {"mean": frame.zeros(), "mass": frame.zeros(), "side": frame.zeros(*frame.shape, 0)}

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        assert isinstance(evidence, Gradient)
        state["mean"].mul_(fold.beta).add_(evidence.gradient.flatten(1).square().mean(1), alpha=fold.alpha)
        fold.weigh_(state["mass"])

    def to_dense(self, state: State) -> Tensor:
        size = state["side"].shape[1:-1].numel()
        return torch.diag_embed(average(state["mean"], state["mass"]).unsqueeze(1).expand(-1, size))


class Scaled(Trace):
    """The same, with its diagonal."""

    def diagonal(self, state: State) -> Tensor:
        return average(state["mean"], state["mass"]).view(-1, 1, 1).expand(*state["side"].shape[:-1])


def frame(*shape: int, stack: int = 2) -> Frame:
    return Frame(stack, shape, frozenset(), torch.float64, torch.device("cpu"))


# --- names ----------------------------------------------------------------------------------------------------------------
def test_eight_names_have_to_be_known() -> None:
    said = {*vars(Representation), *Representation.__annotations__}
    assert {name for name in said if not name.startswith("_")} == TO_KNOW
    assert Representation.__abstractmethods__ == {"grain", "init", "update", "to_dense"}


def test_what_has_to_be_said_is_enough() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False).double()
    g = torch.randn(2, 3).double()
    model.weight.grad = g.clone()
    maker = CustomGradientMaker(model, CustomGradientConfig(curvature=BatchGradient(), representation=Trace(), solver=CG()))
    maker.precondition()
    expected = g / (g.square().mean() + 1e-3)
    assert oracles.relative_error(model.weight.grad, expected) < 1e-10


def test_who_plays_no_role_is_treated_as_a_stack_of_matrices() -> None:
    held: Any = Trace()
    assert not any(isinstance(held, role) for role in PLAYED)
    state = held.init(frame(2, 3))
    assert (roles.renewal(held), roles.has_refresh(held), roles.skips_first(held), roles.groups_rows(held)) == (
        "refresh",
        False,
        False,
        False,
    )
    copy, same = roles.duplicate(held, state), roles.snapshot(held, state)
    assert same is not state and all(same[k] is x for k, x in state.items())
    assert all(copy[k] is not x and torch.equal(copy[k], x) for k, x in state.items())
    roles.release(held, state)
    assert state.keys() == same.keys()
    P = torch.randn(2, 6, 6).double()
    assert roles.widen(held, state, P) is P


# --- who plays them -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("role", PLAYED, ids=lambda role: role.__name__)
def test_who_plays_a_role(role: type) -> None:
    assert {name for name, kind in REPRESENTATIONS.items() if issubclass(kind, role)} == set(PLAYED[role].split())


def test_every_role_is_known_here() -> None:
    found = {each for name in roles.__all__ if isinstance(each := getattr(roles, name), type)}
    assert found == set(PLAYED)


# --- sizes ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("held", "side"),
    [(Dense(), 24), (TriangularQ(granularity="layer"), 24), (GaussianGraph("full"), 24), (KronPairs(), 6), (Trace(), 24)],
    ids=lambda x: type(x).__name__ if isinstance(x, Representation) else "",
)
def test_a_matrix_that_is_too_large_is_refused(held: Any, side: int) -> None:
    assert roles.diagonal_axes(held, (4, 6), side) == frozenset()
    said = f"would hold a {side} x {side} matrix for a block of shape .4, 6.: raise max_dim .now {side - 1}., leave .* ignore="
    with pytest.raises(ValueError, match=rf"{type(held).__name__}\({held.grain}\) {said}"):
        roles.diagonal_axes(held, (4, 6), side - 1)


@pytest.mark.parametrize("name", [n for n, kind in REPRESENTATIONS.items() if issubclass(kind, roles.Compact)])
def test_what_is_compact_holds_no_matrix_of_a_block(name: str) -> None:
    """Twenty vectors and some numbers at most, and matrices of the side that it says; a matrix would be 2000 vectors."""
    held: Any = REPRESENTATIONS[name]()
    shape = (2000,) if held.grain == "full" else (100, 20)
    limit = 25 * 2000 + 2 * held.largest_side(shape) ** 2
    assert sum(x.numel() for x in held.init(frame(*shape, stack=1)).values()) < limit < 2000**2


def test_a_diagonal_of_ones_own_is_never_too_large() -> None:
    model = nn.Linear(40, 30, bias=False)

    def config(held: Representation) -> CustomGradientConfig:
        return CustomGradientConfig(curvature=BatchGradient(), representation=held, solver=CG(), max_dim=3)

    assert CustomGradientMaker(model, config(Scaled())).plan.blocks[0].frame.diagonal == frozenset()
    with pytest.raises(ValueError, match=r"Trace\(tensor\) would hold a 1200 x 1200 matrix"):
        CustomGradientMaker(model, config(Trace()))


def test_long_axes_of_factors_are_diagonals() -> None:
    assert roles.diagonal_axes(Kron(), (4, 6), 5) == {1}
    assert roles.diagonal_axes(Eigenbasis(), (4, 6), 3) == {0, 1}
    blocks: tuple[Any, ...] = (Kron(wide_sides="blocks"), Eigenbasis(wide_sides="blocks"), KronRows())
    assert all(roles.diagonal_axes(held, (4, 6), 3) == frozenset() for held in blocks)
    assert roles.diagonal_axes(KronQ(max_skew=0.5), (2, 6), 100) == {1}


@pytest.mark.parametrize("held", [OneSided(), ZeroHistory()], ids=lambda x: type(x).__name__)
def test_an_operator_on_rows_is_widened_by_the_identity(held: Any) -> None:
    state, P = held.init(frame(3, 4)), torch.randn(2, 3, 3).double()
    expected = torch.stack([torch.kron(p, torch.eye(4).double()) for p in P])
    assert torch.equal(roles.widen(held, state, P), expected)


# --- states ---------------------------------------------------------------------------------------------------------------
def test_products_are_in_copies_and_end_with_the_step() -> None:
    held = Implicit()
    state = held.init(frame(3, stack=1))
    held.update(state, Product(lambda v: 2 * v), Fold(1.0, 1.0, 1.0))
    copy, cache, v = roles.duplicate(held, state), roles.snapshot(held, state), torch.ones(1, 3).double()
    held.update(copy, Product(lambda v: v), Fold(1.0, 1.0, 0.0))
    assert torch.equal(held.matvec(cache, v), 2 * v) and torch.equal(held.matvec(copy, v), 3 * v)
    roles.release(held, state)
    for gone in (state, cache):
        with pytest.raises(RuntimeError, match="that is over"):
            held.matvec(gone, v)
    assert torch.equal(held.matvec(copy, v), 3 * v)
    loaded = roles.duplicate(held, dict(state))  # as a checkpoint has it
    held.update(loaded, Product(lambda v: 4 * v), Fold(1.0, 1.0, 1.0))
    assert torch.equal(held.matvec(loaded, v), 4 * v)


@pytest.mark.parametrize(
    "held, evidence",
    [
        (KronRows(), Outer(torch.ones(1, 2, 1, 3).double(), torch.ones(1, 1, 2, 1, 2).double())),
        (KronRows(), Outer(OneHot(torch.tensor([[1], [2]]), 3), torch.ones(1, 1, 2, 1, 2).double())),
        (KronRows(), Outer(torch.ones(1, 2, 1, 3).double(), torch.ones(0, 1, 2, 1, 2).double(), kind="inputs")),
        (Rows(granularity="layer"), Outer(torch.ones(1, 2, 1, 3).double(), torch.ones(1, 1, 2, 1, 2).double())),
        (Window(), Gradient(torch.ones(1, 2, 3).double())),
    ],
    ids=["KronRows", "one-hot", "inputs", "Rows", "Window"],
)
def test_an_update_of_a_copy_of_what_is_unstacked_leaves_the_original(held: Any, evidence: Any) -> None:
    one_hot = isinstance(getattr(evidence, "inputs", None), OneHot)
    state = held.init(replace(frame(2, 3, stack=1), diagonal=frozenset({1} if one_hot else ())))
    for fold in (Fold(0.0, 1.0, 1.0), Fold(1.0, 0.5, 0.0), Fold(0.0, 1.0, 1.0)):  # two micro-batches, and the next step
        before, copy = {k: x.clone() for k, x in state.items()}, roles.duplicate(held, state)
        held.update(copy, evidence, fold)
        assert state.keys() == before.keys() and all(torch.equal(x, before[k]) for k, x in state.items())
        state = copy


# --- times ----------------------------------------------------------------------------------------------------------------
def test_when_a_cache_is_prepared_anew() -> None:
    expected: dict[Any, str] = {
        Eigenbasis(): "measurement",
        RotatedDims(): "measurement",
        AlternatingInverse(): "refresh",
        AlternatingInverse(published=True): "measurement",
        CrossDims(): "refresh",
        KronQ(): "refresh",
        Pairs(): "step",
        Implicit(): "step",
        Position(): "step",
    }
    assert {held: roles.renewal(held) for held in expected} == expected


@pytest.mark.parametrize("held", [Pairs(granularity="layer"), TriangularQ(granularity="layer")], ids=lambda x: type(x).__name__)
def test_what_is_applied_is_no_copy(held: Any) -> None:
    state = held.init(frame(2, 3))
    cache = Apply().prepare(held, state, None)
    assert all(cache[k] is x for k, x in state.items())


def test_what_depends_on_options() -> None:
    assert roles.skips_first(RotatedDims(skip_first=True)) and not roles.skips_first(RotatedDims())
    assert not roles.skips_first(Eigenbasis())
    grouped: tuple[Any, ...] = (
        Kron(sharing="reduce"),
        Eigenbasis(sharing="reduce"),
        KronRows(),
        KronRows(reduction="subsample"),
    )
    assert all(map(roles.groups_rows, grouped))
    plain: tuple[Any, ...] = (Kron(), Eigenbasis(), KronRows(reduction="none"), Dense())
    assert not any(map(roles.groups_rows, plain))
    slow = {name for name, kind in REPRESENTATIONS.items() if roles.has_refresh(kind())}
    assert slow == {"RotatedDims", "Eigenbasis", "AlternatingInverse", "OneWayDims", "CrossDims"}
