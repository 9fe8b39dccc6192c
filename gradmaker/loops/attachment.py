"""Attachment of a maker to a training loop that does not call it: hooks on the model's call and on ``optimizer.step``."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmaker.capture.borrowing import borrowing, is_pass
from gradmaker.curvature.step import Extra
from gradmaker.loops import checks
from gradmaker.loops.hook import REFUSES, Hook, refuse_overlap
from gradmaker.loops.loop_pass import LoopPass, at_the_end
from gradmaker.loops.marks import Marks, any_nonzero, refuse_second, without_others
from gradmaker.loops.reader import LossReader, UndeclaredError
from gradmaker.loops.written_rows import WrittenRows
from gradmaker.loss.head import Head
from gradmaker.loss.likelihood import Likelihood
from gradmaker.step.protocol import RecordingMaker

__all__ = ["Attachment", "ChangedGradientWarning"]

FIRST_STEPS = 3
"""Steps at which ``.grad`` is checked for changes, besides those that measure passes."""


class ChangedGradientWarning(UserWarning):
    """``.grad`` was changed between the end of the backward pass and the step, as by clipping."""


class Attachment:
    """One maker attached to one optimizer.

    Extra passes run from a hook on the model's output (or on the loss that it calls), when its gradient arrives: the graph
    below is not freed yet. Their evidence stays in a draft until ``optimizer.step()``, where ``.grad`` tells whether the
    pass is part of the step: it is not if its backward pass wrote no gradient, or one that was zeroed or replaced since.
    One forward pass has one backward pass: a new forward pass replaces one that was not differentiated, and differentiating
    that later is an error.
    """

    def __init__(
        self,
        maker: RecordingMaker,
        optimizer: Optimizer,
        likelihood: str | Likelihood | None,
        accumulation: int | None,
        scaler: torch.amp.GradScaler | None = None,
        hooked: bool = True,
    ) -> None:
        """hooked: whether a step of the optimizer ends that of the maker; otherwise `end` does, before `stepping`"""
        inner = checks.inner_optimizer(optimizer)
        checks.check(maker, inner, accumulation)
        served = checks.held_by(inner)
        checks.check_parts(maker, served)
        refuse_overlap(maker, inner, hooked)
        self.reader = LossReader(checks.read_likelihood(likelihood), accumulation or 1)
        self.maker, self.optimizer = weakref.ref(maker), weakref.ref(inner)
        self.scaler, self._refusal = scaler, ""  # why a pass of this step could not be measured
        self._current: LoopPass | None = None
        self._rows = WrittenRows()
        self._marks: Marks | None = None  # gradients at the end of the last backward pass
        self._called = False  # whether the model was called since the last step
        self._watched: Sequence[str] = ()
        self._checks_left, self._warned = FIRST_STEPS, False
        self._served = served
        self._stepping, self.removed = hooked, False
        self.before_first: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None
        """Called once, with the arguments of the model's first pass that may be differentiated."""
        maker.serve(served)
        self._handles = [
            maker.model.register_forward_pre_hook(Hook(self, "before_forward"), with_kwargs=True),
            inner.register_step_pre_hook(Hook(self, "before_step" if hooked else REFUSES)),
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        if self._current is not None:
            self._current.unwatch()
        self.forget()
        self.removed = True
        for handle in self._handles:
            handle.remove()

    def name_at(self, optimizer: Optimizer) -> None:
        """Let other makers that are attached to this optimizer, which wraps that of the attachment, find its maker."""
        self._handles.append(optimizer.register_step_pre_hook(Hook(self)))

    def forget(self) -> None:
        """Forget the passes of a step that begins again, from other statistics."""
        self._release()
        self._rows.release()
        self._marks = None

    # ---------------------------------------------------------------- the forward pass
    def before_forward(self, model: Any, args: Any, kwargs: Any) -> None:
        """Record a pass that may be differentiated, on steps that measure curvature."""
        maker = self.maker()
        if maker is None or model is not maker.model or not is_pass():
            return
        maker.follow()
        if not maker.plan.own.called():
            return
        if self._current is not None and self._current.inside:
            self._current.depth += 1
            return
        self._release()
        maker.plan.refuse_ranks()
        self._serve(maker)
        self._called, self._watched = True, ()
        if self.before_first is not None:
            told, self.before_first = self.before_first, None
            told(args, kwargs)
        recorded = maker.begin_pass()
        if recorded or self._checks_left:
            self._current = LoopPass(maker.new_tape() if recorded else None, Hook(self, "after_forward"))
            self._current.begin(model, args, kwargs)
        self._rows.begin(maker.row_layers(), model if self._current is None else None)

    def after_forward(self, model: Any, args: Any, output: Any = None) -> None:
        """Put hooks on the outputs, for their gradients. ValueError for an output without logits."""
        current = self._current
        if current is None or not current.inside:
            return
        if current.depth:
            current.depth -= 1
            return
        self._rows.returned()
        current.leave(output)
        if output is None:  # an exception
            self._release()
        elif not current.watch(output, self, "arrive"):
            self._release()
            raise ValueError(checks.NO_LOGITS.format(type(output).__name__))
        else:
            self._watched = current.watched

    def _release(self) -> None:
        """Release a pass that was not differentiated, or whose forward pass raised an exception."""
        if self._current is not None:
            self._current.close()
            self._current = None

    # ---------------------------------------------------------------- the backward pass
    def arrive(self, current: LoopPass, place: str, gradient: Tensor) -> None:
        """Handle the gradient of an output: measure at the first one of a backward pass."""
        maker = self.maker()
        if maker is None or current is not self._current:
            return
        if current.at is not None:
            if current.tape is not None:
                current.compare(place, gradient)
            return
        current.at = place
        try:
            if current.tape is not None:
                self._measure(maker, current, gradient)
            at_the_end(partial(self._end_backward, weakref.ref(current)))
        except BaseException:
            current.again()
            raise

    def _measure(self, maker: RecordingMaker, current: LoopPass, gradient: Tensor) -> None:
        tape = current.tape
        assert tape is not None and current.at is not None
        current.scale = 1.0 if self.scaler is None else float(self.scaler.get_scale())
        self._kept(maker)
        current.before = Marks(self._parameters(maker))
        maker.step_state.judge_anew()
        current.gather(maker.model)
        with current.measuring():
            current.draft = maker.step_state.draft()
            with maker.meeting():
                try:
                    found = None if current.empty else self._terms(maker, current, gradient)
                except UndeclaredError as error:  # no matter, if the pass turns out to be part of no step
                    found, current.refusal = None, str(error)
            current.agree(maker, found is not None)
            if found is None or current.unread or current.refusal:
                return
            value, loss_gradient = found
            current.others.expect(current.losses[current.at].output if current.at in current.losses else value, gradient)
            outputs = [t.z for t in current.terms] or [value]
            head = Head(outputs, current.terms, known=[loss_gradient * current.factor])
            if maker.is_to_be_checked(tape, head) and bool(torch.isfinite(gradient).all()):
                maker.check(tape, head, None)
            current.terms = head.terms  # with rows in the order that the self-checks found
            current.draft = maker.step_state.draft()
            check, extra = [value, gradient], Extra(share=current.share)
            maker.measure_pass(current.draft, tape, current.terms, current.weight, check, head=head, extra=extra)

    def _terms(self, maker: RecordingMaker, current: LoopPass, gradient: Tensor) -> tuple[Tensor, Tensor] | None:
        """Find the terms of the loss, inside of the model or outside. Returns its argument there and ``dL/dz``, unscaled."""
        z = current.logits
        if current.at in current.losses:
            if self.scaler is None:
                checks.refuse_scale(gradient, 1 / self.reader.accumulation)
            current.weight = 1 / self.reader.accumulation
            return current.terms_inside(gradient, gradient / (current.weight * current.scale))
        assert z is not None
        terms = self.reader.terms(maker.arrangement, z, gradient, None if self.scaler is None else current.scale)
        current.weight = self.reader.weight
        current.terms = terms or []
        return None if terms is None else (z, gradient / (current.weight * current.scale))

    def arrive_again(self) -> None:
        """Handle a second backward pass through the same graph: an error if it reaches ``.grad``."""
        maker = self.maker()
        if maker is not None:
            at_the_end(partial(refuse_second, Marks(self._parameters(maker))))

    def _end_backward(self, reference: weakref.ref[LoopPass]) -> None:
        """Add the pass to the step, or drop it if its backward pass wrote no gradient, as `torch.autograd.grad`."""
        maker, current = self.maker(), reference()
        if maker is None or current is None or current is not self._current:
            return
        if current.tape is None:
            self._mark(maker)
            current.again()
            return
        if current.before is None or not current.before.moved():
            current.again()
            return
        tape, draft = current.tape, current.draft
        assert draft is not None
        current.look_at_other_outputs(maker.plan.curvatures(of_passes=True))
        maker.step_state.judge_anew()
        with torch.no_grad(), borrowing():
            gradients = tape.harvest()
            if not current.unread and not current.refusal:
                scale, extra = current.scale / current.factor, Extra(share=current.share)
                maker.measure_pass(draft, tape, current.terms, current.weight, [], gradients, extra=extra, scale=scale)
        maker.step_state.accumulate(current.weight, tape.batch, draft, unread=current.unread)
        self._refusal = current.refusal or self._refusal
        self._mark(maker)
        current.end()

    def _mark(self, maker: RecordingMaker) -> None:
        """Mark the gradients at the end of a backward pass, with their norms while a change is still to be told of."""
        self._marks = Marks(self._parameters(maker), norms=not self._warned)

    # ---------------------------------------------------------------- the step
    def before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """End the step: fold in the evidence of its passes, and precondition; with a closure, after it has run."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self.end()
            return None

        def preconditioned() -> Any:
            loss = closure()
            self.end()
            return loss

        return args[:1], {**kwargs, "closure": preconditioned}

    def refuse_step(self, *_: Any) -> None:
        """RuntimeError for a step outside of `stepping`, which would use the raw gradient."""
        if not self._stepping:
            raise RuntimeError(checks.BARE_STEP)

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Let the optimizer step inside of the context, where the maker's step has ended."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def end(self) -> bool:
        """End the maker's step. Returns whether there was one: not if no pass was seen and all gradients are zero."""
        maker = self.maker()
        if maker is None:
            return False
        maker.follow()
        maker.plan.own.check()
        self._release()
        maker.plan.refuse_ranks()
        self._serve(maker)
        if not self._kept(maker) and not self._steps_unmeasured(maker):
            return False
        if self._refusal:
            raise UndeclaredError(self._refusal)
        self._warn_of_changes(maker)
        with without_others(maker.model, self._served), maker.step_state.holding(self._rows.proven(self._served)):
            maker.step_state.judge_anew()
            maker.precondition()
        self._rows.release()
        self._marks = None
        self._called = False
        return True

    def _kept(self, maker: RecordingMaker) -> bool:
        """Whether the gradient of the measured passes of this step is still in ``.grad``; otherwise they are dropped."""
        state = maker.step_state
        if state.now.part and (self._marks is None or not self._marks.alive()):
            state.drop()
        self._refusal = self._refusal if state.now.part else ""
        return state.now.part > 0

    def _steps_unmeasured(self, maker: RecordingMaker) -> bool:
        """Whether to make a step although no pass was measured. RuntimeError if a measurement is due."""
        due = maker.passes_are_due()
        if not due and self._called:
            return True
        if not any_nonzero(self._parameters(maker)):
            return False
        if due:
            raise RuntimeError(checks.missing(self._called, self._watched))
        return True

    def _warn_of_changes(self, maker: RecordingMaker) -> None:
        """Warn once if ``.grad`` was changed after the backward pass; that of other parameters is another maker's."""
        self._checks_left = max(0, self._checks_left - 1)
        if self._marks is None or self._warned:
            return
        treated = {p for b in maker.plan.blocks for s in b.sites for p in s.parameters.values()}
        if self._marks.changed(treated, self.scaler):
            self._warned, self._checks_left = True, 0
            warnings.warn(checks.CHANGED, ChangedGradientWarning, stacklevel=2)

    # ---------------------------------------------------------------- parameters of the optimizer
    def follow(self) -> None:
        """Follow the parameter groups of the optimizer at once. ValueError as at the attachment."""
        if (maker := self.maker()) is not None:
            self._serve(maker)

    def _serve(self, maker: RecordingMaker) -> None:
        """Follow changes of the parameter groups of the optimizer."""
        optimizer = self.optimizer()
        if optimizer is not None and (served := checks.held_by(optimizer)) != self._served:
            checks.check_parts(maker, served)
            self._served = served
            maker.serve(served)

    def _parameters(self, maker: RecordingMaker) -> list[nn.Parameter]:
        return [p for p in maker.plan.own.all if p in self._served]
