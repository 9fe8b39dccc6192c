"""Refreshes that fail again and again: the last good root stays, and past a limit there is an error that says which block."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gradmaker import METHODS, failures, from_config
from gradmaker.failures import Failures
from gradmaker.linalg.fallbacks import count_failures
from gradmaker.representations import CrossDims, Dense
from gradmaker.solvers import Cholesky, Gram, NewtonRoot
from tests import models, oracles
from tests.methods.test_kronecker_dims import Matrices, gradients

AT_ONCE: dict[str, Any] = {"preconditioner_interval": 1, "warmup_steps": 0}
ROOTED: list[dict[str, Any]] = [
    {"method": "shampoo", "grafting": "none", **AT_ONCE},
    {"method": "shampoo", "root": "newton", "grafting": "none", **AT_ONCE},
    {"method": "shampoo", "root": "svd", "grafting": "none", **AT_ONCE},
    {"method": "one_sided", "grafting": "none", **AT_ONCE},
    {"method": "caspr", "root": "higher_order", **AT_ONCE},
    {"method": "full_adagrad", **AT_ONCE},
]


def name_of(config: dict[str, Any]) -> str:
    return f"{config['method']}-{config.get('root', '')}"


def feed(maker: Any, model: Any, *gs: Tensor) -> None:
    for p, g in zip(model.w, gs, strict=True):
        p.grad = g.clone()
    maker.precondition()


def two(**config: Any) -> tuple[Any, Any]:
    model = Matrices((3, 4), (3, 4))
    return from_config(model, config), model


def spoil(maker: Any, member: int = 1) -> None:
    """The statistic of one member is no longer finite, and no sum makes it so again."""
    for name, x in maker.plan.blocks[0].state.items():
        if name.startswith(("factor", "matrix", "inverse")):
            x[member] = torch.nan


def roots(maker: Any) -> dict[str, Tensor]:
    return {k: v[1].clone() for k, v in maker.plan.blocks[0].cache.items() if k.startswith(("root_", "basis_", "scale"))}


# --- the limit ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("config", ROOTED, ids=name_of)
@pytest.mark.parametrize("allowed", [0, 2, 3])
def test_one_failure_more_than_allowed_is_an_error(config: dict[str, Any], allowed: int) -> None:
    own = {} if allowed == 3 else {"failures_allowed": allowed}  # the default
    maker, model = two(**config, **own)
    g, h = gradients(3, 4, steps=2)
    feed(maker, model, g, h)
    before = roots(maker)
    spoil(maker)
    for _ in range(allowed):
        feed(maker, model, g, h)
        assert model.w[1].grad.isfinite().all()
    with pytest.raises(RuntimeError) as caught:
        feed(maker, model, g, h)
    text = str(caught.value)
    block = maker.plan.blocks[0]
    assert text.startswith("w.1 (BatchGradient x ") and type(block.triple.solver).__name__ in text
    assert f"at step {allowed + 1} its refresh failed for the {allowed + 1}. time in a row, {allowed + 1} times in all" in text
    assert f"failures_allowed={allowed}; None sets no limit" in text
    assert before.keys() and all(torch.equal(x, before[k]) for k, x in roots(maker).items())  # what was good is still held
    assert block.cache["failing"].tolist() == block.cache["failures"].tolist() == [0, allowed]  # the last one is undone


def test_without_a_limit_it_goes_on() -> None:
    maker, model = two(method="shampoo", grafting="none", failures_allowed=None, **AT_ONCE)
    g, h = gradients(3, 4, steps=2)
    feed(maker, model, g, h)
    before = model.w[1].grad.clone()
    spoil(maker)
    for _ in range(9):
        feed(maker, model, g, h)
        assert torch.equal(model.w[1].grad, before)
    assert maker.plan.blocks[0].cache["failing"].tolist() == [0, 9]


def test_a_success_begins_the_count_again() -> None:
    """With averages that forget at once the statistic of the next gradient is sound."""
    maker, model = two(method="shampoo", grafting="none", decay=0.0, failures_allowed=1, **AT_ONCE)
    g, h = gradients(3, 4, steps=2)
    solver = maker.plan.blocks[0].triple.solver
    original = type(solver).prepare
    for turn in range(6):
        bad = turn % 2

        def prepare(self: Any, representation: Any, state: Any, previous: Any, bad: int = bad) -> Any:
            held = maker.plan.blocks[0].state  # of the last step, which gives again what it gave
            bad = bad and not all(x.data_ptr() == held[k].data_ptr() for k, x in state.items())
            broken = {k: torch.where(torch.tensor(bool(bad)), torch.nan, x) if k != "mass" else x for k, x in state.items()}
            return original(self, representation, broken, previous)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(solver), "prepare", prepare)
            feed(maker, model, g, h)
        assert maker.plan.blocks[0].cache["failing"].tolist() == [bad, bad]
    assert maker.plan.blocks[0].cache["failures"].tolist() == [3, 3]


def test_counters_by_hand() -> None:
    lost, empty = torch.tensor([True, False, True]), torch.tensor([False, False, True])
    first = count_failures(lost, None, empty)
    second = count_failures(lost, first, empty)
    third = count_failures(~lost, second)
    assert [c["failures"].tolist() for c in (first, second, third)] == [[1, 0, 1], [2, 0, 2], [2, 1, 2]]
    assert [c["failing"].tolist() for c in (first, second, third)] == [[1, 0, 0], [2, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize("config", ROOTED, ids=name_of)
def test_a_tensor_that_never_gets_a_gradient_is_no_failure(config: dict[str, Any]) -> None:
    """Its statistic is zero, of which there is no root relative to the largest eigenvalue: counted, and let be."""
    maker, model = two(**config, failures_allowed=0)
    g, h = gradients(3, 4, steps=2)
    for _ in range(5):
        feed(maker, model, g, 0 * h)
        assert torch.equal(model.w[1].grad, 0 * h)
    block = maker.plan.blocks[0]
    assert block.cache["failing"].tolist() == [0, 0] and block.cache["failures"].tolist()[0] == 0


# --- the step that raises -------------------------------------------------------------------------------------------------
def test_the_step_that_raises_leaves_everything_as_it_was() -> None:
    case = models.mlp()
    options = {"damping": 1e-3, "failures_allowed": 0, "curvature_interval": 1, "preconditioner_interval": 1, "warmup_steps": 0}
    maker: Any = from_config(case.model, {"method": "kfac", "decay": None, **options})

    def step() -> None:
        maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
        maker.forward_and_backward()

    step()
    before = oracles.gradient_vector(case.model)
    block = maker.plan.blocks[0]
    for name, x in block.state.items():
        if not name.endswith("mass"):
            x.fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r"Cholesky.*failed for the 1. time in a row"):
        step()
    assert torch.equal(oracles.gradient_vector(case.model), before) and maker.step == 1


def test_counters_are_saved() -> None:
    config = {"method": "shampoo", "grafting": "none", "failures_allowed": 2, **AT_ONCE}
    maker, model = two(**config)
    other, twin = two(**config)
    g, h = gradients(3, 4, steps=2)
    feed(maker, model, g, h)
    spoil(maker)
    for _ in range(2):
        feed(maker, model, g, h)
    file = io.BytesIO()
    torch.save(maker.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.plan.blocks[0].cache["failing"].tolist() == [0, 2]
    for each, its in ((maker, model), (other, twin)):
        with pytest.raises(RuntimeError, match=r"w\.1 .* 3\. time in a row, 3 times in all"):
            feed(each, its, g, h)


# --- factorisations that are part of the statistic --------------------------------------------------------------------------
HELD: list[dict[str, Any]] = [
    {"method": "kl_shampoo", "preconditioner_interval": 1},
    {"method": "kradagrad", "preconditioner_interval": 1},
    {"method": "soap", "preconditioner_interval": 1},
    {"method": "eshampoo", "tracking": "eigh", "tolerance": 0.0},
    {"method": "caspr_adaptive", "preconditioner_interval": 1, "start_step": 0},
]


@pytest.mark.parametrize("config", HELD, ids=name_of)
def test_bases_that_a_statistic_holds_are_counted_too(config: dict[str, Any]) -> None:
    maker, model = two(**config, failures_allowed=2)
    steps = gradients(3, 4, steps=14)
    feed(maker, model, *steps[:2])
    feed(maker, model, *steps[2:4])
    state = maker.plan.blocks[0].state
    held = [k for k in state if k.startswith(("basis_", "root_"))]
    before = {k: state[k][1].clone() for k in held}
    for k in ("factor_0", "inverse_0"):
        if k in state:
            state[k][1] = torch.nan
    with pytest.raises(RuntimeError, match=r"^w\.1 \(BatchGradient x .* 3\. time in a row, 3 times in all"):
        for k in range(4, 14, 2):
            feed(maker, model, *steps[k : k + 2])
            assert all(p.grad.isfinite().all() for p in model.w)
    state = maker.plan.blocks[0].state
    assert torch.equal(state["basis_0" if "basis_0" in state else "root_0"][1], before[held[0]])
    assert state["failures"].tolist() == [0, 2]  # the last one is undone with its step


@pytest.mark.parametrize("config", [HELD[0], HELD[3]], ids=name_of)
def test_a_routine_that_raises_keeps_the_basis(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """LAPACK and cuSOLVER give finite matrices up, too."""
    maker, model = two(**config)
    steps = gradients(3, 4, steps=6)
    feed(maker, model, *steps[:2])
    before = maker.plan.blocks[0].state["basis_0"].clone()

    def raises(*args: Any, **kwargs: Any) -> Any:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", raises)
        feed(maker, model, *steps[2:4])
    state = maker.plan.blocks[0].state
    assert torch.equal(state["basis_0"], before) and state["failing"].tolist() == [1, 1]
    feed(maker, model, *steps[4:])
    state = maker.plan.blocks[0].state
    assert not torch.equal(state["basis_0"], before) and state["failing"].tolist() == [0, 0]


def test_a_member_of_kl_factors_keeps_all_of_its_axes() -> None:
    """Each axis is measured through the others, so that new factors go with new ones."""
    maker, model = two(method="kl_shampoo", preconditioner_interval=1)
    steps = gradients(3, 4, steps=4)
    feed(maker, model, *steps[:2])
    state = maker.plan.blocks[0].state
    before = {k: v.clone() for k, v in state.items() if k.startswith(("values", "basis"))}
    state["factor_1"][0] = torch.inf
    feed(maker, model, *steps[2:])
    state = maker.plan.blocks[0].state
    for k, v in before.items():
        assert torch.equal(state[k][0], v[0]) and not torch.equal(state[k][1], v[1])
    assert isinstance(maker.plan.blocks[0].triple.representation, CrossDims)


# --- other solvers --------------------------------------------------------------------------------------------------------
def test_rows_and_inverses_count_in_a_row() -> None:
    A = torch.eye(3).expand(2, 3, 3).clone()
    for solver in (Cholesky(damping=0.1), NewtonRoot()):
        cache = solver.prepare(Dense(), {"matrix": A, "mass": torch.ones(2)}, None)
        bad = A.clone()
        bad[0] = torch.nan
        for _ in range(2):
            cache = solver.prepare(Dense(), {"matrix": bad, "mass": torch.ones(2)}, cache)
        assert cache["failing"].tolist() == [2, 0]
        assert solver.prepare(Dense(), {"matrix": A, "mass": torch.ones(2)}, cache)["failing"].tolist() == [0, 0]
    model = Matrices((3, 4))
    maker: Any = from_config(model, {"method": "mfac", "window": 4, "failures_allowed": 1})
    assert isinstance(maker.plan.blocks[0].triple.solver, Gram)
    steps = gradients(3, 4, steps=4)
    feed(maker, model, steps[0])
    maker.plan.blocks[0].state["rows.0"].fill_(torch.nan)
    feed(maker, model, steps[1])
    with pytest.raises(RuntimeError, match=r"Gram.*2. time in a row"):
        feed(maker, model, steps[2])


# --- accelerators ---------------------------------------------------------------------------------------------------------
class Later:
    """An event that has not happened for some questions."""

    def __init__(self, after: int) -> None:
        self.left = after

    def query(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_counters_are_read_when_they_have_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device: the copy is under way for some steps, nothing waits for it, and its report is not lost."""
    original = failures._report

    def delayed(*args: Any) -> Any:
        return replace(original(*args), arrived=Later(2))

    monkeypatch.setattr(failures, "_report", delayed)
    maker, model = two(method="shampoo", grafting="none", failures_allowed=0, **AT_ONCE)
    g, h = gradients(3, 4, steps=2)
    feed(maker, model, g, h)
    spoil(maker)
    with pytest.raises(RuntimeError, match=r"at step 1 its refresh failed for the 1. time in a row"):
        for _ in range(6):
            feed(maker, model, g, h)
    assert 2 <= maker.step <= 4


def test_nothing_is_copied_where_nothing_is_limited() -> None:
    maker, model = two(method="shampoo", grafting="none", **AT_ONCE)
    feed(maker, model, *gradients(3, 4, steps=2))
    free = Failures(None)
    assert free.count([(block, block.held) for block in maker.plan.blocks], 0) == ()


# --- configs --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("wrong", [-1, 1.5, True, "many"])
def test_wrong_limits_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"failures_allowed=.*expected an integer of at least 0"):
        METHODS["shampoo"].Config(failures_allowed=wrong)


def test_the_default_is_metas() -> None:
    assert {METHODS[m].Config().failures_allowed for m in METHODS if m != "gradient"} == {3}
