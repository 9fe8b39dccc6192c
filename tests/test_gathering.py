"""Members of a block give their evidence by one call: what is stacked, what is not, and how many operations it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradmaker import METHODS, from_config, maker as maker_module
from gradmaker.blocks import Block
from gradmaker.curvature.evidence import Evidence, Gradient, OneHot, Outer, Pair
from gradmaker.gathering import STACK_LIMIT, Piece, picked, placed, stacked
from gradmaker.linalg.state import State
from gradmaker.representations import Diagonal, Eigenbasis, Kron, KronDims, RotatedDims
from gradmaker.representations.base import Fold, Frame, Representation

STEP = Fold(0.9, 0.1, 0.1)
MANY, SIDE, BATCH = 48, 64, 8


# --- stacks ---------------------------------------------------------------------------------------------------------------
def outer(n: int = 4, weights: Tensor | None = None, **options: Any) -> Outer:
    return Outer(torch.randn(1, n, 2, 3).double(), torch.randn(1, 1, n, 2, 5).double(), weights=weights, **options)


def pieces(evidence: list[Evidence]) -> list[Piece]:
    return [Piece((f"m{k}",), (slice(k, k + 1),), e) for k, e in enumerate(evidence)]


def groups(evidence: list[Evidence], fold: Any = lambda piece: STEP) -> list[tuple[str, ...]]:
    return sorted(piece.names for piece, _ in stacked(pieces(evidence), fold))


def test_what_agrees_is_one_piece() -> None:
    weights = torch.ones(4, 2).double()
    same: list[list[Evidence]] = [
        [outer(), outer(), outer()],
        [outer(weights=weights), outer(weights=weights)],
        [Gradient(torch.randn(1, 3, 2)), Gradient(torch.randn(2, 3, 2))],
        [Pair(torch.randn(1, 3), torch.randn(1, 3)), Pair(torch.randn(1, 3), torch.randn(1, 3))],
    ]
    for evidence in same:
        assert groups(evidence) == [tuple(f"m{k}" for k in range(len(evidence)))]


def test_what_differs_stays_apart() -> None:
    index = torch.zeros(4, 2, dtype=torch.int64)
    apart: list[list[Evidence]] = [
        [outer(), outer(5)],
        [outer(), outer(bias=True)],
        [outer(), replace(outer(), fresh=False)],
        [outer(weights=torch.ones(4, 2)), outer(weights=torch.ones(4, 2))],  # equal or not would be a host read
        [Outer(OneHot(index, 3), torch.randn(1, 1, 4, 2, 5))] * 2,
        [Gradient(torch.randn(1, 3, 2)), Gradient(torch.randn(1, 2, 3))],
        [Gradient(torch.randn(1, 3)), Gradient(torch.randn(1, 3).double())],
        [Gradient(torch.randn(1, STACK_LIMIT, STACK_LIMIT + 1))] * 2,
    ]
    for evidence in apart:
        assert groups(evidence) == [("m0",), ("m1",)]
    folds = {"m0": STEP, "m1": replace(STEP, first=True), "m2": STEP}
    assert groups([outer(), outer(), outer()], lambda piece: folds[piece.names[0]]) == [("m0", "m2"), ("m1",)]


def test_large_operands_are_let_go_of_before_the_next_are_made() -> None:
    made: list[str] = []

    def lazily() -> Any:
        for piece in pieces([Gradient(torch.randn(1, STACK_LIMIT + 1, STACK_LIMIT + 1))] * 3):
            made.append(piece.names[0])
            yield piece

    seen = []
    for piece, _ in stacked(lazily(), lambda piece: STEP):
        seen.append((piece.names[0], list(made)))
    assert seen == [("m0", ["m0"]), ("m1", ["m0", "m1"]), ("m2", ["m0", "m1", "m2"])]


@pytest.mark.parametrize("present", [[0, 1, 2, 3], [1, 2], [0, 2], [3, 0]])
def test_parts_of_a_stack(present: list[int]) -> None:
    state = {"a": torch.arange(8.0).reshape(4, 2), "b": torch.arange(4)}
    slots = [slice(k, k + 1) for k in sorted(present)]
    part = picked(state, slots)
    for value in part.values():
        value.add_(100)
    placed(state, slots, part)
    changed = torch.tensor([k in present for k in range(4)])
    assert torch.equal(state["b"], torch.arange(4) + 100 * changed)
    assert torch.equal(state["a"], torch.arange(8.0).reshape(4, 2) + 100 * changed[:, None])


KINDS: dict[str, tuple[Representation, Any]] = {
    "kron": (Kron(), outer),
    "kron_reduce": (Kron(sharing="reduce"), outer),
    "eigenbasis": (Eigenbasis(), outer),
    "diagonal": (Diagonal(granularity="layer"), outer),
    "dims": (KronDims(), lambda: Gradient(torch.randn(1, 5, 3).double())),
    "rotated": (RotatedDims(), lambda: Gradient(torch.randn(1, 5, 3).double())),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("present", [[0, 1, 2], [0, 2], [2]])
def test_one_call_is_as_many(name: str, present: list[int]) -> None:
    """Every member gets its own evidence, and the others nothing."""
    representation, make = KINDS[name]
    frame = Frame(3, (5, 3), frozenset(), torch.float64, torch.device("cpu"))
    together, apart = representation.init(frame), representation.init(frame)
    for index, members in enumerate(([0, 1, 2], present)):
        fold = STEP.of(again=False, first=index == 0)
        given = [Piece((f"m{k}",), (slice(k, k + 1),), make()) for k in members]
        calls = list(stacked(given, lambda piece: fold))  # noqa: B023
        assert len(calls) == 1
        for state, taken in ((together, [piece for piece, _ in calls]), (apart, given)):
            for piece in taken:
                part = picked(state, piece.slots)
                representation.update(part, piece.evidence, fold)
                placed(state, piece.slots, part)
    for key, value in together.items():
        torch.testing.assert_close(value, apart[key], rtol=1e-12, atol=1e-14)


# --- operations -----------------------------------------------------------------------------------------------------------
class Operations(TorchDispatchMode):
    """Counts what is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view:
            self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Counted:
    """Of every step: what blocks dispatch, and how often a representation is called. Capture is not among it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.steps: list[int] = []
        self.updates = 0
        for name in ("writable", "update", "prepare", "solve", "read", "assign"):
            patch.setattr(Block, name, self.counting(name, getattr(Block, name)))
        patch.setattr(maker_module, "_write", self.counting("write", maker_module._write))

    def counting(self, name: str, original: Any) -> Any:
        def call(*args: Any) -> Any:
            if name == "update":
                args = (*args[:2], {**args[2]}, *args[3:])  # evidence is made before
            with Operations() as operations:
                result = original(*args)
            self.steps[-1] += operations.names.total()
            return result

        return call

    def of(self, method: str, layers: int, bias: bool) -> list[int]:
        """A few steps, idle ones, measured and refreshed ones among them."""
        torch.manual_seed(0)
        model = nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(SIDE, SIDE, bias=bias), nn.Tanh())))
        options = {"curvature_interval": 2, "preconditioner_interval": 3, "warmup_steps": 0, "stagger": False}
        maker: Any = from_config(model, {"method": method, **options})
        x, t, self.steps = torch.randn(BATCH, SIDE), torch.randint(SIDE, (BATCH,)), []
        for _ in range(8):
            self.steps.append(0)
            model.zero_grad()
            maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), t)
            maker.forward_and_backward()
        return self.steps


@pytest.mark.parametrize("method, bias", [(m, False) for m in ("kfac", "shampoo", "soap", "adam", "ekfac")] + [("kfac", True)])
def test_48_layers_take_hardly_more_operations_than_one(method: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    one, many = counted.of(method, 1, bias), counted.of(method, MANY, bias)
    assert min(one) > 0
    for step, (a, b) in enumerate(zip(one, many, strict=True)):
        assert b <= a + 12, (step, a, b)  # operands are stacked, gradients are read; one layer folds at the end of a step
    for step in (0, 6):  # all that a step can have
        assert many[step] <= 1.2 * one[step]
    assert sum(many) <= 1.2 * sum(one)


@pytest.mark.parametrize("method", ["kfac", "shampoo", "soap"])
def test_one_call_a_block_and_measurement(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)), nn.Linear(4, 3))
    maker: Any = from_config(model, {"method": method, "warmup_steps": 0})
    for kind in {type(b.triple.representation) for b in maker.plan.blocks}:
        original = kind.update

        def update(self: Any, state: State, evidence: Evidence, fold: Fold, original: Any = original) -> None:
            calls.append(len(next(iter(state.values()))))
            original(self, state, evidence, fold)

        monkeypatch.setattr(kind, "update", update)
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, torch.randn(5, 4)), torch.randint(3, (5,)))
    maker.forward_and_backward()
    late = method == "shampoo"  # whose tensors alone enter the statistic by `fold`, at the end of the step
    expected = [b.frame.stack for b in maker.plan.blocks if not late or b.frame.stack > 1]
    assert sorted(calls) == sorted(expected) and max(calls) == 6


# --- gradients ------------------------------------------------------------------------------------------------------------
def layers() -> dict[str, nn.Module]:
    return {
        "joint": nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))),
        "plain": nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3))),
        "norms": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4), nn.LayerNorm((4,), bias=False)),
        "channels_last": nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
    }


@pytest.mark.parametrize("name", layers())
@pytest.mark.parametrize("method", ["kfac", "shampoo", "adam"])
@pytest.mark.parametrize("missing", [False, True])
def test_what_is_read_is_written_back(name: str, method: str, missing: bool) -> None:
    """In one tensor, block by block as each site lays it out; the storage stays."""
    model = layers()[name].double()
    options: dict[str, Any] = {"block_size": 3, "merge": "to_2d"} if method == "shampoo" else {}
    maker: Any = METHODS[method](model, METHODS[method].Config(**options))
    for k, p in enumerate(model.parameters()):
        p.grad = None if missing and k == 0 else torch.randn_like(p)
    before = {p: (p.grad, p.grad.clone(), p.grad.data_ptr()) for p in model.parameters() if p.grad is not None}
    into: dict[nn.Parameter, Tensor] = {}
    for block in maker.plan.blocks:
        value = block.read({})
        if value is None:
            assert all(site.read() is None for site in block.sites)
            continue
        for site, slot in zip(block.sites, block.slots, strict=True):
            own = site.read()
            expected = torch.zeros_like(value[slot]) if own is None else own.reshape(value[slot].shape)
            assert torch.equal(value[slot], expected)
        block.assign(replace(block.held, ready=frozenset(s.name for s in block.sites)), 2 * value, {}, into)
    for p, (grad, was, where) in before.items():
        assert p.grad is grad and grad.data_ptr() == where and torch.equal(grad, was)  # written at the end of a step alone
        assert torch.equal(into[p], 2 * was)


def test_members_of_one_block_by_name() -> None:
    """Not only shapes: the first member has the first site's numbers."""
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3))).double()
    maker: Any = from_config(model, {"method": "shampoo", "decay": 0.0, "grafting": "none", "warmup_steps": 1})
    for k, p in enumerate(model.parameters()):
        p.grad = (k + 1.0) * torch.eye(2, dtype=torch.float64)
    maker.precondition()
    (block,) = maker.plan.blocks
    sizes: Mapping[str, float] = {s.name: float(block.state["factor_0"][k, 0, 0]) for k, s in enumerate(block.sites)}
    assert sizes == {"0.weight": 1.0, "1.weight": 4.0, "2.weight": 9.0}
