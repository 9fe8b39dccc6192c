"""A cache that is released while the next one is made comes back, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gradmaker.blocks import Block
from gradmaker.linalg.state import State
from gradmaker.step import late, refreshing
from tests.step.test_late import steps_of
from tests.test_state import equal_states

METHODS = ("shampoo", "kfac", "kradagrad_star", "ekfac", "soap")


def began(method: str, interval: int = 1, **options: Any) -> tuple[Any, Any]:
    maker, _, step = steps_of(method, preconditioner_interval=interval, **options)
    for k in range(3):
        step(k)
    return maker, step


@pytest.mark.parametrize("method", METHODS)
def test_an_exception_makes_it_again(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    maker, step = began(method)
    before, released = maker.state_dict(), list[bool]()

    def raising(*_: Any) -> None:
        released.append(maker.plan.blocks[0].released and not _large(maker.plan.blocks[0].cache))
        raise MemoryError("planted")

    for owner, name in ((Block, "prepare"), (Block, "assign"), (late, "writes"), (torch, "_foreach_copy_")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, raising)
            with pytest.raises(MemoryError, match="planted"):
                step(3)
        assert not any(block.released for block in maker.plan.blocks)
        assert equal_states(maker.state_dict(), before)
    assert released == [True] * 4
    step(4)
    assert not maker.plan.blocks[0].released and _large(maker.plan.blocks[0].cache)


def _large(cache: State) -> list[Tensor]:
    return [x for x in cache.values() if _is_square(x)]


def _is_square(x: Tensor) -> bool:
    return x.ndim == 3 and x.shape[1] == x.shape[2]


@pytest.mark.parametrize("method", METHODS)
def test_a_member_that_fails_keeps_its_own(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list[dict[str, Any]]()
    for release_too in (True, False):
        if not release_too:
            monkeypatch.setattr(refreshing, "_is_remade", lambda *_: False)
        maker, step = began(method)
        solver, calls = type(maker.plan.blocks[0].triple.solver), list[bool]()
        prepare = solver.prepare

        def failing(
            self: Any, representation: Any, state: Any, previous: Any, prepare: Any = prepare, calls: Any = calls
        ) -> Any:
            lost = {k: torch.full_like(v, torch.nan) if _is_square(v) else v for k, v in state.items()}
            calls.append(previous is None)
            return prepare(self, representation, lost, previous)

        with monkeypatch.context() as patch:
            patch.setattr(solver, "prepare", failing)
            patch.setattr(Block, "restore", _with(prepare, solver))
            step(3)
        assert any(calls) == release_too
        found.append(maker.state_dict())
        step(4)
        found.append(maker.state_dict())
    assert equal_states(found[0], found[2]) and equal_states(found[1], found[3])


def _with(prepare: Any, solver: Any) -> Any:
    """`Block.restore` with the solver as it is."""
    restore = Block.restore

    def restored(self: Block) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(solver, "prepare", prepare)
            restore(self)

    return restored


@pytest.mark.parametrize("method", METHODS)
def test_it_is_kept_where_the_statistic_has_moved_on(method: str) -> None:
    """Between refreshes evidence comes in, of which the cache knows nothing; and someone may write into a statistic."""
    maker, step = began(method, interval=2)
    step(3)
    assert not any(refreshing._is_remade(b, b.held) for b in maker.plan.blocks if _large(b.cache))
    maker, step = began(method)
    block = maker.plan.blocks[0]
    assert refreshing._is_remade(block, block.held)
    next(iter(block.state.values())).mul_(2)
    assert not refreshing._is_remade(block, block.held)
    step(3)
    assert block.held.current
