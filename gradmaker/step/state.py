"""The state of a step, and the legal transitions between its phases."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn

from gradmaker.blocks import Block
from gradmaker.capture.sharded import version
from gradmaker.curvature.evidence import Evidence
from gradmaker.curvature.step import Previous
from gradmaker.failures import Report
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.representations.base import Fold
from gradmaker.representations.roles import release
from gradmaker.step.clocks import PlanClocks
from gradmaker.step.draft import Draft, Work
from gradmaker.trust_region.quadratic import QuadraticModel
from gradmaker.trust_region.region import Region

if TYPE_CHECKING:
    from gradmaker.config import GradientConfig

__all__ = ["End", "Facts", "Phase", "StepState"]

Gradients: TypeAlias = tuple[tuple[nn.Parameter, Tensor | None], ...]
"""``.grad`` by parameter: the tensors themselves, not copies."""


class Phase(Enum):
    """Phases of a step."""

    BETWEEN = "between steps"
    PASSES = "passes under way"
    ENDING = "ending"
    FAILED = "ended in an exception"


@dataclass(frozen=True)
class Facts:
    """The state of a step at one moment; immutable, so that it needs no copies."""

    index: int = 0
    phase: Phase = Phase.BETWEEN
    clocks: PlanClocks = field(default_factory=lambda: PlanClocks({}))
    skipped: int = 0  # steps whose loss or gradients were not finite
    unread: int = 0  # passes of a loop whose gradients did not show the weights of their loss terms
    ever: frozenset[str] = frozenset()  # sites with evidence so far
    previous: Previous | None = None  # the last measured step, for secants; this one, once a pass of it was measured
    region: Region | None = None  # state of the trust region
    reports: tuple[Report, ...] = ()  # of failed refreshes, being copied to the host
    # --- of the step under way
    due: frozenset[str] | None = None  # methods that measure their curvature in it; None: the clocks were not read yet
    finite: bool = True
    checked: bool = False  # whether any tensor was checked for non-finite values
    norms: tuple[tuple[Tensor, int, float], ...] = ()  # gradients at the last check, with version counters and norms
    shares: tuple[tuple[float, int], ...] = ()  # weight and number of examples of its micro-batches; 0: unknown
    work: Work = Work()
    rows: Mapping[str, FactoredGradient] = field(default_factory=dict)  # by site: gradients by rows, maybe not in `.grad`
    trial: QuadraticModel | None = None
    gradients: Gradients | None = None  # from before it; None: `.grad` is not the maker's
    left: tuple[tuple[nn.Parameter, Tensor | None, int], ...] = ()  # `.grad` after its end has failed, with version counters
    begun: Facts | None = None  # the state before its first micro-batch

    def but(self, **changes: Any) -> Facts:
        """The same with these fields changed: `dataclasses.replace` takes four times as long, and a step makes six of these."""
        made = object.__new__(Facts)
        made.__dict__.update(self.__dict__)
        made.__dict__.update(changes)
        return made

    @property
    def part(self) -> int:
        """The number of micro-batches so far, which is the index of the next one."""
        return len(self.shares)

    @property
    def measured(self) -> frozenset[str]:
        """Sites with evidence so far, including those of this step."""
        return self.ever | self.work.reached


@dataclass(frozen=True)
class End:
    """The results of the end of a step."""

    work: Work | None = None  # None: nothing to keep, since the step was not finite
    gradients: Mapping[nn.Parameter, Tensor] = field(default_factory=dict)  # to be written to `.grad`
    write: Callable[[], None] | None = None  # writes to `.grad` and to what the blocks hold, in place of `gradients`
    clocks: PlanClocks | None = None
    reports: tuple[Report, ...] = ()
    region: Region | None = None
    folds: Sequence[partial[object]] = ()  # writes into statistics, after those to `.grad`


class StepState:
    """The owner of the `Facts` of a maker's step; a method for each legal transition, a RuntimeError for every other."""

    def __init__(self, clocks: PlanClocks | None = None, region: Region | None = None) -> None:
        self._now = Facts(clocks=clocks or PlanClocks({}), region=region)

    @property
    def now(self) -> Facts:
        """The present state, to which `undo` can return."""
        return self._now

    def _check(self, transition: str, *legal: Phase) -> Facts:
        if self._now.phase not in legal:
            phases = " or ".join(f"'{phase.value}'" for phase in legal)
            raise RuntimeError(
                f"step {self._now.index}: {transition} is not legal in the phase '{self._now.phase.value}', only in {phases}"
            )
        return self._now

    def undo(self, before: Facts) -> None:
        """Restore an earlier state of the same step. RuntimeError for one of another step."""
        if before.index != self._now.index:
            raise RuntimeError(f"step {self._now.index}: undo: expected a state of this step, got one of step {before.index}")
        self._now = before

    # ---------------------------------------------------------------- passes
    def ask(self, blocks: Collection[Block]) -> frozenset[str]:
        """The methods that measure in this step; reads the clocks once a step."""
        now = self._check("ask", Phase.BETWEEN, Phase.PASSES, Phase.ENDING)
        if now.due is None:
            clocks, due = self._asked(blocks)
            self._now = now.but(clocks=clocks, due=due)
            return due
        return now.due

    def _asked(self, blocks: Collection[Block]) -> tuple[PlanClocks, frozenset[str]]:
        clocks = self._now.clocks.copy()
        return clocks, clocks.measure(self._now.index, blocks)

    def would_ask(self, blocks: Collection[Block]) -> frozenset[str]:
        """What `ask` would return; changes nothing."""
        return self._asked(blocks)[1] if self._now.due is None else self._now.due

    def folds(self, blocks: Collection[Block], weight: float) -> dict[Block, Fold]:
        """How evidence of a micro-batch enters the statistics of blocks.  weight: of its loss in that of the step"""
        return self._now.clocks.folds(self._now.index, blocks, weight)

    def note(self, finite: bool, norms: tuple[tuple[Tensor, int, float], ...] = ()) -> None:
        """Record a check of the loss or the gradients.  norms: of the gradients, with their version counters"""
        now = self._check("note", Phase.BETWEEN, Phase.PASSES, Phase.ENDING)
        self._now = now.but(finite=now.finite and finite, checked=True, norms=norms)

    def note_elsewhere(self) -> None:
        """Record that a pass was not finite on some rank, so that no rank keeps the step for secants."""
        now = self._check("note_elsewhere", Phase.PASSES)
        self._now = now.but(finite=False, checked=True, previous=now.begun.previous if now.begun is not None else now.previous)

    def judge_anew(self) -> None:
        """Forget whether earlier passes were finite: the end of the step finds it in ``.grad``."""
        now = self._check("judge_anew", Phase.BETWEEN, Phase.PASSES, Phase.FAILED)
        self._now = _with_no_checks(now)

    def draft(self) -> Draft:
        """A draft of the next micro-batch, or of the end of the step."""
        return Draft(self._now.work, self._now.part)

    def accumulate(self, weight: float, examples: int, draft: Draft | None = None, unread: bool = False) -> None:
        """Add a micro-batch to the step.  draft: its changes, if it was measured. unread: it was not, for want of weights"""
        now = self._check("accumulate", Phase.BETWEEN, Phase.PASSES)
        if draft is not None and draft.base is not now.work:
            raise RuntimeError(f"step {now.index}: accumulate: another micro-batch was added since the measurement began")
        begun = _with_no_checks(now) if now.phase is Phase.BETWEEN else now.begun
        work = now.work if draft is None else draft.work()
        shares = (*now.shares, (weight, examples))
        self._now = now.but(phase=Phase.PASSES, shares=shares, work=work, begun=begun, unread=now.unread + unread)

    def hold(self, rows: Mapping[str, FactoredGradient]) -> None:
        """Keep gradients of this step by their rows. RuntimeError if it has several micro-batches."""
        now = self._check("hold", Phase.BETWEEN, Phase.PASSES, Phase.FAILED)
        if now.part > 1 and rows:
            raise RuntimeError(f"step {now.index}: hold: rows are those of a step of one micro-batch, and this has {now.part}")
        self._now = now.but(rows=rows)

    @contextmanager
    def holding(self, rows: Mapping[str, FactoredGradient]) -> Iterator[None]:
        """Context that ends the step, with gradients of which the rows are known, too; not kept after an exception."""
        self.hold(rows)
        try:
            yield
        except BaseException:
            self.hold({})
            raise

    def keep_apart(self, before: Gradients) -> None:
        """Keep the ``.grad`` from before the first micro-batch. RuntimeError if it is kept already."""
        now = self._check("keep_apart", Phase.PASSES)
        if now.gradients is not None:
            raise RuntimeError(f"step {now.index}: keep_apart: the gradients from before the step are kept already")
        self._now = now.but(gradients=before)

    def drop(self) -> None:
        """Remove the micro-batches from the step: their gradients, in a loop that is not the maker's, are gone."""
        now = self._check("drop", Phase.PASSES, Phase.FAILED)
        if now.gradients is not None:
            raise RuntimeError(f"step {now.index}: drop: only micro-batches of another loop can be removed")
        self._now = (now.begun or now).but(phase=Phase.BETWEEN, due=now.due, clocks=now.clocks)

    # ---------------------------------------------------------------- what is kept of the last step
    def remember(self, previous: Previous) -> None:
        """Keep this step for secants, with the pass that was measured last."""
        self._now = self._check("remember", Phase.PASSES).but(previous=previous)

    def complete(self, pairs: dict[str, Evidence]) -> None:
        """Keep the secants of the last measured step, and release its batch."""
        now = self._check("complete", Phase.BETWEEN, Phase.PASSES)
        assert now.previous is not None
        self._now = now.but(previous=Previous([], {}, {}, now.previous.index, pairs))

    def judge(self, region: Region) -> None:
        """Set the state of the trust region at the beginning of a pass."""
        self._now = self._check("judge", Phase.BETWEEN, Phase.PASSES).but(region=region)

    def attempt(self, trial: QuadraticModel) -> None:
        """Set the quadratic model of this step, with the pass that was made last."""
        self._now = self._check("attempt", Phase.PASSES).but(trial=trial)

    def copied(self, previous: Previous | None) -> StepState:
        """The same state for a copy of the maker.  previous: the last measured step, without its batch"""
        made = StepState()
        made._now = self._now.but(previous=previous)
        return made

    # ---------------------------------------------------------------- the end
    def end(self) -> None:
        """Begin the end of the step; after an exception, again."""
        now = self._check("end", Phase.BETWEEN, Phase.PASSES, Phase.FAILED)
        self._now = now.but(phase=Phase.ENDING)

    def refreshes(self, blocks: Collection[Block]) -> tuple[PlanClocks, list[tuple[Block, bool]]]:
        """Every block and whether it is to be refreshed, with the clocks after this."""
        clocks = self._check("refreshes", Phase.ENDING).clocks.copy()
        return clocks, clocks.refreshes(self._now.index, blocks)

    def fail(self, before: Facts) -> None:
        """Record an exception in the end: it may be called again, or the step begins again.  before: the state before `end`"""
        self._check("fail", Phase.ENDING)
        left = tuple((p, p.grad, -1 if p.grad is None else version(p.grad)) for p, _ in before.gradients or ())
        self._now = before.but(phase=Phase.FAILED, left=left)

    def begin_again(self) -> Gradients:
        """Begin the step again after an exception at its end. Returns ``.grad`` from before it, if it is unchanged since.

        Micro-batches of another loop stay: ``.grad`` tells whether they are part of the step, see `drop`.
        """
        now = self._check("begin_again", Phase.FAILED)
        if now.gradients is None:
            self._now = now.but(phase=Phase.PASSES if now.shares else Phase.BETWEEN, left=())
            return ()
        untouched = all(p.grad is g and (g is None or version(g) == then) for p, g, then in now.left)
        self._now = (now.begun or now).but(phase=Phase.BETWEEN, gradients=None, left=())
        return now.gradients if untouched else ()

    def finish(self, end: End, blocks: Collection[Block], write: Callable[[], None]) -> None:
        """End the step: write its gradients, and put its changes into the blocks.

        blocks: of the plan.  write: writes the gradients into ``.grad``; the last action that may raise
        """
        now = self._check("finish", Phase.ENDING)
        work = end.work or Work()
        clocks = (end.clocks or now.clocks).retried(now.due or (), work.reached, now.index + 1, blocks)
        done = Facts(
            index=now.index + 1,
            clocks=clocks,
            skipped=now.skipped + int(not now.finite),
            unread=now.unread,
            ever=now.ever | work.reached,
            previous=now.previous,
            region=end.region or now.region,
            reports=end.reports,
        )
        write()
        self._now = done
        for block, held in work.held.items():
            block.held, block.versions, block.released = held, held.versions() if held.current else (), False
        for block in blocks:
            if block.per_step and block.owned:
                release(block.triple.representation, block.state)

    # ---------------------------------------------------------------- another plan, another state
    def move(self, blocks: Collection[Block], methods: Mapping[str, GradientConfig]) -> None:
        """Replace the blocks by those of another plan, which hold what the old ones held."""
        now = self._check("move", Phase.BETWEEN, Phase.PASSES, Phase.FAILED)
        begun = None if now.begun is None else _with_clocks_of_plan(now.begun, blocks, methods)
        self._now = _with_clocks_of_plan(now, blocks, methods).but(work=now.work.moved(blocks), begun=begun)

    def saved(self) -> Facts:
        """The state to save, without micro-batches of a loop that is not the maker's, whose gradients are not saved."""
        now = self._check("saved", Phase.BETWEEN, Phase.PASSES, Phase.FAILED)
        if now.gradients is not None and now.work.parts:
            raise RuntimeError("several processes: evidence of a step is put together at its end: save between steps")
        if now.gradients is not None or now.phase is Phase.BETWEEN:
            return now
        return (now.begun or now).but(phase=Phase.BETWEEN, due=now.due, clocks=now.clocks)

    def load(self, facts: Facts) -> None:
        """Replace the state by one of any step. RuntimeError while a step ends."""
        if facts.phase is Phase.ENDING:
            raise RuntimeError("load: a state cannot be loaded while a step ends: load it before or after")
        self._now = facts


def _with_no_checks(facts: Facts) -> Facts:
    return facts.but(finite=True, checked=False) if facts.checked else facts


def _with_clocks_of_plan(facts: Facts, blocks: Collection[Block], methods: Mapping[str, GradientConfig]) -> Facts:
    """The state with the clocks of another plan. Its new methods that measure once a step are due in this step, too."""
    clocks = facts.clocks.serving(methods)
    if facts.due is None:
        return facts.but(clocks=clocks)
    recorded = {b.options.method for b in blocks if b.triple.curvature.of_passes}  # this pass was not recorded for them
    new = [name for name in methods if name not in facts.clocks.of and name not in recorded]
    return facts.but(clocks=clocks, due=facts.due | clocks.measure(facts.index, blocks, new))
