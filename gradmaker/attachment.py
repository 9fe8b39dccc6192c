"""Riding a loop that is not ours: hooks on the model's call and on ``optimizer.step``."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradmaker.capture import Tape
from gradmaker.curvature.likelihood import LIKELIHOODS, Categorical, Likelihood, Terms, find_likelihood, terms_from_gradient

if TYPE_CHECKING:
    from gradmaker.preconditioner import PreconditionedGradientMaker

__all__ = ["Attachment"]


class _Hook:
    """Calls a method of an attachment that may be gone; a copied or pickled model gets one that does nothing."""

    def __init__(self, owner: Attachment | None = None, verb: str = "") -> None:
        self.owner, self.verb = (None if owner is None else weakref.ref(owner)), verb

    def __call__(self, *args: Any) -> Any:
        owner = self.owner and self.owner()
        return None if owner is None else getattr(owner, self.verb)(*args)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class Attachment:
    """One maker on one optimizer.

    Extra passes run from a hook on the model's output, at the moment when its gradient arrives: the graph below is still
    whole then, and that gradient shows which terms the loss left out. One forward pass goes with one backward pass: a new
    one takes the place of a pass that was not differentiated, and differentiating that later is an error.
    """

    def __init__(
        self,
        maker: PreconditionedGradientMaker,
        optimizer: Optimizer,
        likelihood: str | Likelihood | None,
        accumulation: int,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        _check(maker, optimizer, likelihood, accumulation)
        self.maker = weakref.ref(maker)
        self.likelihood = _read(likelihood)
        self.weight, self.scaler = 1.0 / accumulation, scaler
        self._stack = ExitStack()
        self._tape: Tape | None = None
        self._output: Tensor | None = None  # of the pass under way
        self._arrival: Any = None  # handle of the hook on it
        self._terms: list[Terms] | None = None  # of the pass under way, once its output's gradient is there
        model = maker.model
        self._handles = [
            model.register_forward_pre_hook(_Hook(self, "before_forward"), with_kwargs=True),
            optimizer.register_step_pre_hook(_Hook(self, "before_step")),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        self._drop()
        if self._arrival is not None:
            self._arrival.remove()
        for handle in self._handles:
            handle.remove()

    # ---------------------------------------------------------------- hooks
    def before_forward(self, model: Any, args: Any, kwargs: Any) -> None:
        """Start a tape for a pass that will be differentiated, on steps that measure curvature."""
        maker = self.maker()
        if maker is None or not torch.is_grad_enabled() or not maker.plan.own.called():
            return
        self._finish()
        maker.forget_pass()
        if not maker.begin_pass():
            return
        self._tape = maker.new_tape()
        self._tape.note_examples(model, args, kwargs)
        self._stack.enter_context(self._tape.recording(sized=True))
        after = model.register_forward_hook(_Hook(self, "after_forward"))  # the last: the model may be a layer itself
        self._stack.callback(after.remove)

    def after_forward(self, model: Any, args: Any, output: Any) -> None:
        """Wait for the gradient of the model's output."""
        tape = self._tape
        if tape is None or self._output is not None or not torch.is_grad_enabled():
            return
        tape.end_forward()
        z = _logits(output)
        if z is None:
            self._drop()
            raise ValueError(
                f"attach: no logits in the model's output, {type(output).__name__}: expected a tensor, a part named 'logits', "
                "or a tuple or mapping that holds a tensor; the setup_... calls can name any part"
            )
        if z.requires_grad:
            tape.collecting = True
            self._output, self._arrival = z, z.register_hook(_Arrival(self, tape))

    def arrive(self, tape: Tape, gradient: Tensor) -> None:
        """The gradient of the model's output is there: measure."""
        maker, z = self.maker(), self._output
        if maker is None or z is None or self._terms is not None:
            return
        slope = gradient.detach()
        self._arrival.remove()
        self._terms = [] if self.likelihood is None else [terms_from_gradient(self.likelihood, z, slope)]
        tape.collecting = False
        scale = self._scale()
        maker.take_in(tape, self._terms, self.weight, [z, slope], slopes=lambda: [slope / (self.weight * scale)])
        tape.collecting = True

    def before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """End the step: fold in what the backward passes brought, and precondition; with a closure, when it has run."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._end()
            return None

        def preconditioned() -> Any:
            loss = closure()
            self._end()
            return loss

        return args[:1], {**kwargs, "closure": preconditioned}

    def _end(self) -> None:
        maker = self.maker()
        if maker is not None:
            maker.plan.own.check()
            self._finish()
            maker.forget_pass()
            maker.precondition()

    def _drop(self) -> None:
        self._stack.close()
        self._tape = self._output = self._terms = None

    def _finish(self) -> None:
        """Close the tape of the last pass; if it was differentiated, take in what came with its backward pass."""
        maker, tape, terms = self.maker(), self._tape, self._terms
        self._drop()
        if maker is not None and tape is not None and terms is not None:
            tape.collecting = False
            maker.take_in(tape, terms, self.weight, [], ridden=tape.harvest(), scale=self._scale())

    def _scale(self) -> float:
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())


class _Arrival:
    """Passes the gradient of an output on. Weak on both sides: the graph holds this hook, and the tape holds the graph."""

    def __init__(self, owner: Attachment, tape: Tape) -> None:
        self.owner, self.tape = weakref.ref(owner), weakref.ref(tape)

    def __call__(self, gradient: Tensor) -> None:
        owner, tape = self.owner(), self.tape()
        if owner is None:
            return
        if tape is None:
            raise RuntimeError(
                "attach: the model was called again before this pass was differentiated, so its curvature is lost: call it "
                "once for each backward(), or declare all of its calls as one with setup_model_call"
            )
        owner.arrive(tape, gradient)


def _read(likelihood: str | Likelihood | None) -> Likelihood | None:
    """By name, classes are on the last axis, as models of tokens have them; an object says its axis itself."""
    if likelihood is None:
        return None
    return Categorical(axis=-1) if likelihood == "categorical" else find_likelihood(likelihood)


def _check(
    maker: PreconditionedGradientMaker, optimizer: Optimizer, likelihood: str | Likelihood | None, accumulation: int
) -> None:
    if not isinstance(accumulation, int) or isinstance(accumulation, bool) or accumulation < 1:
        raise ValueError(f"accumulation={accumulation!r}: expected an integer of at least 1")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("attach: LBFGS models the curvature from plain gradients itself: use SGD, with or without momentum")
    layerwise = maker.plan.curvatures(of_passes=True)
    repeating = [type(c).__name__ for c in layerwise if c.asks]
    if repeating:
        raise ValueError(
            f"attach: {', '.join(repeating)} has to differentiate or repeat the loss, which is out of sight here: declare it "
            "with setup_model_call and setup_loss_call"
        )
    if layerwise and likelihood is None:
        raise ValueError(
            f"attach: {', '.join(type(c).__name__ for c in layerwise)} needs to know what the model's output parametrises, and "
            f"the loss is out of sight here: give likelihood= one of {', '.join(LIKELIHOODS)}"
        )


def _logits(output: Any) -> Tensor | None:
    """The model's logits: its output, its part of that name, or its first tensor."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        found = output.get("logits", next((v for v in output.values() if isinstance(v, Tensor) and v.ndim > 0), None))
    elif isinstance(output, (tuple, list)):
        found = next((v for v in output if isinstance(v, Tensor) and v.ndim > 0), None)
    else:
        found = getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else None
