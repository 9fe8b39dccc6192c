"""Each method of a plan has clocks of its own: beside another one it does what it does alone, to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmaker import from_config
from gradmaker.block_options import BlockOptions
from gradmaker.placement import Placement
from gradmaker.planned import PlannedMaker
from gradmaker.schedule import Linear, Stepped
from gradmaker.stacking import build_blocks
from tests import oracles
from tests.models import Case
from tests.test_state import batch, equal_states, through_file

STEPS = 25


class Mixed(nn.Module):
    """Layers that have Kronecker factors, several of a shape, and tensors that have none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.scale, self.mix = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.eye(6) + 0.1 * torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)) * self.scale @ self.mix
        h = torch.tanh(self.third(torch.tanh(self.second(h))))
        y: Tensor = self.head(h)
        return y


LAYERS, REST = ("first", "second", "third", "head"), ("scale", "mix")


def mixed() -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Mixed().double()
        return Case(model, torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,)), F.cross_entropy)


def step(maker: Any, case: Case, index: int, shift: bool = True) -> dict[str, Tensor]:
    """The gradients that it makes; the weights move by a rule that knows no maker."""
    case.model.zero_grad(set_to_none=True)
    x, t = batch(case, index)
    maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, x), t)
    maker.forward_and_backward()
    made = {k: p.grad.clone() for k, p in case.model.named_parameters() if p.grad is not None}
    generator = torch.Generator().manual_seed(index)
    with torch.no_grad():
        for p in case.model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.05)
    return made


AT_ONCE = {"warmup_steps": 0}
METHODS: dict[str, dict[str, Any]] = {
    "kfac": {"method": "kfac", "curvature_interval": 10, "preconditioner_interval": 5, **AT_ONCE},
    "kfac after a warm-up": {"method": "kfac", "curvature_interval": 7, "preconditioner_interval": 7, "warmup_steps": 3},
    "kfac at once": {"method": "kfac", "curvature_interval": 10, "preconditioner_interval": 4, "stagger": False, **AT_ONCE},
    "kfac by schedules": {
        "method": "kfac",
        "curvature_interval": Linear(first=1, last=6, total=10),
        "preconditioner_interval": Stepped(milestones={0: 2, 9: 5}),
        **AT_ONCE,
    },
    "kbfgs": {"method": "kbfgs", "curvature_interval": 4, "preconditioner_interval": 4, **AT_ONCE},
    "ekfac": {"method": "ekfac", "curvature_interval": 3, "preconditioner_interval": 10, **AT_ONCE},
    "smw_ng": {"method": "smw_ng", "curvature_interval": 3, "preconditioner_interval": 3},
}
TENSORS = ["adam", "adagrad", "shampoo", "soap", "one_sided", "kl_shampoo", "muon", "psgd_whiten", "unit_ng"]
WHOLE = ["full_ng", "newton", "lbfgs"]
"""One block for all that is left: it has the name of the other's, if that is one block too, and a word more."""
WHOLE_PASSES = ["newton", "lbfgs"]
"""They differentiate a pass or repeat it, so that no gradient is held by rows in a step that they measure."""


@pytest.mark.parametrize("fallback", TENSORS + WHOLE)
@pytest.mark.parametrize("name", METHODS)
def test_two_methods_are_each_what_they_are_alone(name: str, fallback: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fallback in WHOLE_PASSES:  # formed gradients and rows are rounded differently: see the next test
        monkeypatch.setattr(PlannedMaker, "row_layers", lambda self: [])
    both, left, right = mixed(), mixed(), mixed()
    options = METHODS[name]
    makers: list[Any] = [
        from_config(both.model, {**options, "fallback": fallback}),
        from_config(left.model, {**options, "ignore": REST}),
        from_config(right.model, {"method": fallback, "ignore": LAYERS}),
    ]
    for index in range(STEPS):
        found, own, other = (step(m, c, index) for m, c in zip(makers, (both, left, right), strict=True))
        for key, g in found.items():
            assert torch.equal(g, (other if key in REST else own)[key]), (index, key)
    sites = [maker.state_dict()["sites"] for maker in makers]
    renamed = {f"{k}, fallback" if k == "full" else k: v for k, v in sites[2].items()}
    assert equal_states(sites[0], {**sites[1], **renamed})


@pytest.mark.parametrize("fallback", WHOLE_PASSES)
def test_rows_give_way_to_a_method_that_needs_the_whole_pass(fallback: str) -> None:
    """Beside it the gradients are formed: the same to rounding, which a damping near the curvature does not magnify."""
    both, left = mixed(), mixed()
    options = {**METHODS["smw_ng"], "damping": 0.1}
    makers: list[Any] = [
        from_config(both.model, {**options, "fallback": fallback}),
        from_config(left.model, {**options, "ignore": REST}),
    ]
    for index in range(7):
        found, own = (step(m, c, index) for m, c in zip(makers, (both, left), strict=True))
        for key in (key for key in found if key not in REST):
            assert oracles.relative_error(found[key], own[key]) < 1e-12, (index, key)


@pytest.mark.parametrize("fallback", ["adam", "shampoo", "unit_ng"])
def test_resuming_with_two_pairs_of_clocks_is_bitwise(fallback: str, tmp_path: Path) -> None:
    options = {"method": "kfac", "curvature_interval": 4, "preconditioner_interval": 3, "warmup_steps": 2, "fallback": fallback}
    straight = mixed()
    reference = from_config(straight.model, options)
    saved = []
    for index in range(12):
        saved.append((copy.deepcopy(straight.model), through_file(reference.state_dict(), tmp_path)))
        expected = step(reference, straight, index)
    for start, (model, state) in enumerate(saved):
        case, maker = straight._replace(model=model), from_config(model, options)
        maker.load_state_dict(state)
        for index in range(start, 12):
            found = step(maker, case, index)
        assert all(torch.equal(found[k], g) for k, g in expected.items()), start
        assert equal_states(maker.state_dict(), reference.state_dict()), start


def test_two_full_blocks_have_a_place_each() -> None:
    case = mixed()
    maker: Any = from_config(case.model, {"method": "smw_ng", "fallback": "full_ng"})
    step(maker, case, 0)
    assert list(maker.state_dict()["sites"]) == ["full", "full, fallback"]
    other: Any = from_config(case.model, {"method": "smw_ng", "fallback": "full_ng"})
    other.load_state_dict(maker.state_dict())
    assert equal_states(other.state_dict(), maker.state_dict())


def test_both_pairs_of_clocks_are_saved() -> None:
    case = mixed()
    maker: Any = from_config(case.model, {"method": "kfac", "curvature_interval": 10, "fallback": "adam", **AT_ONCE})
    for index in range(3):
        step(maker, case, index)
    clocks = maker.state_dict()["clocks"]
    assert {name: c["measure"]["next"] for name, c in clocks.items()} == {"method": 10, "fallback": 3}
    alone: Any = from_config(case.model, {"method": "kfac", "curvature_interval": 10})
    with pytest.raises(ValueError, match=r"unknown \['mix', 'scale'\]|clocks: missing \[\], unknown \['fallback'\]"):
        alone.load_state_dict(maker.state_dict())


@contextmanager
def failing(maker: Any, method: str) -> Iterator[None]:
    """One method's curvature gives no evidence."""
    owner = type(next(b for b in maker.plan.blocks if b.options.method == method).triple.curvature)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, "measure", lambda self, step: iter(()))
        yield


@pytest.mark.parametrize(("method", "due"), [("method", (1, 20)), ("fallback", (5, 1))])
def test_what_came_to_nothing_is_made_up_for_by_its_own_method(method: str, due: tuple[int, int]) -> None:
    """ESGD's own interval is 20."""
    case = mixed()
    maker: Any = from_config(case.model, {"method": "kfac", "curvature_interval": 5, "fallback": "esgd", **AT_ONCE})
    with failing(maker, method):
        step(maker, case, 0)
    assert tuple(clocks["measure"]["next"] for clocks in maker.state_dict()["clocks"].values()) == due
    step(maker, case, 1)
    assert maker.silent() == []


def test_a_step_on_which_only_the_fallback_measures_records_no_pass() -> None:
    case = mixed()
    tapes: list[int] = []
    maker: Any = from_config(case.model, {"method": "kfac", "curvature_interval": 4, "fallback": "adam", **AT_ONCE})
    make = maker.new_tape
    maker.new_tape = lambda: tapes.append(maker.step) or make()
    for index in range(9):
        step(maker, case, index)
    assert tapes == [0, 4, 8]


def test_a_pass_is_recorded_for_the_layers_of_those_that_are_due() -> None:
    """A fallback that measures a pass as well does not have the layers of the others measured with it."""
    case = mixed()
    maker: Any = from_config(case.model, {"method": "kbfgs", "curvature_interval": 3, "fallback": "unit_ng", **AT_ONCE})
    measured: list[tuple[int, list[str]]] = []
    made = maker._step

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen = made(*args, **kwargs)
        if seen.tape.calls:
            measured.append((seen.index, [site.name for site in seen.sites]))
        return seen

    maker._step = noted
    for index in range(4):
        step(maker, case, index)
    expected = [(index, list(REST)) for index in range(4)] + [(index, list(LAYERS)) for index in (0, 3)]
    assert sorted(measured) == sorted(expected)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_attached_the_fallback_follows_its_own_clocks(accumulation: int) -> None:
    found = []
    for options in ({"method": "kfac", "curvature_interval": 10, "fallback": "adam", **AT_ONCE}, {"method": "adam"}):
        case = mixed()
        ignore = LAYERS if options["method"] == "adam" else ()
        maker: Any = from_config(case.model, {**options, "ignore": ignore})
        optimizer = torch.optim.SGD([case.model.scale, case.model.mix], 0.1)  # type: ignore[list-item]
        maker.attach(optimizer, "categorical", accumulation=accumulation)
        for index in range(12):
            optimizer.zero_grad()
            for part in range(accumulation):
                x, t = batch(case, index + 100 * part)
                (case.loss(case.model(x), t) / accumulation).backward()
            optimizer.step()
            for p in case.model.head.parameters():  # type: ignore[union-attr]
                p.grad = None
        found.append([case.model.get_parameter(name).detach() for name in REST])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_blocks_of_two_methods_are_never_one() -> None:
    """Equal parts of equal tensors: each is spread over the period of its own method."""
    case = mixed()
    maker: Any = from_config(case.model, {"method": "shampoo", "ignore": REST})
    plan = maker.plan
    sites = [s for b in plan.blocks for s in b.sites]
    triple = plan.blocks[0].triple
    placed = [Placement(s, triple, BlockOptions(method=m)) for m in ("method", "fallback") for s in sites]
    blocks = build_blocks(placed)
    half = len(blocks) // 2
    assert [b.options.method for b in blocks] == ["method"] * half + ["fallback"] * half
    assert [b.share for b in blocks[:half]] == [b.share for b in blocks[half:]]
