"""What a step allows in which phase; that it is the only one to know; that steps which measure nothing cost nothing."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch

import gradmaker as gm
from gradmaker.curvature.step import Step
from gradmaker.step.state import End, Facts, Phase, StepState
from tests import models
from tests.structure.sources import Source, parse, read

OWNER = "gradmaker/step/state.py"


def between() -> StepState:
    return StepState()


def passes() -> StepState:
    state = StepState()
    state.accumulate(1.0, 3)
    state.keep_apart(())
    return state


def foreign() -> StepState:
    """Of a loop whose gradients are its own."""
    state = StepState()
    state.accumulate(1.0, 3)
    return state


def ending() -> StepState:
    state = passes()
    state.end()
    return state


def failed() -> StepState:
    state = passes()
    before = state.now
    state.end()
    state.fail(before)
    return state


MAKERS = {f.__name__: f for f in (between, passes, foreign, ending, failed)}
TRANSITIONS: dict[str, tuple[Callable[[StepState], Any], set[str]]] = {
    "ask": (lambda s: s.ask([]), {"between", "passes", "foreign", "ending"}),
    "note": (lambda s: s.note(True), {"between", "passes", "foreign", "ending"}),
    "judge_anew": (lambda s: s.judge_anew(), {"between", "passes", "foreign", "failed"}),
    "accumulate": (lambda s: s.accumulate(1.0, 3, s.draft()), {"between", "passes", "foreign"}),
    "keep_apart": (lambda s: s.keep_apart(()), {"foreign"}),
    "drop": (lambda s: s.drop(), {"foreign"}),
    "end": (lambda s: s.end(), {"between", "passes", "foreign", "failed"}),
    "refreshes": (lambda s: s.refreshes([]), {"ending"}),
    "fail": (lambda s: s.fail(Facts()), {"ending"}),
    "begin_again": (lambda s: s.begin_again(), {"failed"}),
    "finish": (lambda s: s.finish(End(), [], lambda: None), {"ending"}),
    "move": (lambda s: s.move([], {}), {"between", "passes", "foreign", "failed"}),
    "saved": (lambda s: s.saved(), {"between", "passes", "foreign", "failed"}),
}


@pytest.mark.parametrize("name", TRANSITIONS)
@pytest.mark.parametrize("phase", MAKERS)
def test_a_transition_is_legal_in_some_phases(name: str, phase: str) -> None:
    """Else it says which, and changes nothing."""
    transition, legal = TRANSITIONS[name]
    state = MAKERS[phase]()
    before = state.now
    if phase in legal:
        transition(state)
        return
    with pytest.raises(RuntimeError, match=rf"step 0: {name}"):
        transition(state)
    assert state.now is before


def test_the_error_names_the_transition_and_the_phases() -> None:
    text = r"step 0: begin_again is not legal in the phase 'passes under way', only in 'ended in an exception'"
    with pytest.raises(RuntimeError, match=text):
        passes().begin_again()


def test_a_measurement_that_was_overtaken_is_refused() -> None:
    state = between()
    draft = state.draft()
    state.accumulate(0.5, 3, state.draft())
    with pytest.raises(RuntimeError, match="another micro-batch was added"):
        state.accumulate(0.5, 3, draft)
    assert state.now.part == 1


def test_undo_is_the_copy_and_stays_in_the_step() -> None:
    state = between()
    before = state.now
    state.accumulate(0.5, 3)
    state.undo(before)
    assert state.now is before and state.now.phase is Phase.BETWEEN
    state.end()
    state.finish(End(), [], lambda: None)
    with pytest.raises(RuntimeError, match="expected a state of this step, got one of step 0"):
        state.undo(before)


def test_a_write_that_raises_leaves_the_step_where_it_was() -> None:
    state = ending()
    before = state.now
    with pytest.raises(ZeroDivisionError):
        state.finish(End(), [], lambda: 1 / 0)
    assert state.now is before


def test_the_end_of_a_step_keeps_nothing_of_it() -> None:
    state = ending()
    state.finish(End(), [], lambda: None)
    now = state.now
    assert (now.index, now.phase, now.part, now.gradients, now.begun, now.due) == (1, Phase.BETWEEN, 0, None, None, None)


# --- the only owner -----------------------------------------------------------------------------------------------------------
FLAGS = {f.name for f in fields(Facts)} - {"index"}
FORMER = {
    "_asked", "_due", "_finite", "_noted", "_part", "_previous", "_ledger", "_pool", "_ever", "_clocks", "_open", "_ended",
    "_kept", "_left", "_trial", "_pending", "torn",
}  # fmt: skip


def assigned(source: Source) -> list[str]:
    """Attributes of a step's state that a file assigns to, by whatever way: those of the state itself, or flags of its own."""
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            held = ast.unparse(node.value)
            if node.attr == "_now" or held.endswith(("step_state", ".now")) or node.attr in FORMER:
                found.append(f"{source.path}:{node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.Call) and ast.unparse(node.func).strip("_").endswith("setattr") and len(node.args) == 3:
            if isinstance(node.args[1], ast.Constant) and node.args[1].value in FLAGS | FORMER | {"_now"}:
                found.append(f"{source.path}:{node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "vars" and "step_state" in ast.unparse(node):
            found.append(f"{source.path}:{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize(
    "planted",
    [
        "maker.step_state._now = 3",
        "self.step_state.finite = False",
        "state.now.finite = False",
        "self._asked = -1",
        "self._part += 1",
        "object.__setattr__(now, 'finite', False)",
        "setattr(state, '_now', 3)",
        "vars(maker.step_state).update(finite=False)",
    ],
)
def test_an_assignment_from_outside_is_found(planted: str) -> None:
    (source,) = parse({"gradmaker/loops/attachment.py": planted}).values()
    assert len(assigned(source)) == 1


def test_no_file_but_its_own_assigns_to_the_state_of_a_step() -> None:
    sources = [each for each in read().values() if each.path != OWNER and "gradmaker/reporting/" not in str(each.path)]
    found = [line for source in sources for line in assigned(source)]  # a report knows no step: its rows are those of a table
    assert not found, "\n".join(found)


def test_nothing_in_the_facts_can_be_assigned() -> None:
    for made, name in ((Facts(), "finite"), (Facts().work, "reached"), (models_step(), "part")):
        with pytest.raises(AttributeError, match="cannot assign"):
            setattr(made, name, None)


def models_step() -> Step:
    """As a curvature sees one."""
    case, seen = models.mlp(), list[Step]()
    maker: Any = gm.KfacGradientMaker(case.model)
    made = maker._step
    maker._step = lambda *args, **kwargs: seen.append(made(*args, **kwargs)) or seen[-1]
    maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
    maker.forward_and_backward()
    return seen[0]


# --- steps that measure nothing -----------------------------------------------------------------------------------------------
IDLE: dict[str, Any] = {"curvature_interval": 9, "preconditioner_interval": 9, "warmup_steps": 0}


def test_a_step_that_measures_nothing_copies_no_statistic_and_reads_no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    case = models.mlp()
    maker: Any = gm.KfacGradientMaker(
        case.model, gm.KfacGradientConfig(curvature_interval=9, preconditioner_interval=9, warmup_steps=0)
    )

    def step() -> None:
        case.model.zero_grad()
        maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)
        maker.forward_and_backward()

    step()
    held = [block.held for block in maker.plan.blocks]
    for name in ("tolist", "item", "__bool__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: 1 / 0)
    step()
    for block, before in zip(maker.plan.blocks, held, strict=True):
        assert block.state is before.state and all(block.cache[k] is v for k, v in before.cache.items())
