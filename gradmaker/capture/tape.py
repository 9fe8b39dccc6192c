"""The tape: which modules were called with what, and the gradients of their outputs.

Output gradients come from gradient edges, not from module backward hooks: in-place changes of an output do not disturb
them, no weight gradient is computed on the way, and ``.grad`` is left alone. Hooks exist only while a pass is recorded, so
that a model is never left changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from gradmaker.capture.arrangement import APART, Arrangement, Structure, key_of, pattern
from gradmaker.capture.batch_norms import FrozenNorms
from gradmaker.capture.borrowing import borrowed, foreign
from gradmaker.capture.hooks import ModuleHook
from gradmaker.capture.rules.attention import Listener, Projection
from gradmaker.capture.rules.calls import Call, Layout
from gradmaker.reentrant import reenters
from gradmaker.trees import tensors

__all__ = ["OutputGradients", "Tape"]

OutputGradients: TypeAlias = dict[nn.Module, list[list[Tensor]]]
"""For each module, call and output tensor: the gradients for ``k`` cotangents.  # (k, *output)"""


class Tape:
    """Calls of the watched modules during one forward pass, in order."""

    def __init__(
        self, root: nn.Module, modules: Iterable[nn.Module], arrangement: Arrangement | None = None, batch_axis: int = 0
    ) -> None:
        self.root = root
        self.arrangement = Arrangement() if arrangement is None else arrangement
        self.calls: dict[nn.Module, list[Call]] = {m: [] for m in modules}
        self.batch = 0  # batch size: the axis ``batch_axis`` of the model's first tensor argument
        self.batch_axis = batch_axis
        self.sized = False  # whether that is known: there may be none
        self._called_with = False  # whether it is read off a call of the model
        self.called: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # arguments of the model's first call
        self.joint = False  # whether the batch is measured as one example
        self.ungrouped = False  # whether that is since the rows of examples were not found
        self.norms = FrozenNorms()
        self.collecting = False  # whether output gradients of a backward pass of the loop are kept
        self._own = False  # whether those of a backward pass that the tape runs itself are
        self._inside = False  # whether that one is borrowed
        self._repeating = False
        self._reentrant = False
        self._paused = False
        self._hooks = ExitStack()  # takes those off the modules
        self._keepers: list[Any] = []  # handles of the hooks on outputs
        # Calls made without gradients. A reentrant checkpoint makes its calls so and repeats them during backward.
        self._late: dict[nn.Module, int] = {}

    @property
    def examples(self) -> int:
        """How many the evidence keeps apart: those of the batch, or one where they mix everywhere."""
        return 1 if self.joint or not self.batch else self.batch

    def layout(self, call: Call) -> Layout:
        """Where the examples of a call are."""
        return APART if self.joint else self.arrangement.layout(call, self.examples)

    def apart(self, modules: Iterable[nn.Module]) -> bool:
        """Whether any call of some modules keeps no example apart, where others do."""
        return not self.joint and any(self.layout(c) is APART for m in modules for c in self.calls[m])

    def again(self, modules: Iterable[nn.Module]) -> Tape:
        """A tape for another pass of the same kind."""
        made = Tape(self.root, dict.fromkeys(modules), self.arrangement, self.batch_axis)
        made.joint, made.ungrouped = self.joint, self.ungrouped
        return made

    def structure(self, outputs: Sequence[Tensor]) -> Structure:
        """What this pass has in common with others of its kind.  outputs: what the loss is a function of"""
        n = self.batch
        keys = (key_of(call, n) for calls in self.calls.values() for call in calls)
        return frozenset([*keys, *(("output", pattern([z.shape], max(n, 1))) for z in outputs)])

    # ---------------------------------------------------------------- recording
    @contextmanager
    def recording(self, sized: bool = False) -> Iterator[None]:
        """Record the calls made inside. Hooks are gone afterwards, whatever happens.  sized: the batch size is known"""
        with ExitStack() as stack:
            stack.callback(self._let_go)
            stack.callback(self.unhook)
            if not sized:
                self._hooks.callback(self.root.register_forward_pre_hook(self.note_examples, with_kwargs=True).remove)
            self.norms.watch(self.root, self._hooks)
            for module in self.calls:
                if not isinstance(module, Projection):
                    self._hooks.callback(module.register_forward_hook(ModuleHook(self._called), with_kwargs=True).remove)
            self._listen(self._hooks)
            yield

    def unhook(self) -> None:
        """Take the hooks off the modules."""
        self._hooks.close()

    def _listen(self, stack: ExitStack) -> None:
        """Record the linear maps inside of attention modules, which no layer is called for."""
        inside: dict[nn.Module, dict[str, Projection]] = {}
        for module in self.calls:
            if isinstance(module, Projection):
                inside.setdefault(module.attention[0], {})[module.part] = module
        for attention, parts in inside.items():
            listener = Listener(partial(self._overheard, parts))
            stack.callback(attention.register_forward_pre_hook(ModuleHook(listener.enter)).remove)
            stack.callback(attention.register_forward_hook(ModuleHook(listener.leave), always_call=True).remove)

    def _overheard(self, parts: dict[str, Projection], part: str, x: Tensor, y: Tensor) -> None:
        if part in parts and not self._paused:
            self._record(parts[part], (x,), {}, y)

    def _let_go(self) -> None:
        """A hook holds its call, which holds the graph, which holds the hook: no collector would find this cycle."""
        while self._keepers:
            self._keepers.pop().remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Calls made inside are none of the recorded pass."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def end_forward(self, outputs: Sequence[Tensor]) -> None:
        """From here on a call is the repetition of an earlier one, by a checkpoint; without one there is none.

        outputs: of the pass, which show a reentrant checkpoint. Without one, calls without gradients are no part of the pass.
        """
        self._repeating = True
        self._reentrant = any(reenters(z) for z in outputs)
        if not self._reentrant:
            self._late.clear()
        if not self._late:
            self.unhook()

    def assume(self, examples: int | None) -> None:
        """The batch size where the model itself is not called, only layers of it: that of the declared call."""
        if examples is not None:
            self.batch, self.sized = examples, True

    def note_examples(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the batch size off the arguments of the model's call."""
        first = next((v for v in tensors(args, kwargs) if v.ndim > 0), None)
        if self._called_with or first is None:
            return
        self.called = (args, kwargs)
        if not self.batch_axis < first.ndim:
            raise ValueError(
                f"batch_axis={self.batch_axis}: the first tensor that goes into the model has shape {tuple(first.shape)}, "
                "which has no such axis: say on which axis of it the examples are"
            )
        self.batch, self.sized, self._called_with = first.shape[self.batch_axis], True, True

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Record a call; what it returns stays what it is."""
        if not self._paused:
            self._record(module, args, kwargs, output)

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._repeating and module not in self._late:  # a non-reentrant checkpoint recomputes what was recorded
            return
        outputs = [v for v in tensors(output) if v.requires_grad]
        if outputs:
            self._append(module, args, kwargs, outputs)
        elif not torch.is_grad_enabled() and not self._repeating:
            self._late[module] = self._late.get(module, 0) + 1

    def _append(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]) -> None:
        edges = [get_gradient_edge(v) for v in outputs]
        shapes = [v.shape for v in outputs]
        device = outputs[0].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        empty: list[Tensor | None] = [None] * len(outputs)
        call = Call(module, args, kwargs, module.training, edges, shapes, outputs[0].dtype, empty, autocast)
        self.calls[module].append(call)
        for index, value in enumerate(outputs):
            self._keepers.append(value.register_hook(self._keeper(call, index)))

    def _keeper(self, call: Call, index: int) -> Callable[[Tensor], None]:
        def keep(gradient: Tensor) -> None:
            own = self._own and foreign(gradient) == self._inside  # not of what another maker differentiates in between
            if own or (self.collecting and not foreign(gradient)):
                call.gradients[index] = gradient.detach()

        return keep

    # ---------------------------------------------------------------- gradients of outputs
    def fired(self, module: nn.Module) -> bool:
        """Whether a module took part in the recorded pass."""
        return bool(self.calls[module]) or module in self._late

    def forget_late(self) -> None:
        """A backward pass begins, in which a reentrant checkpoint makes its calls again."""
        for module in self._late:
            self.calls[module].clear()

    def collect(self, backward: Callable[[], None]) -> OutputGradients:
        """Output gradients of a backward pass that runs anyway, with a cotangent axis of one."""
        self.forget_late()
        self._own, self._inside = True, borrowed()
        try:
            backward()
        finally:
            self._own = False
        return self.harvest()

    def harvest(self) -> OutputGradients:
        """The output gradients that were kept since the last harvest."""
        found: OutputGradients = {m: [] for m in self.calls}
        for module, calls in self.calls.items():
            for call in calls:
                kept = zip(call.gradients, call.shapes, strict=True)
                found[module].append([_or_zeros(g, s, call).unsqueeze(0) for g, s in kept])
                call.gradients = [None] * len(call.shapes)
        return found

    def vjp(
        self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor], modules: Iterable[nn.Module] | None = None
    ) -> OutputGradients:
        """Output gradients for given cotangents of outputs; keeps the graph.  cotangents: each (k, *output)

        modules: whose calls; None: of all
        """
        chosen = self.calls if modules is None else {m: self.calls[m] for m in modules}
        if self._reentrant:
            return self._vjp_by_backward(outputs, cotangents)
        k = cotangents[0].shape[0]
        edges = [edge for calls in chosen.values() for call in calls for edge in call.edges]
        gradients = iter(vector_jacobian(outputs, edges, cotangents))
        return {
            module: [[_or_zeros(next(gradients), (k, *shape), call) for shape in call.shapes] for call in calls]
            for module, calls in chosen.items()
        }

    def _vjp_by_backward(self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> OutputGradients:
        """As `vjp`, where a reentrant checkpoint allows nothing but a whole backward pass; ``.grad`` is put back."""
        with self.gradients_apart():
            passes = [self.collect(lambda c=c: _backward(outputs, c)) for c in zip(*cotangents, strict=True)]  # type: ignore[misc]
        return {
            module: [
                [torch.cat(same) for same in zip(*call, strict=True)] for call in zip(*(p[module] for p in passes), strict=True)
            ]
            for module in self.calls
        }

    def vjp_parameters(
        self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor], parameters: Sequence[nn.Parameter]
    ) -> list[Tensor]:
        """``J^T u`` for some parameters; keeps the graph, and ``.grad``.  cotangents: like the outputs"""
        if not self._reentrant:
            with self.paused():  # a checkpoint repeats its calls
                found = torch.autograd.grad(outputs, parameters, cotangents, retain_graph=True, materialize_grads=True)
            return list(found)
        with self.gradients_apart():
            self.collect(lambda: _backward(outputs, cotangents))
            return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]

    def vjp_rows(
        self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor], parameters: Sequence[nn.Parameter]
    ) -> list[Tensor]:
        """As `vjp_parameters` for several cotangents, in one batched pass where that can be.  (k, *output) -> (k, *p)"""
        if not self._reentrant:
            with self.paused():
                found = vector_jacobian(outputs, list(parameters), cotangents)
            k = len(cotangents[0])
            return [p.new_zeros(k, *p.shape) if g is None else g for p, g in zip(parameters, found, strict=True)]
        passes = [self.vjp_parameters(outputs, c, parameters) for c in zip(*cotangents, strict=True)]
        return [torch.stack(same) for same in zip(*passes, strict=True)]

    @contextmanager
    def gradients_apart(self) -> Iterator[None]:
        """No parameter and no recorded output has a gradient inside; afterwards they are as they were."""
        parameters = list(self.root.parameters())
        kept = [p.grad for p in parameters]
        outputs = [(call, list(call.gradients)) for calls in self.calls.values() for call in calls]
        try:
            for p in parameters:
                p.grad = None
            yield
        finally:
            for p, g in zip(parameters, kept, strict=True):
                p.grad = g
            for call, gradients in outputs:
                call.gradients = gradients


def _backward(outputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> None:
    torch.autograd.backward(list(outputs), list(cotangents), retain_graph=True)


def _or_zeros(gradient: Tensor | None, shape: Iterable[int], call: Call) -> Tensor:
    return call.input.new_zeros(*shape, dtype=call.dtype) if gradient is None else gradient


def vector_jacobian(outputs: Sequence[Tensor], sources: Sequence[Any], cotangents: Sequence[Tensor]) -> list[Tensor | None]:
    """``sum_z cotangent_z^T dz/d(source)`` for a batch of cotangents, in one batched pass where every operation allows it."""
    if not sources:
        return []
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    if len(cotangents[0]) == 1:
        found = torch.autograd.grad(outputs, sources, [c[0] for c in cotangents], **options)
        return [None if g is None else g.unsqueeze(0) for g in found]
    try:
        return list(torch.autograd.grad(outputs, sources, cotangents, is_grads_batched=True, **options))
    except RuntimeError:  # an operation without a batching rule, or a checkpoint that recomputes
        passes = [torch.autograd.grad(outputs, sources, c, **options) for c in zip(*cotangents, strict=True)]
        return [None if same[0] is None else torch.stack(same) for same in zip(*passes, strict=True)]
