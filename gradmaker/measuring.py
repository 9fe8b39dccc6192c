"""A maker's passes: what is recorded of them, what is proven of it, and what curvatures are measured on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradmaker.capture.borrowing import borrowing
from gradmaker.capture.sites import Site
from gradmaker.capture.tape import OutputGradients, Tape
from gradmaker.config import GradientConfig
from gradmaker.curvature import Curvature, Evidence, Pooled, Watching
from gradmaker.curvature.step import NOTHING, Extra, Previous, Step, scaled
from gradmaker.linalg.arithmetic import plain_arithmetic, sums_to_finite
from gradmaker.loss.head import Head
from gradmaker.loss.likelihood import Terms
from gradmaker.loss.recorder import LossRecorder
from gradmaker.maker import GradientMaker
from gradmaker.options.registry import METHODS
from gradmaker.passes.batches import Batch, Batches, terms_of
from gradmaker.passes.deferred import resolve
from gradmaker.passes.graph import Graph
from gradmaker.plan import Plan, PlanClocks, make_plan
from gradmaker.scale.ranks import ranks
from gradmaker.self_checks import Inputs, SelfChecks
from gradmaker.self_checks.whole import Whole
from gradmaker.stacking import carry
from gradmaker.step.ledger import WHOLE_STEP, Ledger
from gradmaker.step.pending import Pending
from gradmaker.step.pool import Pool
from gradmaker.step.previous import bookmark, complete

__all__ = ["MeasuringMaker"]


class MeasuringMaker(GradientMaker):
    """A maker that measures curvatures on its passes."""

    Config: ClassVar[type[GradientConfig]]
    config: GradientConfig

    def __init__(self, model: nn.Module, config: GradientConfig | None = None) -> None:
        super().__init__(model, config)
        self.plan = make_plan(model, self.config, METHODS)
        self._unseen: frozenset[str] = frozenset()  # parameters with uses that their layers do not show
        self.checks = SelfChecks(model, self.config.self_check, self.config.seed)
        self.whole = Whole(self.checks, self.config.loss_reduction)
        self.served: frozenset[nn.Parameter] | None = None  # those that the attached optimizer holds; None: all
        self._clocks = PlanClocks(self.plan)
        self._asked = -1  # the step for which the clocks have been asked
        self._due: frozenset[str] = frozenset()  # methods of the plan that measure their curvature in this step
        self._finite = True
        self._noted = False  # whether anything of this step was checked for being finite
        self._part = -1  # the micro-batch of this step that is under way
        self._previous: Previous | None = None
        self._ledger = Ledger()  # of the step that is under way
        self._pool = Pool()  # evidence that the micro-batches of this step make together
        self._ever: set[str] = set()  # sites that had given evidence before this step

    def purposes(self) -> frozenset[str]:
        return self.plan.purposes()

    # ---------------------------------------------------------------- passes
    def begin_pass(self, counted: bool = True) -> bool:
        """Whether the coming pass is to be recorded.  counted: whether it is known to be part of the step"""
        self._begin_again()
        if self._asked != self.step:
            self._due, self._asked = self._clocks.measure(self.step), self.step
        self._part += counted
        return any(self.plan.sites(c, self._due, self.served) for c in self._curvatures())

    def _curvatures(self) -> list[Curvature]:
        """Those that are measured on the passes of this step."""
        return self.plan.curvatures(of_passes=True, due=self._due)

    def new_tape(self, everything: bool = False) -> Tape:
        """A tape of the modules that this step's curvatures speak of and need besides; or those of ``everything``."""
        due = None if everything else self._due
        recorded = [c for c in self.plan.curvatures(of_passes=True, due=due) if "calls" in c.needs]
        own = (m for c in recorded for s in self.plan.sites(c, due, self.served) for m in s.modules)
        modules = dict.fromkeys((*own, *(m for c in recorded if isinstance(c, Watching) for m in c.watches(self.model))))
        tape = Tape(self.model, modules, self.checks.arrangement, self.config.batch_axis)
        tape.assume(self._declared[""].counted(self.config.batch_axis) if self._declared else None)
        return tape

    def _run(self, weight: float) -> tuple[Any, Tensor]:
        self.plan.refuse_ranks()
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
            checked = self.is_to_be_checked(tape, head)
            if batches is not None:
                batches.own.note(terms)
            make = partial(Graph, self.model, loss, terms, logits)
            kept = checked or tape.joint or not self.checks.arrangement.plain
            graph, output_gradients = self._backward(tape, make, loss, weight, batches, kept)
            if graph is not None and self._guesses(graph) and self._all_finite(loss):
                self.whole.products(tape, graph, head)
            if self._explains(tape, head, checked) and self._all_finite(loss):
                bare = Head.of(loss, output if logits is None else logits, [], recorder)
                one = torch.ones_like(loss).unsqueeze(0)
                whole = scaled(output_gradients, 1 / weight) if weight else tape.vjp([loss], [one])
                head = self.explain(tape, head, bare, whole, checked)
                terms, checked = head.terms, self.is_to_be_checked(tape, head)
            if checked and self._all_finite(loss):
                self.check(tape, head, scaled(output_gradients, 1 / weight) if weight else None, weight)
            terms = head.terms or terms  # in the order of rows that was found
            extra = Extra(graph, batches, self._previous, own=partial(self._own_batch, batches))
            pending = self.measure_pass(tape, terms, weight, [loss], head=head, extra=extra)
            self.fold_pass(self.measure_pass(tape, terms, weight, [], output_gradients, head, extra, pending=pending))
        if batches is not None and self.plan.asks("previous", self._due) and self._finite:
            self._previous = bookmark(self, batches.own.replay, weight, extra.notes)
        return output, loss

    def _own_batch(self, batches: Batches | None) -> Batch:
        return Batch(self.model, self._declared[""], self.config) if batches is None else batches.own

    def _repeats(self) -> bool:
        return self.plan.asks("replay", self._due) or self.plan.asks("previous", self._due) or len(self._declared) > 1

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
            retained = kept or any("main_backward" not in c.needs for c in self._curvatures())
            (loss * weight if weight != 1.0 else loss).backward(retain_graph=retained)

        output_gradients = tape.collect(differentiate)
        if shared:
            return made[0], scaled(output_gradients, weight)
        if not products or batches is None:
            return None, output_gradients
        with tape.paused(), borrowing():
            return batches.curvature.graph(), output_gradients

    # ---------------------------------------------------------------- self-checks
    def recorded_sites(self) -> list[Site]:
        """The sites that are measured by their calls."""
        recorded = [c for c in self._curvatures() if "calls" in c.needs]
        return [s for c in recorded for s in self.plan.sites(c, self._due, self.served) if not s.frozen]

    def is_to_be_checked(self, tape: Tape, head: Head) -> bool:
        """Whether a pass is the first of its kind."""
        structure = self.checks.arrange(tape, head)
        return bool(self.recorded_sites()) and self.checks.due(structure, head)

    def _guesses(self, graph: Graph) -> bool:
        """Whether products need outputs that nobody has named."""
        asked = any("outputs" in c.needs for c in self._curvatures()) and self.config.self_check == "fallback"
        return asked and not graph.outputs and self.config.likelihood is None

    def _explains(self, tape: Tape, head: Head, checked: bool) -> bool:
        """Whether it is to be seen to that the terms of a pass are all of a loss, of which nothing is declared."""
        own = any(c.needs & {"calls", "main_backward"} == {"calls"} for c in self._curvatures())
        if self.config.self_check != "fallback" or not own:
            return False
        if not head.terms:
            return self.config.likelihood is None and (tape.batch > 0 or not tape.sized)
        return not head.declared and (checked or tape.structure(head.outputs) in self.checks.arrangement.whole)

    def explain(self, tape: Tape, head: Head, bare: Head, output_gradients: OutputGradients, checked: bool) -> Head:
        """The head of a pass whose terms are all of the loss; see `Whole.explain`."""
        with plain_arithmetic(self.model), borrowing():
            return self.whole.explain(tape, head, bare, output_gradients, checked)

    def check(self, tape: Tape, head: Head, output_gradients: OutputGradients | None, weight: float = 0.0) -> None:
        """Make the self-checks on a pass, and measure by their verdict from here on.

        output_gradients: of the whole loss, where they are known. weight: of it in ``.grad``; 0: others are in there
        """
        curvatures = [c for c in self._curvatures() if "calls" in c.needs]
        owned = any("main_backward" not in c.needs for c in curvatures) and not head.declared
        explained = owned and self.config.self_check == "error"  # else `explain` has seen to it
        own = {p: p.grad / weight for p in self.model.parameters() if p.grad is not None} if weight and ranks() == 1 else None
        costly = any("seed" in c.inapplicable or self._whole(c) for c in curvatures)
        shares = any("main_backward" in c.needs and "loss_reduction" not in c.inapplicable for c in curvatures)  # of examples
        output_gradients = output_gradients if explained or shares else None
        triples = [b.triple for b in self.plan.measured(self._due) if "calls" in b.triple.curvature.needs]
        inputs = Inputs.of(self.model, self._call, tape, triples, self.config.batch_axis)
        with plain_arithmetic(self.model), borrowing():
            written = own if owned or head.whole else None
            unseen = self.checks.run(tape, self.recorded_sites(), head, output_gradients, explained, costly, inputs, written)
        if unseen - self._unseen:
            self.plan_again(self._unseen | unseen)

    def plan_again(self, unseen: frozenset[str]) -> None:
        """Leave the layers of some parameters to what measures them rightly; all others keep what they hold."""
        plan = make_plan(self.model, self.config, METHODS, unseen)
        carry(self.plan.blocks, plan.blocks)
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

    # ---------------------------------------------------------------- evidence
    def measure_pass(
        self,
        tape: Tape,
        terms: list[Terms],
        weight: float,
        check: list[Tensor],
        output_gradients: OutputGradients | None = None,
        head: Head | None = None,
        extra: Extra = NOTHING,
        scale: float = 1.0,
        pending: Pending | None = None,
    ) -> Pending:
        """Measure the curvatures of a recorded pass; `fold_pass` makes what is found the statistics.

        output_gradients: of the backward pass, for those that need just these; the others are measured without.
        scale: factor of the loss that was differentiated, besides its weight (that of a GradScaler).
        pending: what was measured of this step before, to be added to
        """
        pending = Pending(set(self._ledger.further)) if pending is None else pending
        masked, empty = self._note_finite(check, terms)
        empty |= tape.sized and not tape.batch
        if not self._finite:
            return pending
        if output_gradients is not None:
            output_gradients = scaled(output_gradients, 1 / (weight * scale))
        for curvature in self._curvatures():
            held = curvature not in self.plan.per_step  # a statistic accumulates no loss without terms
            if ("main_backward" in curvature.needs) == (output_gradients is not None) and not (empty and held):
                step = self._step(curvature, tape, terms, masked, self._due)
                if not step.sites:
                    continue
                step.output_gradients, step.head, step.notes, step.own = output_gradients, head, extra.notes, extra.own
                step.part = self._part if pending.part is None else pending.part
                step.graph, step.batches, step.previous = extra.graph, extra.batches, extra.previous
                if curvature.layerwise:
                    step.check_calls()
                self._ledger.note(step.part, weight, step.examples)
                with plain_arithmetic(self.model), borrowing():
                    self._hold(pending, curvature, curvature.measure(step), weight, step.part)
        return pending

    def _hold(
        self, pending: Pending, curvature: Curvature, chunks: Iterable[Mapping[str, Evidence]], weight: float, part: int
    ) -> None:
        if isinstance(curvature, Pooled):
            pending.pooled.append((curvature, list(chunks), weight))
            return
        pending.take(chunks, self._clocks.folds(curvature, self._due, self.step, weight), part, self._ledger, self._ever)

    def fold_pass(self, pending: Pending) -> None:
        """Make measured statistics those of the maker."""
        if pending.part is not None:
            self._part = pending.passes - 1
        pending.fold(self._ledger, self._pool)

    def _fold(self, curvature: Curvature, chunks: Iterable[Mapping[str, Evidence]]) -> None:
        """What is measured once a step, from its gradient, enters the statistics."""
        folds, ledger = self._clocks.folds(curvature, self._due, self.step, 1.0), self._ledger
        with plain_arithmetic(self.model), borrowing(), torch.no_grad():
            for index, chunk in enumerate(chunks):
                for block, fold in folds.items():
                    block.update(chunk, fold, ledger.further, ledger.folded(WHOLE_STEP, index), self._ever)

    @property
    def measured(self) -> set[str]:
        """Names of the sites that have given evidence at all."""
        return self._ever | self._ledger.further

    def _step(
        self,
        curvature: Curvature,
        tape: Tape | None = None,
        terms: Iterable[Terms] = (),
        masked: bool = False,
        due: frozenset[str] | None = None,
    ) -> Step:
        """What a curvature may know; without a tape when the passes are over.  due: methods whose sites it speaks of"""
        c = self.config
        sites = [s for s in self.plan.sites(curvature, due, self.served) if not s.frozen]
        step = Step(self.step, c.seed, sites, c.statistics_dtype(), tape or Tape(self.model, ()), list(terms))
        step.reduction, step.masked, step.part = c.loss_reduction, masked, self._part
        step.whole = self._whole(curvature)
        return step

    # ---------------------------------------------------------------- what is finite
    def _all_finite(self, loss: Tensor) -> bool:
        self._note_finite([loss], [])
        return self._finite

    @torch.no_grad()
    def _note_finite(self, check: list[Tensor], terms: list[Terms]) -> tuple[bool, bool]:
        """Record whether these tensors and the gradients are finite; returns whether the loss left out terms, and all of them.

        One host read, and only on steps on which a statistic would take them in.
        """
        if not (self._due or any(b.options.momentum or b.grafting_state for b in self.plan.blocks)):
            return False, False
        self._noted = True
        served = self.served
        own = (p for p in self.model.parameters() if served is None or p in served)
        tensors = check + [p.grad for p in own if p.grad is not None]
        finite = torch.stack([sums_to_finite(t) for t in tensors]).all() if tensors else torch.tensor(True)
        kept = [t.valid() for t in terms]
        flags = [finite, *(v.any() for v in kept), *(t.masked() for t in terms)]
        values = torch.stack(flags).tolist()
        self._finite = self._finite and values[0]
        return any(values[1 + len(kept) :]), bool(kept) and not any(values[1 : 1 + len(kept)])

    def gradients_are_finite(self) -> bool:
        """Whether those of the step are, at its end."""
        self._note_finite([], [])
        return self._finite

    def forget_pass(self) -> None:
        """A new pass is judged by itself: whether an earlier one was finite shows in ``.grad`` at the end of the step."""
        self._finite, self._noted = True, False
