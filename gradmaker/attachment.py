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
from gradmaker.curvature.likelihood import LIKELIHOODS, Likelihood, Terms, find_likelihood, terms_from_gradient

if TYPE_CHECKING:
    from gradmaker.preconditioner import PreconditionedGradientMaker

__all__ = ["Attachment"]


class _Hook:
    """Calls a method of an attachment that may be gone; a copied or pickled model gets one that does nothing."""

    def __init__(self, owner: Attachment | None = None, verb: str = "") -> None:
        self.owner, self.verb = (None if owner is None else weakref.ref(owner)), verb

    def __call__(self, *args: Any) -> None:
        owner = self.owner and self.owner()
        if owner is not None:
            getattr(owner, self.verb)(*args)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class Attachment:
    """One maker on one optimizer.

    Extra passes run from a hook on the model's output, at the moment when its gradient arrives: the graph below is still
    whole then, and that gradient shows which terms the loss left out.
    """

    def __init__(
        self,
        maker: PreconditionedGradientMaker,
        optimizer: Optimizer,
        likelihood: str | Likelihood | None,
        accumulation: int,
    ) -> None:
        _check(maker, likelihood, accumulation)
        self.maker = weakref.ref(maker)
        self.likelihood = None if likelihood is None else find_likelihood(likelihood)
        self.weight = 1.0 / accumulation
        self._stack = ExitStack()
        self._tape: Tape | None = None
        self._terms: list[Terms] | None = None  # of the pass under way, once its output's gradient is there
        model = maker.model
        self._handles = [
            model.register_forward_pre_hook(_Hook(self, "before_forward"), with_kwargs=True),
            model.register_forward_hook(_Hook(self, "after_forward")),
            optimizer.register_step_pre_hook(_Hook(self, "before_step")),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        self._stack.close()
        for handle in self._handles:
            handle.remove()

    # ---------------------------------------------------------------- hooks
    def before_forward(self, model: Any, args: Any, kwargs: Any) -> None:
        """Start a tape for a pass that will be differentiated, on steps that measure curvature."""
        self._finish()
        maker = self.maker()
        if maker is None or not torch.is_grad_enabled() or not maker.begin_pass():
            return
        self._tape = maker.new_tape()
        self._tape.note_examples(model, args, kwargs)
        self._stack.enter_context(self._tape.recording())

    def after_forward(self, model: Any, args: Any, output: Any) -> None:
        """Wait for the gradient of the model's output."""
        tape = self._tape
        z = None if tape is None else _logits(output)
        if tape is None or z is None or not z.requires_grad:
            return
        tape.end_forward()
        tape.collecting = True
        handle = z.register_hook(lambda g: self._arrive(tape, z, g, handle))

    def _arrive(self, tape: Tape, z: Tensor, gradient: Tensor, handle: Any) -> None:
        maker = self.maker()
        handle.remove()  # the extra passes start at z as well
        if maker is None:
            return
        with torch.enable_grad():
            rows = z.reshape(-1, z.shape[-1]) if z.ndim > 1 else z
        slope = gradient.detach().reshape(rows.shape)
        self._terms = [] if self.likelihood is None else [terms_from_gradient(self.likelihood, rows, slope)]
        tape.collecting = False
        maker.take_in(tape, self._terms, self.weight, [z, slope], slopes=lambda: [slope / self.weight])
        tape.collecting = True

    def before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """End the step: fold in what the backward passes brought, and precondition."""
        maker = self.maker()
        if maker is not None:
            self._finish()
            maker.precondition()

    def _finish(self) -> None:
        """Close the tape of the last pass; if it was differentiated, take in what came with its backward pass."""
        self._stack.close()
        maker, tape, terms = self.maker(), self._tape, self._terms
        self._tape = self._terms = None
        if maker is not None and tape is not None and terms is not None:
            tape.collecting = False
            maker.take_in(tape, terms, self.weight, [], ridden=tape.harvest())


def _check(maker: PreconditionedGradientMaker, likelihood: str | Likelihood | None, accumulation: int) -> None:
    if not isinstance(accumulation, int) or accumulation < 1:
        raise ValueError(f"accumulation={accumulation!r}: expected an integer of at least 1")
    layerwise = maker.plan.curvatures(layerwise=True)
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
