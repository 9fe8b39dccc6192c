"""The step of every preconditioned gradient: capture, curvature, preconditioner, gradient."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmaker.batches import Batches, terms_of
from gradmaker.blocks import Block
from gradmaker.capture import OutputGradients, Tape
from gradmaker.checkpoint import dump, load
from gradmaker.config import GradientConfig
from gradmaker.curvature import Curvature, Likelihood
from gradmaker.curvature.likelihood import Terms
from gradmaker.curvature.recorder import LossRecorder
from gradmaker.deferred import resolve
from gradmaker.failures import Failures
from gradmaker.graph import Graph
from gradmaker.loops.attachment import Attachment, refuse_again, refuse_attached, remove_all
from gradmaker.maker import GradientMaker
from gradmaker.measuring import check_fired, fold, plain_arithmetic, scaled, sums_to_finite
from gradmaker.pending import Pending
from gradmaker.plan import make_plan
from gradmaker.previous import bookmark, complete
from gradmaker.schedule import Clock, as_schedule
from gradmaker.sites import Site
from gradmaker.step import NOTHING, Extra, Previous, Step
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

        self.plan = make_plan(model, self.config, METHODS)
        self.skipped = 0
        """Steps whose loss or gradients were not finite: no statistic took them in, ``.grad`` was left as it was."""
        self._curvature_clock = Clock(as_schedule("", self.config.curvature_interval), self.config.warmup_steps)
        self._refresh_clock = Clock(as_schedule("", self.config.preconditioner_interval), self.config.warmup_steps)
        self._asked = -1  # the step for which the curvature clock has been asked
        self._measuring = False
        self._finite = True
        self._part = -1  # the micro-batch of this step that is under way
        self._previous: Previous | None = None
        self._noted = False  # whether anything of this step was checked for being finite
        self._further: set[str] = set()  # sites that have given evidence in this step
        self._ever: set[str] = set()  # sites that have given evidence at all
        self._attachments: list[Attachment] = []
        self.served: frozenset[nn.Parameter] | None = None  # those that the attached optimizer holds; None: all
        self._failures = Failures(self.config.failures_allowed)

    def purposes(self) -> frozenset[str]:
        return self.plan.purposes()

    # ---------------------------------------------------------------- the step
    def begin_pass(self, counted: bool = True) -> bool:
        """Whether the coming pass is to be recorded.  counted: whether it is known to be part of the step"""
        if self._asked != self.step:
            self._measuring = self._curvature_clock.tick(self.step)
            self._asked = self.step
        self._measuring |= bool(self.plan.fleeting)  # also where the step begins again after an exception in its solve
        self._part += counted
        return self._measuring and any(self._sites(c) for c in self.plan.curvatures(of_passes=True))

    def _sites(self, curvature: Curvature) -> list[Site]:
        return self.plan.sites(curvature, self.served)

    def new_tape(self) -> Tape:
        """A tape that watches the modules of every site whose curvature is layer-wise, and what else such a curvature needs."""
        recorded = [c for c in self.plan.curvatures(of_passes=True) if c.recorded]
        own = (m for c in recorded for s in self._sites(c) for m in s.modules)
        return Tape(self.model, dict.fromkeys((*own, *(m for c in recorded for m in c.watches(self.model)))))

    def _run(self, weight: float) -> tuple[Any, Tensor]:
        refuse_attached(self._attachments)
        self.plan.refuse_ranks()
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
            tape.end_forward()
            logits = None if self._logits is None else resolve(self._logits, known)
            terms = terms_of(recorder, loss, logits, self.config.likelihood)
            if batches is not None:
                batches.own.note(terms)
            graph, ridden = self._backward(tape, partial(Graph, self.model, loss, terms, logits), loss, weight, batches)

            def slopes() -> list[Tensor]:
                return [torch.autograd.grad(loss, t.z, retain_graph=True)[0] for t in terms]

            extra = Extra(graph, batches, self._previous)
            pending = self.measure_pass(tape, terms, weight, [loss], slopes=slopes, extra=extra)
            self.fold_pass(self.measure_pass(tape, terms, weight, [], ridden=ridden, extra=extra, pending=pending))
        if batches is not None and self.plan.asks("previous") and self._finite:
            self._previous = bookmark(self, batches.own.replay, weight, extra.notes)
        return output, loss

    def _repeats(self) -> bool:
        return self.plan.asks("replay") or self.plan.asks("previous") or len(self._declared) > 1

    def _backward(
        self, tape: Tape, make: Callable[[], Graph], loss: Tensor, weight: float, batches: Batches | None
    ) -> tuple[Graph | None, OutputGradients]:
        """The backward pass, with its output gradients; and the graph for products, of this pass or of a batch of their own."""
        products = self.plan.asks("graph")
        shared = products and (batches is None or batches.shared)
        made: list[Graph] = []

        def differentiate() -> None:
            if shared:
                made.append(make())
                made[0].write_gradients(weight)
                return
            pulled = any(not c.rides for c in self.plan.curvatures(of_passes=True))
            (loss * weight if weight != 1.0 else loss).backward(retain_graph=pulled)

        ridden = tape.collect(differentiate)
        if shared:
            return made[0], scaled(ridden, weight)
        if not products or batches is None:
            return None, ridden
        with tape.paused():
            return batches.curvature.graph(), ridden

    def measure_pass(
        self,
        tape: Tape,
        terms: list[Terms],
        weight: float,
        check: list[Tensor],
        ridden: OutputGradients | None = None,
        slopes: Callable[[], list[Tensor]] = list,
        extra: Extra = NOTHING,
        scale: float = 1.0,
        pending: Pending | None = None,
    ) -> Pending:
        """Measure the curvatures of a recorded pass; `fold_pass` makes what is found the statistics.

        ridden: output gradients of the backward pass, for those that need just these; the others are measured without.
        scale: factor of the loss that was differentiated, besides its weight (that of a GradScaler).
        pending: what was measured of this step before, to be added to
        """
        pending = Pending(set(self._further)) if pending is None else pending
        masked, empty = self._note_finite(check, terms)
        if not self._finite:
            return pending
        if ridden is not None:
            ridden = scaled(ridden, 1 / (weight * scale))
        for curvature in self.plan.curvatures(of_passes=True):
            held = curvature not in self.plan.fleeting  # a statistic takes in no loss without terms; what ends now begins anew
            if curvature.rides == (ridden is not None) and not (empty and held) and self._sites(curvature):
                step = self._step(curvature, tape, terms, masked)
                step.ridden, step.slopes = ridden, slopes
                step.part = self._part if pending.part is None else pending.part
                step.graph, step.batches, step.previous = extra.graph, extra.batches, extra.previous
                step.notes = extra.notes
                if curvature.layerwise:
                    check_fired(step)
                blocks = [pending.block(b) for b in self.plan.blocks if b.triple.curvature == curvature]
                fold(curvature, step, weight, blocks, pending.further)
        return pending

    def fold_pass(self, pending: Pending) -> None:
        """Make measured statistics those of the maker."""
        for block, held in pending.blocks.items():
            block.state = held.state
        self._further = pending.further
        self._ever |= pending.further

    def _step(self, curvature: Curvature, tape: Tape, terms: list[Terms], masked: bool) -> Step:
        c = self.config
        sites = self._sites(curvature)
        step = Step(self.step, c.seed, sites, c.statistics_dtype(), tape, terms)
        step.reduction, step.masked, step.part = c.loss_reduction, masked, self._part
        return step

    @torch.no_grad()
    def _note_finite(self, check: list[Tensor], terms: list[Terms]) -> tuple[bool, bool]:
        """Record whether these tensors and the gradients are finite; returns whether the loss left out terms, and all of them.

        One host read, and only on steps on which a statistic would take them in.
        """
        if not (self._measuring or any(b.momentum or b.norm_state for b in self.plan.blocks)):
            return False, False
        self._noted = True
        own = (p for p in self.model.parameters() if self.served is None or p in self.served)
        tensors = check + [p.grad for p in own if p.grad is not None]
        finite = torch.stack([sums_to_finite(t) for t in tensors]).all() if tensors else torch.tensor(True)
        kept = [t.valid() for t in terms]
        flags = [finite, *(v.any() for v in kept), *(t.masked() for t in terms)]
        values = torch.stack(flags).tolist()
        self._finite = self._finite and values[0]
        return any(values[1 + len(kept) :]), bool(kept) and not any(values[1 : 1 + len(kept)])

    def forget_pass(self) -> None:
        """A new pass is judged by itself: whether an earlier one was finite shows in ``.grad`` at the end of the step."""
        self._finite, self._noted = True, False

    def _precondition(self) -> None:
        if self._asked != self.step:  # the user ran the passes; only gradients can be measured now
            self._check_passes()
        if not self._noted:
            self._note_finite([], [])
        try:
            if self._finite:
                self._solve()
            else:
                self.skipped += 1
            if self._measuring and not (self._finite and self._further):
                self._curvature_clock.retry(self.step + 1)
        finally:
            self._measuring, self._finite, self._noted, self._further = False, True, False, set()
            self._part = -1
            for block in self.plan.blocks:
                block.triple.representation.release(block.state)

    def gradients_are_finite(self) -> bool:
        """Whether those of the step are, at its end."""
        self._note_finite([], [])
        return self._finite

    def passes_are_due(self) -> bool:
        """Whether this step is to measure its passes; changes nothing."""
        undo, due = self._bookmark(), self.begin_pass()
        undo()
        return due

    def _check_passes(self) -> None:
        if self.passes_are_due() and any(p.grad is not None for p in self.model.parameters()):
            raise RuntimeError(
                "precondition: a measurement of the curvature is due and no forward pass was recorded in this step: "
                "declare the calls (setup_model_call, setup_loss_call, forward_and_backward), or attach(optimizer) before it"
            )
        self.begin_pass()

    def _bookmark(self) -> Callable[[], None]:
        clock = self._curvature_clock
        counters = {k: getattr(self, k) for k in ("_asked", "_measuring", "_finite", "_noted", "_part")}
        period = clock.begun, clock.next

        def undo() -> None:
            vars(self).update(counters)
            clock.begun, clock.next = period

        return undo

    @torch.no_grad()
    def _solve(self) -> None:
        if self._measuring:
            for curvature in self.plan.curvatures(of_passes=False):
                step = self._step(curvature, Tape(self.model, ()), [], False)
                step.part = 0  # it is that of all micro-batches together
                fold(curvature, step, 1.0, [b for b in self.plan.blocks if b.triple.curvature == curvature], self._further)
                self._ever |= self._further
        with plain_arithmetic(self.model):
            self._refresh()
            results = [r for r in map(self._result, self.plan.blocks) if r is not None]
            for block, value in results:
                block.write(value)

    def _refresh(self) -> None:
        self._failures.check()  # what was on its way from a device
        self._refresh_clock.tick(self.step)
        shares = [block.share if self.config.spread else 0.0 for block in self.plan.blocks]
        due = [self._refresh_clock.due(self.step, share) for share in shares]
        refreshed = [b for b, now in zip(self.plan.blocks, due, strict=True) if b.prepare(self._ever, now)]
        self._failures.note(refreshed, self.step)
        self._failures.check()

    def _result(self, block: Block) -> tuple[Block, Tensor] | None:
        raw = block.read()
        if raw is None or not block.cache:
            return None
        started = self.step >= self.config.first_step
        value = block.solve(raw, started)
        return (block, value) if started or (block.norm and block.norm.leads) else None

    # ---------------------------------------------------------------- riding another loop
    def attach(
        self,
        optimizer: Optimizer,
        likelihood: str | Likelihood | None = None,
        accumulation: int = 1,
        scaler: torch.amp.GradScaler | None = None,
    ) -> PreconditionedGradientMaker:
        """Precondition inside ``optimizer.step()`` of a loop that is not ours. Returns the maker: its hooks go with it.

        likelihood: what the model's output parametrises, for methods that need more than the gradient.
        accumulation: backward passes for each step of the optimizer, each with ``1 / accumulation`` of the loss.
        scaler: the loop's gradient scaler, if it has one; what is captured during its backward pass is unscaled.
        """
        refuse_again(self._attachments)
        likelihood = likelihood or self.config.likelihood
        self._attachments.append(Attachment(self, optimizer, likelihood, accumulation, scaler))
        weakref.finalize(self, remove_all, self._attachments)
        return self

    def remove(self) -> None:
        """Take every hook off the model and the optimizer."""
        remove_all(self._attachments)
        self.served = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not attached."""
        return {**vars(self), "_attachments": [], "served": None}

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
        for attachment in self._attachments:
            attachment.forget()
