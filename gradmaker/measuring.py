"""The passes of a maker: recording, self-checks, and measurement of curvatures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from gradmaker.blocks import Block
from gradmaker.capture.borrowing import borrowing
from gradmaker.capture.row_calls import RowCalls
from gradmaker.capture.sharded import local
from gradmaker.capture.sites import Site
from gradmaker.capture.tape import OutputGradients, Tape
from gradmaker.curvature import Curvature
from gradmaker.curvature.evidence import Evidence
from gradmaker.curvature.roles import OfSecants, Pooled
from gradmaker.curvature.step import NOTHING, Extra, Pass, scaled
from gradmaker.linalg.arithmetic import norms, plain_arithmetic, sums_to_finite, total
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.loss.head import Head
from gradmaker.loss.recorder import LossRecorder
from gradmaker.loss.share import Share
from gradmaker.loss.terms import Terms
from gradmaker.on_ranks import scaled_loss
from gradmaker.passes.batches import Batch, Batches, terms_of
from gradmaker.passes.deferred import resolve
from gradmaker.passes.graph import Graph
from gradmaker.planned import PlannedMaker
from gradmaker.scale.evidence import measure_part, put_together, sum_pooled
from gradmaker.self_checks import Inputs
from gradmaker.step.draft import Draft
from gradmaker.step.pool import PooledEvidence
from gradmaker.step.secants import remembered

__all__ = ["MeasuringMaker"]


class MeasuringMaker(PlannedMaker):
    """A maker that measures curvatures on its passes."""

    # ---------------------------------------------------------------- passes
    def _run(self, weight: float, alone: bool = False) -> tuple[Any, Tensor]:
        self._refuse_ranks()
        self.plan.own.check()
        self._complete()
        recorded = self.begin_pass()
        rows = RowCalls(self.row_layers() if alone else ())
        if not recorded:
            return self._run_unrecorded(weight, rows)
        tape, known = self.new_tape(), dict[int, Any]()
        batches = Batches.of(self.model, self._declared, self.config) if self._repeats() else None
        with tape.recording():
            with LossRecorder() as recorder, rows.recording():
                output, plain = self._forward(known)
            tape.end_forward([plain])
            share = self._count(recorder, plain, weight)
            if share is not None and share.empty:
                self._meet_in_backward(output)
                self._measure_nothing(weight, batches)
                return output, plain
            loss = scaled_loss(plain, share)
            logits = None if self._logits is None else resolve(self._logits, known)
            terms = terms_of(recorder, loss, logits, self.config.likelihood, 1.0 if share is None else share.factor)
            head = Head.of(loss, output, terms, recorder)
            checked = self.is_to_be_checked(tape, head)
            if batches is not None:
                batches.own.note(terms)
            make = partial(Graph, self.model, loss, terms, logits)
            kept = checked or tape.joint or not self.checks.arrangement.plain
            graph, output_gradients = self._backward(tape, make, loss, weight, batches, kept, rows)
            if graph is not None and self._needs_outputs(graph) and self._all_finite(loss):
                self.whole.products(tape, graph, head)
            if self._explains(tape, head, checked) and self._all_finite(loss):
                bare = Head.of(loss, output if logits is None else logits, [], recorder)
                one = torch.ones_like(loss).unsqueeze(0)
                whole = scaled(output_gradients, 1 / weight) if weight else tape.vjp([loss], [one])
                head = self.explain(tape, head, bare, whole, checked)
                terms, checked = head.terms, self.is_to_be_checked(tape, head)
            held = rows.gradients()
            if checked and self._all_finite(loss):
                with rows.written(held):
                    self.check(tape, head, scaled(output_gradients, 1 / weight) if weight else None, weight)
                held = rows.kept(held, self.row_layers())  # there may be another plan
            terms = head.terms or terms  # with rows in the order that the self-checks found
            of_all = [] if self._is_partial(tape, head, output_gradients, weight, checked) else terms
            extra = Extra(graph, batches, self.step_state.now.previous, own=partial(self._own_batch, batches), share=share)
            draft = self.step_state.draft()
            self.measure_pass(draft, tape, terms, weight, [loss, *_bounds(held)], head=head, extra=extra, last=alone)
            self.measure_pass(draft, tape, of_all, weight, [], output_gradients, head, extra, last=alone)
            self.step_state.accumulate(weight, tape.batch, draft)
            self.step_state.hold(held)
        self._remember(batches, weight * (1.0 if share is None else share.factor), extra)
        return output, plain

    def _measure_nothing(self, weight: float, batches: Batches | None) -> None:
        """The pass of a rank without examples: secants have its earlier micro-batches."""
        draft, extra = self.step_state.draft(), Extra(previous=self.step_state.now.previous)
        for curvature in (c for c in self._curvatures() if isinstance(c, OfSecants)):
            step = self._step(curvature, draft.part, self._due, extra=extra)
            self._take(draft, curvature, curvature.measure(step), weight)
        self.step_state.accumulate(weight, 0, draft)
        self._remember(batches, 0.0, extra)

    def _remember(self, batches: Batches | None, weight: float, extra: Extra) -> None:
        """Keep a pass for the secants of this step.  weight: of its loss in that of the step of all ranks"""
        if batches is not None and self.plan.asks("previous", self._due) and self.step_state.now.finite:
            made = Pass(batches.own.replay, weight, extra.notes)
            measured = self.plan.measured(self._due)
            self.step_state.remember(remembered(self.step_state.now, self.model, made, measured))

    def _count(self, recorder: LossRecorder | None, loss: Tensor, weight: float) -> Share | None:
        """The share of this rank's pass in that of all ranks."""
        examples = self._declared[""].counted(self.config.batch_axis)
        return self._share(recorder, loss, examples, weight, self.config.loss_reduction)

    def _run_unrecorded(self, weight: float, rows: RowCalls) -> tuple[Any, Tensor]:
        with self._noting_losses() as recorder, rows.recording():
            output, plain = self._forward(dict[int, Any]())
        share = self._count(recorder, plain, weight)
        self.step_state.accumulate(weight, 0)
        if share is not None and share.empty:
            self._meet_in_backward(output)
            return output, plain
        loss = scaled_loss(plain, share)
        rows.backward(loss * weight if weight != 1.0 else loss)
        held = rows.gradients()
        self.step_state.hold(held)
        self._note_finite([loss, *_bounds(held)], [])
        return output, plain

    def _is_partial(self, tape: Tape, head: Head, found: OutputGradients, weight: float, checked: bool) -> bool:
        """Whether gradients of examples are weighted by `loss_reduction`, as the recognised terms are not all of the loss."""
        by_example = any("main_backward" in c.needs and "loss_reduction" not in c.inapplicable for c in self._curvatures())
        if not by_example or head.declared or self.config.self_check == "off":
            return False
        with plain_arithmetic(self.model), borrowing():
            return self.whole.is_partial(tape, head, scaled(found, 1 / weight) if checked and weight else None)

    def _own_batch(self, batches: Batches | None) -> Batch:
        return Batch(self.model, self._declared[""], self.config) if batches is None else batches.own

    def _repeats(self) -> bool:
        return self.plan.asks("replay", self._due) or self.plan.asks("previous", self._due) or len(self._declared) > 1

    def _backward(
        self,
        tape: Tape,
        make: Callable[[], Graph],
        loss: Tensor,
        weight: float,
        batches: Batches | None,
        kept: bool,
        rows: RowCalls,
    ) -> tuple[Graph | None, OutputGradients]:
        """The backward pass, with its output gradients; and the graph for products, of this pass or of a second batch."""
        products = self.plan.asks("graph", self._due)
        shared = products and (batches is None or batches.shared)
        made: list[Graph] = []

        def differentiate() -> None:
            if shared:
                made.append(make())
                made[0].write_gradients(weight)
                return
            retained = kept or any("main_backward" not in c.needs for c in self._curvatures())
            rows.backward(loss * weight if weight != 1.0 else loss, retained)

        output_gradients = tape.collect(differentiate)
        if shared:
            return made[0], scaled(output_gradients, weight)
        if not products or batches is None:
            return None, output_gradients
        with tape.paused(), borrowing():
            return batches.curvature.graph(), output_gradients

    # ---------------------------------------------------------------- self-checks
    def recorded_sites(self) -> list[Site]:
        """The sites that are measured by the calls of their layers."""
        recorded = [c for c in self._curvatures() if "calls" in c.needs]
        return [s for c in recorded for s in self.plan.sites(c, self._due, self.served) if not s.frozen]

    def is_to_be_checked(self, tape: Tape, head: Head) -> bool:
        """Whether a pass is the first of its structure, and has to be checked."""
        structure = self.checks.arrange(tape, head)
        return bool(self.recorded_sites()) and self.checks.due(structure, head)

    def _needs_outputs(self, graph: Graph) -> bool:
        """Whether products need outputs that were not declared."""
        asked = any("outputs" in c.needs for c in self._curvatures()) and self.config.self_check == "fallback"
        return asked and not graph.outputs and self.config.likelihood is None

    def _explains(self, tape: Tape, head: Head, checked: bool) -> bool:
        """Whether to prove that the terms of a pass make up the whole loss, where no likelihood is declared."""
        own = any(c.needs & {"calls", "main_backward"} == {"calls"} for c in self._curvatures())
        if self.config.self_check != "fallback" or not own:
            return False
        if not head.terms:
            return self.config.likelihood is None and (tape.batch > 0 or not tape.sized)
        return not head.declared and (checked or tape.structure(head.outputs) in self.checks.arrangement.whole)

    def explain(self, tape: Tape, head: Head, bare: Head, output_gradients: OutputGradients, checked: bool) -> Head:
        """The head of a pass, with terms that make up the whole loss; see `Whole.explain`."""
        with plain_arithmetic(self.model), borrowing():
            return self.whole.explain(tape, head, bare, output_gradients, checked)

    def check(self, tape: Tape, head: Head, output_gradients: OutputGradients | None, weight: float = 0.0) -> None:
        """Run the self-checks on a pass; later measurements follow their findings.

        output_gradients: of the whole loss, if known. weight: share of it in ``.grad``; 0: other losses are in there too
        """
        curvatures = [c for c in self._curvatures() if "calls" in c.needs]
        owned = any("main_backward" not in c.needs for c in curvatures) and not head.declared
        explained = owned and self.config.self_check == "error"  # otherwise `explain` has checked it
        given = {p: p.grad for p in self.model.parameters() if p.grad is not None} if weight else None
        own = given if given is None or weight == 1 else {p: g / weight for p, g in given.items()}
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

    # ---------------------------------------------------------------- evidence
    def measure_pass(
        self,
        draft: Draft,
        tape: Tape,
        terms: list[Terms],
        weight: float,
        check: list[Tensor],
        output_gradients: OutputGradients | None = None,
        head: Head | None = None,
        extra: Extra = NOTHING,
        scale: float = 1.0,
        last: bool = False,
    ) -> None:
        """Measure the curvatures of a recorded pass into a draft, if all tensors are finite.

        output_gradients: of the backward pass, for curvatures that need just these; the others are measured without.
        scale: factor of the loss that was differentiated, beside its weight (that of a GradScaler).
        last: whether this pass is all of the step, which ends at once.
        """
        with_outputs = output_gradients is not None
        curvatures = [c for c in self._curvatures() if ("main_backward" in c.needs) == with_outputs]
        if not curvatures and not check:
            return
        masked, empty = self._note_finite(check, terms if curvatures else [])
        empty |= tape.sized and not tape.batch
        if not self.step_state.now.finite:
            return
        if output_gradients is not None:
            output_gradients = scaled(output_gradients, 1 / (weight * scale))
        for curvature in curvatures:
            held = curvature not in self.plan.per_step  # a statistic accumulates no loss without terms
            if not (empty and held):
                step = self._step(curvature, draft.part, self._due, tape, terms, masked, output_gradients, head, extra)
                if not step.sites:
                    continue
                if curvature.layerwise:
                    step.check_calls()
                with plain_arithmetic(self.model), borrowing():
                    self._take(draft, curvature, curvature.measure(step), weight, examples=tape.batch, last=last)

    def _take(
        self,
        draft: Draft,
        curvature: Curvature,
        chunks: Iterable[Mapping[str, Evidence]],
        weight: float,
        pooled: bool = True,
        done: Set[Block] = frozenset(),
        examples: int = 0,
        last: bool = False,
    ) -> None:
        """pooled: whether evidence of a `Pooled` curvature is kept for the end of the step; done: blocks to be left out.

        examples: of the pass; last: as in `Draft.fold`
        """
        if isinstance(curvature, Pooled) and pooled:
            draft.pool(curvature, chunks, weight)
            return
        blocks = [b for b in self.plan.measured(self._due) if b.triple.curvature == curvature and b not in done]
        folds = self.step_state.folds(blocks, weight)
        if curvature.of_passes and pooled and self.ranks is not None:
            draft.keep(measure_part(curvature, chunks, folds, examples))
            return
        draft.fold(chunks, folds, self.step_state.now.ever, last and self.ranks is None)

    # ---------------------------------------------------------------- several processes
    def _put_together(self, draft: Draft) -> None:
        """Fold the evidence that the ranks have kept for the end of the step into a draft."""
        if (ranks := self.ranks) is not None:
            with plain_arithmetic(self.model):
                put_together(ranks, self.model, self.plan, self.step_state, draft)

    def _pooled(self) -> PooledEvidence:
        """The pooled evidence of this step, of all ranks."""
        pooled, ranks = self.step_state.now.work.pooled, self.ranks
        return pooled if ranks is None else sum_pooled(ranks, self.plan, self._due, pooled)

    # ---------------------------------------------------------------- what is finite
    def _all_finite(self, loss: Tensor) -> bool:
        self._note_finite([loss], [])
        return self.step_state.now.finite

    @torch.no_grad()
    def _note_finite(self, check: list[Tensor], terms: list[Terms]) -> tuple[bool, bool]:
        """Record whether these tensors and the gradients are finite. Returns whether the loss masks terms, and whether all.

        One host read, and only on steps that could add them to a statistic.
        """
        if not (self._due or self.plan.averages):
            return False, False
        served = self.served
        grads = [local(p.grad) for p in self.plan.own.all if p.grad is not None and (served is None or p in served)]
        dense = [g for g in grads if g.layout is torch.strided and not g.is_complex()]
        others = [g for g in grads if g.layout is not torch.strided or g.is_complex()]
        kept = [t.valid() for t in terms]
        totals = [total(t) for t in (*check, *others)]
        read = [*norms(dense), *totals, *(v.any() for v in kept), *(t.masked() for t in terms)]
        values = torch.stack(read).tolist() if read else []
        sizes, sums = values[: len(dense)], values[len(dense) : len(dense) + len(totals)]
        kept_any, masked = (values[len(values) - k * len(terms) :][: len(terms)] for k in (2, 1))
        regular = all(map(isfinite, sizes)) or bool(torch.stack([sums_to_finite(g) for g in dense]).all())
        seen = tuple(zip(dense, (g._version for g in dense), sizes, strict=True))
        self.step_state.note(regular and all(map(isfinite, sums)), seen)
        return any(masked), bool(kept) and not any(kept_any)

    def _check_again(self) -> None:
        """Check the gradients, unless the last check saw them as they are now."""
        seen = {id(g): version for g, version, _ in self.step_state.now.norms}
        grads = (p.grad for p in self.plan.own.all if p.grad is not None)
        if any(seen.get(id(g)) != g._version for g in grads):
            self._note_finite([], [])


def _bounds(rows: Mapping[str, FactoredGradient]) -> list[Tensor]:
    """Numbers that are finite where gradients that are held by rows are."""
    return [each.bound() for each in rows.values()]
