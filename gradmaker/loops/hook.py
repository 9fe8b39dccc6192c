"""The hooks of attachments, by which other attachments find what rides on an optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from gradmaker.loops.checks import OTHER_STEP
from gradmaker.loops.eager import Eager, keep_out_of_compilation, set_compiler
from gradmaker.step.protocol import MakerOfSteps

__all__ = ["REFUSES", "Hook", "refuse_again", "refuse_attached", "refuse_overlap", "remove_all"]

REFUSES = "refuse_step"
"""The verb of the hook on an optimizer whose steps do not end those of the maker."""


class Hook:
    """A hook that calls a method of an attachment, if that is alive; in a copied or pickled model it does nothing."""

    def __init__(self, owner: Any = None, verb: str = "") -> None:
        """owner: the attachment.  verb: its method; without one, the hook only shows the attachment to others"""
        keep_out_of_compilation(Hook.__call__)
        self.owner, self.verb = (None if owner is None else weakref.ref(owner)), verb

    def __call__(self, *args: Any) -> Any:
        """Call the method, outside of what may be compiling the call of the model."""
        compiler, before = set_compiler(None), Eager.open
        Eager.compiling = bool(compiler)
        try:
            owner = self.owner and self.owner()
            return getattr(owner, self.verb)(*args) if owner is not None and self.verb else None
        finally:
            Eager.leave_hook(before, compiler)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


def refuse_overlap(maker: MakerOfSteps, optimizer: Optimizer, hooked: bool) -> None:
    """ValueError where another maker on this optimizer preconditions the same parameters, or at another moment.

    hooked: whether a step of the optimizer is to end that of the maker
    """
    own = {p: k for b in maker.plan.blocks for s in b.sites for k, p in s.parameters.items()}
    for hook in optimizer._optimizer_step_pre_hooks.values():
        if not isinstance(hook, Hook) or hook.owner is None or (other := hook.owner()) is None:
            continue
        if (rival := other.maker()) is None:
            continue
        if hook.verb == REFUSES or not hooked:
            raise ValueError(OTHER_STEP.format(type(rival).__name__))
        held = {p for b in rival.plan.blocks for s in b.sites for p in s.parameters.values()}
        if both := [k for p, k in own.items() if p in held]:
            raise ValueError(
                f"attach: {type(rival).__name__} is attached to this optimizer and preconditions {', '.join(both)} as "
                "well: one maker for each parameter; name the others in ignore=, or use fallback="
            )


def remove_all(attachments: list[Any]) -> None:
    """Remove the hooks of all attachments."""
    while attachments:
        attachments.pop().remove()


def refuse_again(attachments: Sequence[object]) -> None:
    """ValueError for a maker that is attached already."""
    if attachments:
        raise ValueError("attach: this maker is attached already: make one maker for each optimizer, or call remove() first")


def refuse_attached(attachments: Sequence[object]) -> None:
    """RuntimeError for a declared call of a maker that is attached to a loop."""
    if attachments:
        raise RuntimeError(
            "this maker is attached to a loop, whose optimizer.step() preconditions: take the hooks off by remove() before "
            "calls are run, or make another maker for them"
        )
