"""The step of every preconditioned gradient: capture, curvature, preconditioner, gradient."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmaker.attachment import Attachment
from gradmaker.batches import Batches, terms_of
from gradmaker.blocks import Block, Solved
from gradmaker.capture import OutputGradients, Tape
from gradmaker.checkpoint import dump, load
from gradmaker.config import GradientConfig
from gradmaker.curvature import Curvature, Likelihood
from gradmaker.curvature.likelihood import Terms
from gradmaker.curvature.recorder import LossRecorder
from gradmaker.deferred import resolve
from gradmaker.failures import Failures
from gradmaker.graph import Graph
from gradmaker.head import Head
from gradmaker.ledger import WHOLE_STEP, Ledger
from gradmaker.maker import GradientMaker
from gradmaker.plan import Plan, PlanClocks, carry, make_plan
from gradmaker.previous import bookmark, complete
from gradmaker.self_checks import SelfChecks
from gradmaker.sites import Site
from gradmaker.step import NOTHING, Extra, Previous, Step, scaled
from gradmaker.summary import Summary, summarise
from gradmaker.verify import Verification, verify

__all__ = ["PreconditionedGradientMaker"]


class PreconditionedGradientMaker(GradientMaker):
    """A gradient maker that writes ``P g`` into ``.grad``; methods differ by their config alone."""

    Config: ClassVar[type[GradientConfig]]
    config: GradientConfig

    def __init__(self, model: nn.Module, config: GradientConfig | None = None) -> None:
        super().__init__(model, config)
        from gradmaker.methods import METHODS  # the registry names this class' subclasses

        self._methods = METHODS
        self.plan = make_plan(model, self.config, METHODS)
        self._unseen: frozenset[str] = frozenset()  # parameters with uses that their layers do not show
        self.checks = SelfChecks(model, self.config.self_check, self.config.seed)
        self.skipped = 0
        """Steps whose loss or gradients were not finite: no statistic took them in, ``.grad`` was left as it was."""
        self._clocks = PlanClocks(self.plan)
        self._asked = -1  # the step for which the clocks have been asked
        self._due: frozenset[str] = frozenset()  # methods of the plan that measure their curvature in this step
        self._finite = True
        self._part = -1  # the micro-batch of this step that is under way
        self._previous: Previous | None = None
        self._noted = False  # whether anything of this step was checked for being finite
        self._ledger = Ledger()  # of the step that is under way
        self._ever: set[str] = set()  # sites that have given evidence at all
        self._attachments: list[Attachment] = []
        self._failures = Failures(self.config.failures_allowed)

    def purposes(self) -> frozenset[str]:
        return self.plan.purposes()

    # ---------------------------------------------------------------- the step
    def begin_pass(self) -> bool:
        """Whether the coming pass is to be recorded; asked before every forward pass."""
        self._begin_again()
        if self._asked != self.step:
            self._due, self._asked = self._clocks.measure(self.step), self.step
        self._part += 1
        return bool(self.plan.curvatures(of_passes=True, due=self._due))

    def new_tape(self, everything: bool = False) -> Tape:
        """A tape of the modules that this step's curvatures speak of and need besides; or those of ``everything``."""
        due = None if everything else self._due
        recorded = [c for c in self.plan.curvatures(of_passes=True, due=due) if c.recorded]
        own = (m for c in recorded for s in self.plan.sites(c, due) for m in s.modules)
        modules = dict.fromkeys((*own, *(m for c in recorded for m in c.watches(self.model))))
        tape = Tape(self.model, modules, self.checks.arrangement, self.config.batch_axis)
        tape.assume(self._declared[""].counted if self._declared else None)
        return tape

    def _run(self, weight: float) -> tuple[Any, Tensor]:
        self.plan.own.check()
        complete(self)
        if not self.begin_pass():
            output, loss = super()._run(weight)
            self._note_finite([loss], [])
            return output, loss
        tape, known = self.new_tape(), dict[int, Any]()
        batches = Batches.of(self.model, self._declared, self.config) if self._repeats() else None
        with tape.recording():
            with LossRecorder() as recorder:
                output, loss = self._forward(known)
            tape.end_forward([loss])
            logits = None if self._logits is None else resolve(self._logits, known)
            terms = terms_of(recorder, loss, logits, self.config.likelihood)
            head = Head.of(loss, output, terms, recorder)
            due = self._recorded_sites() and self.checks.due(self.checks.arrange(tape, head), head)
            if batches is not None:
                batches.own.note(terms)
            make = partial(Graph, self.model, loss, terms, logits)
            graph, ridden = self._backward(tape, make, loss, weight, batches, bool(due) or not self.checks.arrangement.plain)
            if due and self._all_finite([loss], []):
                self.check(tape, head, scaled(ridden, 1 / weight) if weight else None)
            extra = Extra(graph, batches, self._previous)
            self.take_in(tape, terms, weight, [loss], head=head, extra=extra)
            self.take_in(tape, terms, weight, [], ridden=ridden, head=head, extra=extra)
        if batches is not None and self.plan.asks("previous", self._due) and self._finite:
            self._previous = bookmark(self, batches.own.replay, weight, extra.notes)
        return output, loss

    def _recorded_sites(self) -> list[Site]:
        """The sites that are measured by their calls."""
        recorded = [c for c in self.plan.curvatures(of_passes=True, due=self._due) if c.recorded]
        return [s for c in recorded for s in self.plan.sites(c, self._due) if not s.frozen]

    def check(self, tape: Tape, head: Head, ridden: OutputGradients | None) -> None:
        """Make the self-checks on a pass, and measure by their verdict from here on."""
        curvatures = [c for c in self.plan.curvatures(of_passes=True, due=self._due) if c.recorded]
        explained = any(not c.rides for c in curvatures) and not head.declared
        costly = any("seed" in c.idle or self._whole(c) for c in curvatures)
        with _plain_arithmetic(self.model):
            unseen = self.checks.run(tape, self._recorded_sites(), head, ridden, explained, costly)
        if unseen - self._unseen:
            self.plan_again(self._unseen | unseen)

    def plan_again(self, unseen: frozenset[str]) -> None:
        """Leave the layers of some parameters to what measures them rightly; all others keep what they hold."""
        plan = make_plan(self.model, self.config, self._methods, unseen)
        carry(self.plan, plan)
        self.adopt(plan, unseen)

    def adopt(self, plan: Plan, unseen: frozenset[str]) -> None:
        """Go on with another plan."""
        self.plan, self._unseen = plan, unseen
        self._clocks.plan = plan
        self.checks.arrangement.direct |= unseen
        self._planned()

    def _planned(self) -> None:
        """For subclasses: the blocks are new ones."""

    def _whole(self, curvature: Curvature) -> bool:
        return any(b.full for b in self.plan.blocks if b.triple.curvature == curvature)

    def _repeats(self) -> bool:
        return any(self.plan.asks(what, self._due) for what in ("replay", "previous")) or len(self._declared) > 1

    def _backward(
        self, tape: Tape, make: Callable[[], Graph], loss: Tensor, weight: float, batches: Batches | None, kept: bool
    ) -> tuple[Graph | None, OutputGradients]:
        """The backward pass, with its output gradients; and the graph for products, of this pass or of a batch of their own."""
        products = self.plan.asks("graph", self._due)
        shared = products and (batches is None or batches.shared)
        made: list[Graph] = []

        def differentiate() -> None:
            if shared:
                made.append(make())
                made[0].write_gradients(weight)
                return
            pulled = kept or any(not c.rides for c in self.plan.curvatures(of_passes=True, due=self._due))
            (loss * weight if weight != 1.0 else loss).backward(retain_graph=pulled)

        ridden = tape.collect(differentiate)
        if shared:
            return made[0], scaled(ridden, weight)
        if not products or batches is None:
            return None, ridden
        with tape.paused():
            return batches.curvature.graph(), ridden

    def take_in(
        self,
        tape: Tape,
        terms: list[Terms],
        weight: float,
        check: list[Tensor],
        ridden: OutputGradients | None = None,
        head: Head | None = None,
        extra: Extra = NOTHING,
        scale: float = 1.0,
    ) -> None:
        """Measure the curvatures of a recorded pass and fold them into the statistics.

        ridden: output gradients of the backward pass, for those that need just these; the others are measured without.
        scale: factor of the loss that was differentiated, besides its weight (that of a GradScaler).
        """
        masked, empty = self._note_finite(check, terms)
        empty |= tape.sized and not tape.batch
        if not self._finite:
            return
        if ridden is not None:
            ridden = scaled(ridden, 1 / (weight * scale))
        for curvature in self.plan.curvatures(of_passes=True, due=self._due):
            held = curvature not in self.plan.fleeting  # a statistic takes in no loss without terms; what ends now begins anew
            if curvature.rides == (ridden is not None) and not (empty and held):
                step = self._step(curvature, tape, terms, masked, self._due)
                if not step.sites:
                    continue
                step.ridden, step.head = ridden, head
                step.graph, step.batches, step.previous = extra.graph, extra.batches, extra.previous
                step.notes = extra.notes
                if curvature.layerwise:
                    step.check_calls()
                self._fold(curvature, step, weight)

    def _step(
        self, curvature: Curvature, tape: Tape, terms: list[Terms], masked: bool, due: frozenset[str] | None = None
    ) -> Step:
        """What a curvature may know.  due: methods whose sites it speaks of; None for all"""
        c = self.config
        sites = [s for s in self.plan.sites(curvature, due) if not s.frozen]
        step = Step(self.step, c.seed, sites, c.statistics_dtype(), tape, terms)
        step.reduction, step.masked, step.part = c.loss_reduction, masked, self._part
        step.whole = self._whole(curvature)
        return step

    def _all_finite(self, check: list[Tensor], terms: list[Terms]) -> bool:
        self._note_finite(check, terms)
        return self._finite

    @torch.no_grad()
    def _note_finite(self, check: list[Tensor], terms: list[Terms]) -> tuple[bool, bool]:
        """Record whether these tensors and the gradients are finite; returns whether the loss left out terms, and all of them.

        One host read, and only on steps on which a statistic would take them in.
        """
        if not (self._due or any(b.momentum or b.norm_state for b in self.plan.blocks)):
            return False, False
        self._noted = True
        tensors = check + [p.grad for p in self.model.parameters() if p.grad is not None]
        finite = torch.stack([_finite(t) for t in tensors]).all() if tensors else torch.tensor(True)
        kept = [t.valid() for t in terms]
        flags = [finite, *(v.any() for v in kept), *(t.masked() for t in terms)]
        values = torch.stack(flags).tolist()
        self._finite = self._finite and values[0]
        return any(values[1 + len(kept) :]), bool(kept) and not any(values[1 : 1 + len(kept)])

    def _fold(self, curvature: Curvature, step: Step, weight: float) -> None:
        blocks = [b for b in self.plan.measured(self._due) if b.triple.curvature == curvature]
        part, ledger = step.part if curvature.of_passes else WHOLE_STEP, self._ledger
        ledger.note(part, weight, step.examples)
        with _plain_arithmetic(self.model):
            for index, portion in enumerate(curvature.measure(step)):
                with torch.no_grad():
                    for block in blocks:
                        block.update(portion, block.fold(weight), ledger.further, ledger.folded(part, index))
        self._ever |= ledger.further

    def forget_pass(self) -> None:
        """A new pass is judged by itself: whether an earlier one was finite shows in ``.grad`` at the end of the step."""
        self._finite, self._noted = True, False

    def _check_parameters(self) -> None:
        self.plan.own.check()

    def _precondition(self) -> None:
        if self._asked != self.step:  # the user ran the passes; only gradients can be measured now
            self._check_passes()
        if not self._noted:
            self._note_finite([], [])
        if self._finite:
            self._solve()
        self._end_step()

    def _end_step(self) -> None:
        """Keep what the step has brought; what came to nothing is due again at the next."""
        self.skipped += int(not self._finite)
        for block, solved in self._ledger.solved or []:
            block.keep(solved)
        self._clocks.retry(self._due, self._ledger.further if self._finite else (), self.step + 1)
        self._due, self._finite, self._noted, self._ledger, self._part = frozenset(), True, False, Ledger(), -1
        for block in self.plan.blocks:
            block.triple.representation.release(block.state)

    def _abandon(self) -> None:
        self._part = -1
        self._ledger.begin_again(self.plan.blocks)

    def _check_passes(self) -> None:
        undo = self._bookmark()
        if self.begin_pass() and any(p.grad is not None for p in self.model.parameters()):
            undo()
            raise RuntimeError(
                "precondition: a measurement of the curvature is due and no forward pass was recorded in this step: "
                "declare the calls (setup_model_call, setup_loss_call, forward_and_backward), or attach(optimizer) before it"
            )

    def _bookmark(self) -> Callable[[], None]:
        rewind = super()._bookmark()
        counters = {k: getattr(self, k) for k in ("_asked", "_due", "_finite", "_noted", "_part")}
        if self._part >= 0:  # of this step: of the one before, pairs are made once and its batch is let go
            counters["_previous"] = self._previous
        clocks = self._clocks.dump()

        def undo() -> None:
            rewind()
            self._clocks.load(clocks)
            vars(self).update(counters)
            self._ledger.solved = None

        return undo

    @torch.no_grad()
    def _solve(self) -> None:
        ledger = self._ledger
        if ledger.solved is None:
            ledger.check_parts(self._part)
            for curvature in self.plan.curvatures(of_passes=False, due=self._due):
                self._fold(curvature, self._step(curvature, Tape(self.model, ()), [], False, self._due), 1.0)
            with _plain_arithmetic(self.model):
                self._refresh()
                ledger.solved = [r for r in map(self._result, self.plan.blocks) if r is not None]
        for block, solved in ledger.solved:
            if self._started or (block.norm and block.norm.leads):
                block.write(solved.value)

    @property
    def _started(self) -> bool:
        return self.step >= self.config.first_step

    def _refresh(self) -> None:
        self._failures.check()  # what was on its way from a device
        done = self._ledger.prepared
        for block, due in self._clocks.refreshes(self.step):
            if block not in done:
                done[block] = block.prepare(self._ever, due)
        self._failures.note([block for block, refreshed in done.items() if refreshed], self.step)
        self._failures.check()

    def _result(self, block: Block) -> tuple[Block, Solved] | None:
        raw = block.read()
        return None if raw is None or not block.cache else (block, block.solve(raw, self._started))

    # ---------------------------------------------------------------- riding another loop
    def attach(
        self,
        optimizer: Optimizer,
        likelihood: str | Likelihood | None = None,
        accumulation: int = 1,
        scaler: torch.amp.GradScaler | None = None,
    ) -> PreconditionedGradientMaker:
        """Precondition inside ``optimizer.step()`` of a loop that is not ours; the loop stays as it is.

        Returns the maker, which has to be kept: its hooks go with it.

        likelihood: what the model's output parametrises: the loss itself is out of sight. Methods that need only the
        gradient need none.
        accumulation: backward passes for each step of the optimizer, each with ``1 / accumulation`` of the loss.
        scaler: the loop's gradient scaler, if it has one; what is captured during its backward pass is unscaled.
        """
        likelihood = likelihood or self.config.likelihood
        self._attachments.append(Attachment(self, optimizer, likelihood, accumulation, scaler))
        weakref.finalize(self, _remove_all, self._attachments)
        return self

    def remove(self) -> None:
        """Take every hook off the model and the optimizer."""
        _remove_all(self._attachments)

    # ---------------------------------------------------------------- looking inside
    def summary(self) -> Summary:
        """A table: parameters, block, curvature, representation, solver, bytes."""
        return summarise(self.plan, self._ever)

    def verify(self) -> Verification:
        """Check every block against a dense oracle on the model and batch that were last set up."""
        return verify(self)

    def silent(self) -> list[str]:
        """Names of the sites that no pass has reached so far."""
        return [s.name for b in self.plan.blocks for s in b.sites if s.name not in self._ever]

    # ---------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on, by site name, unstacked: tensors, numbers and names only."""
        return dump(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on, bitwise, from a `state_dict`. ValueError that names what is missing, unknown or of another shape."""
        load(self, state)


def _finite(value: Tensor) -> Tensor:
    """Whether all elements are, without a mask of them.  # () bool"""
    return value.detach().sum(dtype=torch.promote_types(value.dtype, torch.float32)).isfinite()


def _remove_all(attachments: list[Attachment]) -> None:
    while attachments:
        attachments.pop().remove()


def _plain_arithmetic(model: nn.Module) -> Any:
    """The maker's own mathematics runs outside of the user's autocast."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, enabled=False)
