"""One forward pass of a training loop, from the call of the model to the end of its backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradmaker.capture.borrowing import borrowing, foreign
from gradmaker.capture.sharded import Gathered
from gradmaker.capture.tape import Tape
from gradmaker.curvature import Curvature
from gradmaker.loops.checks import OTHER_OUTPUTS, TWO_LOSSES, UNDIFFERENTIATED, logits_of
from gradmaker.loops.eager import Eager
from gradmaker.loops.marks import Marks
from gradmaker.loops.other_outputs import OtherOutputs
from gradmaker.loss.likelihood import LIKELIHOODS
from gradmaker.loss.recorder import LossCall, LossRecorder
from gradmaker.loss.share import Share
from gradmaker.loss.terms import Terms
from gradmaker.step.draft import Draft
from gradmaker.step.protocol import RecordingMaker
from gradmaker.trees import tensors

__all__ = ["LoopPass", "at_the_end"]

Arrived = Callable[["LoopPass", str, Tensor], None]


class LoopPass:
    """The recording of a pass, and the hooks on its outputs.

    A loss that is called inside of the model is recorded: its gradient comes before that of its logits, and is the factor
    with which it enters the loop's loss. The hooks on the modules are removed when the model has returned, unless a
    reentrant checkpoint will call them again.
    """

    def __init__(self, tape: Tape | None, finish: Callable[..., Any]) -> None:
        """tape: None for a pass of which only the end of the backward pass is needed.  finish: the model's forward hook"""
        self.tape, self._finish = tape, finish
        self.depth = 0  # nested calls of the model
        self.inside = True
        self.recorder = LossRecorder() if tape is not None else None
        self.weights: Gathered | None = None  # whole, while it is measured
        self.losses: dict[str, LossCall] = {}  # called inside of the model, by place
        self.logits: Tensor | None = None
        self.at: str | None = None  # the place whose gradient it was measured at, in this backward pass
        self.before: Marks | None = None  # gradients at that moment
        self.draft: Draft | None = None  # its evidence
        self.terms: list[Terms] = []
        self.expected: Tensor | None = None  # gradient of the logits by the loss inside alone
        self.scale = 1.0
        self.weight = 1.0  # of its loss, as the terms have it, in that of the step
        self.unread = False  # whether the gradient did not show the weights of its terms
        self.refusal = ""  # why it must not be part of a step
        self.share: Share | None = None  # of its loss in that of all ranks; None: there is one process
        self.watched: list[str] = []
        self.others = OtherOutputs([])
        self.trace = Trace(tape is not None)
        self._calls, self._record, self._handles = ExitStack(), ExitStack(), ExitStack()

    def begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Begin to record, in the model's forward pre-hook."""
        self._calls.enter_context(Eager())
        if self.tape is not None and self.recorder is not None:
            self.tape.note_examples(model, args, kwargs)
            self._record.enter_context(self.tape.recording(sized=True))
            self._calls.enter_context(self.recorder)
        # the last of all hooks, since the model may be a layer itself; called after exceptions, too
        self._calls.callback(model.register_forward_hook(self._finish, always_call=True).remove)

    def leave(self, output: Any) -> None:
        """Stop recording when the model has returned.  output: None after an exception"""
        self.inside = False
        self._calls.close()
        if self.tape is not None:
            self.tape.end_forward([] if output is None else list(tensors(output)))

    def watch(self, output: Any, owner: Any, arrived: str) -> bool:
        """Put hooks on the outputs; False if none needs a gradient.  owner, arrived: the object and method that they call"""
        if self.tape is None or self.recorder is None:
            values = [v for v in tensors(output, logits_of(output)) if v.requires_grad]
            self._add_hooks({f"{j}": v for j, v in enumerate(values)}, owner, arrived)
            return True
        calls = [call for call in self.recorder.calls if call.output.requires_grad and _in_graph(call)]
        names = [call.function.__name__ for call in calls]
        self.losses = {f"{name} {j} inside of the model": c for j, (name, c) in enumerate(zip(names, calls, strict=True), 1)}
        self.recorder, self.logits = None, logits_of(output)
        places = {k: call.output for k, call in self.losses.items()}
        if self.logits is not None:
            places["the logits in its output"] = self.logits
        self._add_hooks({k: v for k, v in places.items() if v.requires_grad}, owner, arrived)
        own = {id(v) for v in places.values()}
        self.others = OtherOutputs([v for v in tensors(output) if v.requires_grad and id(v) not in own])
        self.tape.collecting = True
        return bool(places)

    def _add_hooks(self, places: dict[str, Tensor], owner: Any, arrived: str) -> None:
        self.watched = list(places)
        for name, value in places.items():
            self._handles.callback(value.register_hook(_OutputHook(owner, arrived, self, name)).remove)

    @property
    def factor(self) -> float:
        """Of its loss in that of all ranks."""
        return 1.0 if self.share is None else self.share.factor

    @property
    def empty(self) -> bool:
        """Whether it has no examples, as a rank may that has run out of data."""
        return self.tape is not None and self.tape.sized and not self.tape.batch

    def agree(self, maker: RecordingMaker, known: bool) -> None:
        """Let all ranks measure this pass, or none.  known: whether its terms are"""
        assert self.tape is not None
        own = 0.0 if known or self.empty else 2.0 if self.refusal else 1.0
        self.share, worst = maker.share_of_replica(self.terms if known else (), self.tape.batch, own)
        self.terms = [t.scaled(self.factor) for t in self.terms] if self.share is not None else self.terms
        self.unread = worst == 1.0
        if worst == 2.0 and not self.refusal:
            self.refusal = "another rank could not measure its pass of this step, and says why"

    def terms_inside(self, gradient: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Find the terms of the loss inside, with their exact weights. Returns its output and ``dL/dz`` there.

        gradient: of its output, as it arrived; factor: the same without the scales of the loop
        """
        assert self.at is not None
        loss = self.losses[self.at]
        value, w = loss.output, loss.weigh(factor)
        self.terms = [LIKELIHOODS[w.likelihood]().read(w)]
        if self.logits is not None and self.logits.requires_grad:
            found = torch.autograd.grad(value, self.logits, gradient, retain_graph=True, allow_unused=True)
            self.expected = found[0]
        return value, torch.autograd.grad(value, w.z, factor, retain_graph=True)[0]

    def compare(self, place: str, gradient: Tensor) -> None:
        """RuntimeError if the loop's loss depends on the logits in other ways than by the loss inside of the model."""
        same = False
        if place not in self.losses and self.expected is not None:
            tolerance = 1e-5 if gradient.dtype in (torch.float32, torch.float64) else 1e-2
            same = bool((gradient - self.expected).norm() <= tolerance * self.expected.norm())
        if not same:
            raise RuntimeError(TWO_LOSSES)

    def look_at_other_outputs(self, curvatures: Iterable[Curvature]) -> None:
        """Refuse the pass if a part of the loss came by outputs that are not watched, and a curvature is measured there."""
        values = [loss.output for loss in self.losses.values()]
        blind = [type(c).__name__ for c in curvatures if "main_backward" not in c.needs]
        shapes = self.others.unexplained(values if self.logits is None else [*values, self.logits]) if blind else []
        if shapes and not self.refusal:
            told = (" and ".join(map(str, shapes)), ", ".join(self.watched), ", ".join(blind))
            self.refusal = OTHER_OUTPUTS.format(*told)

    def gather(self, model: nn.Module) -> None:
        """Let sharded weights be whole until the end of the backward pass, on all ranks together."""
        self.weights = Gathered(model)
        self.weights.begin(gather=True)

    def shard(self) -> None:
        """Let ranks hold their shards again."""
        if self.weights is not None:
            self.weights.end()
            self.weights = None

    def again(self) -> None:
        """Expect another backward pass: this one was part of no step."""
        self.shard()
        self.at = self.before = self.draft = self.expected = None
        self.unread, self.refusal = False, ""
        self.others.forget()
        if self.tape is not None:
            self.tape.harvest()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Keep output gradients that have arrived; ignore calls that checkpoints repeat inside."""
        assert self.tape is not None
        calls = {module: [(call, list(call.gradients)) for call in found] for module, found in self.tape.calls.items()}
        with torch.no_grad(), borrowing():
            yield
        for module, found in calls.items():
            self.tape.calls[module][:] = [call for call, _ in found]
            for call, gradients in found:
                call.gradients = gradients

    def end(self) -> None:
        """Release the graph after the measurement."""
        self.trace.done = True
        self.close()

    def close(self) -> None:
        """Remove the hooks from the modules and release the graph. Hooks on outputs stay, to report a late gradient."""
        self.shard()
        self._calls.close()
        self._record.close()
        self.others.close()
        self.tape = self.logits = self.recorder = self.expected = None
        self.losses = {}

    def unwatch(self) -> None:
        """Remove the hooks from the outputs."""
        self._handles.close()


class Trace:
    """What the hooks in a graph keep of a pass that was released."""

    def __init__(self, recorded: bool) -> None:
        self.recorded, self.done = recorded, False


class _OutputHook:
    """A hook on an output, which passes its gradient on. Both references are weak: the graph holds it, the pass the graph."""

    def __init__(self, owner: Any, verb: str, current: LoopPass, place: str) -> None:
        self.owner, self.verb, self.current = weakref.ref(owner), verb, weakref.ref(current)
        self.place, self.trace = place, current.trace

    def __call__(self, gradient: Tensor) -> None:
        owner, current = self.owner(), self.current()
        if owner is None or foreign(gradient):
            return
        if self.trace.done:
            owner.arrive_again()
        elif current is not None:
            getattr(owner, self.verb)(current, self.place, gradient.detach())
        elif self.trace.recorded:
            raise RuntimeError(UNDIFFERENTIATED)


def at_the_end(function: Callable[[], None]) -> None:
    """Call a function at the end of the running backward pass, after reducers, which queue callbacks themselves."""
    queue: Any = torch.autograd.Variable._execution_engine.queue_callback
    queue(lambda: queue(function))


def _in_graph(call: LossCall) -> bool:
    sides = (call.arguments["input"], call.arguments["target"])
    return any(isinstance(v, Tensor) and v.requires_grad for v in sides)
