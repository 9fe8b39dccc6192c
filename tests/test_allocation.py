"""Making a maker allocates its state and little besides; what a step holds is not more than what it was made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import METHODS
from gradmaker.curvature.recursive import _derivative_moment
from gradmaker.representations.base import Frame
from gradmaker.step.draft import Draft, Work
from tests.live import Live

NAMED = [name for name in METHODS if name != "gradient"]
LONG = 9000
"""More than `max_dim`: a matrix of that side is 309 MiB."""
MODELS: dict[str, Callable[[], nn.Module]] = {
    "long embedding": lambda: nn.Embedding(LONG, 16),
    "long inputs": lambda: nn.Linear(LONG, 8),
    "long outputs": lambda: nn.Linear(8, LONG),
    "long vector": lambda: nn.LayerNorm(LONG),
    "sides that are held": lambda: nn.Linear(500, 400),
    "inputs that are held": lambda: nn.Linear(700, 8),
    "outputs that are held": lambda: nn.Linear(8, 700),
    "embedding that is held": lambda: nn.Embedding(600, 16),
    "one block": lambda: nn.Linear(24, 25),
    "stacked": lambda: nn.Sequential(*[nn.Linear(100, 100) for _ in range(8)]),
}
EASE = 1.3
SLACK = 1 << 18
"""Bytes: of what is smaller than this nothing is asked."""


def held(maker: Any) -> int:
    """Bytes of all state of a maker."""
    states = [s for b in maker.plan.blocks for s in (b.state, b.cache, b.grafting_state, b.average)]
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for s in states for x in s.values()}
    return sum(storages.values())


@pytest.mark.parametrize("method", NAMED)
def test_making_a_maker_allocates_its_state_alone(method: str) -> None:
    """No unit matrix, no copy, for any axis, is made and thrown away."""
    accepted = 0
    for name, make in MODELS.items():
        model, config = make(), METHODS[method].Config()
        with Live() as live:
            try:
                maker = METHODS[method](model, config)
            except ValueError:
                continue
        accepted += 1
        assert live.peak <= EASE * held(maker) + SLACK, f"{name}: {live.peak} bytes at once for {held(maker)} of state"
        assert live.now <= held(maker) + SLACK, f"{name}: {live.now} bytes stay for {held(maker)} of state"
    assert accepted, "refuses all models: add one that it accepts"


@pytest.mark.parametrize("side", [1, 7])
@pytest.mark.parametrize("value", [1.0, 0.5])
def test_unit_matrices_of_a_stack(side: int, value: float) -> None:
    frame = Frame(3, (side, side), frozenset(), torch.float64, torch.device("cpu"))
    with Live() as live:
        found = frame.unit(side, value)
    assert torch.equal(found, value * torch.eye(side, dtype=torch.float64).expand(3, -1, -1))
    assert live.peak == found.untyped_storage().nbytes() == 3 * side * side * 8


def test_recursion_ends_at_the_lowest_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """KFRA's factor of the outputs is pulled through every layer but the lowest, whose inputs may be many."""
    sides: list[int] = []

    def moment(*args: Any) -> Tensor:
        found = _derivative_moment(*args)
        sides.append(len(found))
        return found

    monkeypatch.setattr("gradmaker.curvature.recursive._derivative_moment", moment)
    inputs = 1200
    model = nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, 3))
    maker: Any = METHODS["kfra"](model, METHODS["kfra"].Config(max_dim=8))
    with Live() as live:
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, torch.randn(8, inputs)), torch.randint(3, (8,)))
        maker.forward_and_backward()
    assert sides == [3, 6]
    assert live.peak < 2.5 * 4 * inputs**2  # the moment of its inputs, and what is cut from it


# --- what a cache holds of a statistic --------------------------------------------------------------------------------------
INPUTS = 200
SLOW = {"soap": "basis_", "ekfac": "basis_", "kl_shampoo": "basis_", "caspr_adaptive": "root_"}
"""Methods whose statistic has tensors that refreshes alone write to, and how these are named."""
ALIASED = {"soap": ["basis_0", "basis_1"], "ekfac": ["basis_left", "basis_right"], "caspr_adaptive": ["root_0", "root_1"]}
"""Those that the cache holds, in the order of its own names."""


class Made(Live):
    """Bytes of the storages that operations make, one by one; views make none."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view and not func._schema.is_mutable:
            self.sizes.append(out.untyped_storage().nbytes())
        return out


def steps_of(method: str, **options: Any) -> tuple[Any, Callable[[], None]]:
    """A maker that measures at every step and refreshes at every fourth, and what accumulates the batch of a step."""
    torch.manual_seed(0)
    model = nn.Linear(INPUTS, 10, bias=False)
    x, t = torch.randn(16, INPUTS), torch.randint(10, (16,))
    clocks = {"curvature_interval": 1, "preconditioner_interval": 4, "warmup_steps": 0, "stagger": False}
    maker: Any = METHODS[method](model, METHODS[method].Config(**clocks, **options))

    def accumulate() -> None:
        model.zero_grad()
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), t)
        maker.accumulate()

    return maker, accumulate


@pytest.mark.parametrize("method", ["soap", "ekfac", "caspr_adaptive"])
def test_a_measured_step_copies_no_basis(method: str) -> None:
    """Of the matrices of the inputs it copies one, the factor that the step adds to, or none, where it adds in place."""
    maker, accumulate = steps_of(method)
    for step in range(8):
        with Made() as made:
            accumulate()
            maker.precondition()
        if step % 4:
            assert sum(size >= 4 * INPUTS**2 for size in made.sizes) == (method != "soap"), (step, made.sizes)
            assert sum(made.sizes) < 2.5 * 4 * INPUTS**2, step


@pytest.mark.parametrize("method", list(ALIASED))
@pytest.mark.parametrize("loaded", [False, True])
def test_a_cache_holds_the_statistics_own_tensors(method: str, loaded: bool) -> None:
    """A loaded one holds copies, with which the next step is the same, and which it lets go of."""
    maker, accumulate = steps_of(method)
    other, also = steps_of(method)
    (block,) = maker.plan.blocks
    for step in range(6):
        if loaded and step == 3:
            other.load_state_dict(maker.state_dict())
            maker, accumulate, block = other, also, other.plan.blocks[0]
            assert not same_tensors(method, block)
        accumulate()
        maker.precondition()
        assert same_tensors(method, block) or (method == "caspr_adaptive" and loaded and step == 3)  # prepared at refreshes


def same_tensors(method: str, block: Any) -> bool:
    own = [name for name in block.cache if name.startswith(SLOW[method])]
    assert len(own) == len(ALIASED[method])
    pairs = zip(own, ALIASED[method], strict=True)
    return all(block.cache[k].data_ptr() == block.state[name].data_ptr() for k, name in pairs)


class Planted(Exception):
    """Nothing else raises it."""


@pytest.mark.parametrize("method", list(SLOW))
def test_what_is_slow_is_written_to_by_refreshes_alone(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And then in a copy, as everything: an exception leaves it as it was."""
    maker, accumulate = steps_of(method)
    (block,) = maker.plan.blocks
    prepare, failing = type(block).prepare, []

    def failing_once(self: Any, *args: Any) -> Any:
        if failing:
            failing.clear()
            raise Planted
        return prepare(self, *args)

    monkeypatch.setattr(type(block), "prepare", failing_once)
    for step in range(8):
        before = dict(block.state)
        known = {k: (v.clone(), v._version) for k, v in before.items()}
        accumulate()
        failing.append(True)
        with pytest.raises(Planted):
            maker.precondition()
        assert all(block.state[k] is v for k, v in before.items())
        maker.precondition()
        slow = {k for k in before if k.startswith(SLOW[method])}
        kept = slow if method == "soap" else before.keys()  # the factors of SOAP are added to where they lie, last in the step
        assert all(torch.equal(before[k], known[k][0]) and before[k]._version == known[k][1] for k in kept), step
        shared = {k for k in kept if block.state[k] is before[k]}
        assert bool(slow) and (slow <= shared if step % 4 else not shared), (step, shared)


def test_members_apart_share_what_is_slow() -> None:
    """The first and the last of three equal layers bring gradients: parts of a stack that do not lie side by side."""
    model = nn.ModuleList(nn.Linear(6, 5, bias=False) for _ in range(3))
    clocks = {"curvature_interval": 1, "preconditioner_interval": 4, "warmup_steps": 0, "stagger": False}
    maker: Any = METHODS["soap"](model, METHODS["soap"].Config(**clocks))
    (block,) = maker.plan.blocks
    for step in range(7):
        before, versions = dict(block.state), {k: v._version for k, v in block.state.items()}
        for member, layer in enumerate(model):
            layer.weight.grad = None if member == 1 and step != 5 else torch.randn_like(layer.weight)
        maker.precondition()
        assert all(v._version == versions[k] for k, v in before.items())
        assert (block.state["basis_0"] is before["basis_0"]) == (step in (1, 2, 3, 6))


def test_a_draft_copies_what_is_slow_when_a_refresh_comes() -> None:
    """In the middle of a measurement, with what it has written by then."""
    maker, accumulate = steps_of("soap")
    accumulate()
    maker.precondition()
    (block,) = maker.plan.blocks
    draft, before = Draft(Work(), 0), dict(block.state)
    first = draft.writable(block, refresh=False).state
    assert first["basis_0"] is before["basis_0"] and first["factor_0"] is not before["factor_0"] and not draft.owns(block)
    first["factor_0"].zero_()
    assert draft.writable(block, refresh=False).state is first
    second = draft.writable(block).state
    assert second["basis_0"] is not before["basis_0"] and not second["factor_0"].any() and draft.owns(block)
    assert draft.writable(block, refresh=False).state is second and draft.writable(block).state is second
    made: Any = METHODS["kfac"](nn.Linear(3, 2))
    other = made.plan.blocks[0]
    draft.writable(other, refresh=False)
    assert draft.owns(other)
