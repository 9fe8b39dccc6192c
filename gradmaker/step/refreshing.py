"""Refreshes of the caches of blocks, each released before the next is made where the statistic can make it again.

A cache that no failure has touched, of a statistic that has not changed since, is a function of that statistic: while a step
with a refresh is under way it need not be held beside the new one. An exception makes it again, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import replace

from gradmaker.blocks import Block
from gradmaker.linalg.state import State
from gradmaker.representations.roles import OwnOrder, has_refresh
from gradmaker.solvers.roles import Remade
from gradmaker.step.draft import Draft
from gradmaker.step.held import Held

__all__ = ["refresh", "release"]


def release(draft: Draft, turns: Iterable[tuple[Block, bool]]) -> None:
    """Release the caches of blocks that are due to be refreshed."""
    for block, due in turns:
        block.restore()
        held = draft.look(block)
        if due and _is_remade(block, held):
            block.release()
            draft.put(block, replace(held, implicit=True))


def refresh(draft: Draft, block: Block, measured: Set[str], due: bool) -> bool:
    """Refresh a block in a draft, where it is due. Returns whether any of its cache has changed."""
    before = draft.look(block)
    whole = before if block.is_current(before, measured, due) else draft.whole(block)
    made, done = _prepared(block, whole, measured, due, draft)
    if whole is not before:
        made = replace(made, state=before.state)  # which gets its evidence at the end
    draft.put(block, made)
    return done


def _prepared(block: Block, whole: Held, measured: Set[str], due: bool, draft: Draft) -> tuple[Held, bool]:
    options = measured, due, draft.reached, draft.owns(block)
    if whole.implicit:
        made, done = block.prepare(replace(whole, cache={}, implicit=False), *options)
        if bool((made.cache["failures"] == 0).all()):  # so asked, the cost model sees a step without failures
            return replace(made, cache=made.cache | {"failures": whole.cache["failures"]}, current=True), done
        block.restore()  # members that failed keep what they had
        whole = replace(whole, implicit=False)
    made, done = block.prepare(whole, *options)
    current = due and _may_be_remade(block) and _is_whole(made.cache, whole.cache)
    return replace(made, current=current), done


def _is_whole(new: State, old: State) -> bool:
    """Whether a refresh went without a failure."""
    if "failures" not in new or new["failures"].device.type != "cpu":  # an accelerator is not waited for
        return False
    return bool((new["failures"] == old.get("failures", 0)).all())


def _may_be_remade(block: Block) -> bool:
    """Whether the cache is a function of the statistic, which lasts until the next refresh."""
    representation = block.triple.representation
    if isinstance(representation, OwnOrder):  # its statistic changes with every gradient
        return isinstance(block.triple.solver, Remade) and not block.options.turns_average
    return isinstance(block.triple.solver, Remade) and not has_refresh(representation)


def _is_remade(block: Block, held: Held) -> bool:
    """Whether the statistic in the block, which is that from before the step, gives its cache again."""
    now = block.held
    if not now.current or held.cache is not now.cache or held.ready != block.names:
        return False
    return block.versions == now.versions()
