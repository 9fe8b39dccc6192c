"""The tape: records the calls of modules in one forward pass, and the gradients of their outputs.

Output gradients are taken at gradient edges, not by module backward hooks: in-place changes of an output do not affect
them, no weight gradient is computed, and ``.grad`` is not touched. Hooks exist only while a pass is recorded, so that the
model is unchanged afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gradmaker.capture.arrangement import APART, Arrangement, Structure, key_of, pattern
from gradmaker.capture.batch_norms import FrozenNorms
from gradmaker.capture.borrowing import borrowed, foreign
from gradmaker.capture.hooks import ModuleHook, edge_of
from gradmaker.capture.rules.attention import Projection, ProjectionHooks
from gradmaker.capture.rules.calls import Call, Layout
from gradmaker.capture.sharded import leaves
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
        self.sized = False  # whether the batch size is known: there may be none
        self._called_with = False  # whether it was read from a call of the model
        self.called: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # arguments of the model's first call
        self.joint = False  # whether the batch is measured as one example
        self.ungrouped = False  # whether that is because output rows could not be assigned to examples
        self.norms = FrozenNorms()
        self.collecting = False  # whether output gradients of the loop's backward passes are stored
        self._own = False  # whether the tape itself runs a backward pass at present
        self._inside = False  # whether it does so inside of `borrowing`
        self._repeating = False
        self._reentrant = False
        self._paused = False
        self._hooks = ExitStack()  # removes the hooks from the modules
        self._output_hooks: list[Any] = []  # handles of the hooks on outputs
        # Number of calls without gradients: a reentrant checkpoint makes these, and repeats them during the backward pass.
        self._late: dict[nn.Module, int] = {}

    @property
    def examples(self) -> int:
        """Number of examples with evidence of their own: the batch size, or 1 where they mix everywhere."""
        return 1 if self.joint or not self.batch else self.batch

    def layout(self, call: Call) -> Layout:
        """The position of the examples in the tensors of a call."""
        return APART if self.joint else self.arrangement.layout(call, self.examples)

    def apart(self, modules: Iterable[nn.Module]) -> bool:
        """Whether a call of these modules has no axis of examples, while other calls of the pass have one."""
        return not self.joint and any(self.layout(c) is APART for m in modules for c in self.calls[m])

    def again(self, modules: Iterable[nn.Module]) -> Tape:
        """An empty tape for another pass of the same kind."""
        made = Tape(self.root, dict.fromkeys(modules), self.arrangement, self.batch_axis)
        made.joint, made.ungrouped = self.joint, self.ungrouped
        return made

    def structure(self, outputs: Sequence[Tensor]) -> Structure:
        """The key of this kind of pass.  outputs: those that the loss is a function of"""
        n = self.batch
        keys = (key_of(call, n) for calls in self.calls.values() for call in calls)
        return frozenset([*keys, *(("output", pattern([z.shape], max(n, 1))) for z in outputs)])

    # ---------------------------------------------------------------- recording
    @contextmanager
    def recording(self, sized: bool = False) -> Iterator[None]:
        """Context that records calls; its hooks are removed also after an exception.  sized: whether the batch size is known"""
        with ExitStack() as stack:
            stack.callback(self._remove_output_hooks)
            stack.callback(self.unhook)
            if not sized:
                self._hooks.callback(self.root.register_forward_pre_hook(self.note_examples, with_kwargs=True).remove)
            self.norms.watch(self.root, self._hooks)
            for module in self.calls:
                if not isinstance(module, Projection):
                    self._hooks.callback(module.register_forward_hook(ModuleHook(self._called), with_kwargs=True).remove)
            self._hook_attention(self._hooks)
            yield

    def unhook(self) -> None:
        """Remove the hooks from the modules."""
        self._hooks.close()

    def _hook_attention(self, stack: ExitStack) -> None:
        """Record the linear maps inside of attention modules, which are no calls of layers."""
        inside: dict[nn.Module, dict[str, Projection]] = {}
        for module in self.calls:
            if isinstance(module, Projection):
                inside.setdefault(module.attention[0], {})[module.part] = module
        for attention, parts in inside.items():
            hooks = ProjectionHooks(partial(self._record_projection, parts))
            stack.callback(attention.register_forward_pre_hook(ModuleHook(hooks.enter)).remove)
            stack.callback(attention.register_forward_hook(ModuleHook(hooks.leave), always_call=True).remove)

    def _record_projection(self, parts: dict[str, Projection], part: str, x: Tensor, y: Tensor) -> None:
        if part in parts and not self._paused:
            self._record(parts[part], (x,), {}, y)

    def _remove_output_hooks(self) -> None:
        """Break a cycle outside of garbage collection: a hook holds its call, the call the graph, the graph the hook."""
        while self._output_hooks:
            self._output_hooks.pop().remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose calls are not recorded."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def end_forward(self, outputs: Sequence[Tensor]) -> None:
        """End the forward pass: later calls are recomputations by a checkpoint.

        outputs: of the pass; their graph shows a reentrant checkpoint. Without one, calls without gradients are discarded.
        """
        self._repeating = True
        self._reentrant = any(reenters(z) for z in outputs)
        if not self._reentrant:
            self._late.clear()
        if not self._late:
            self.unhook()

    def assume(self, examples: int | None) -> None:
        """Set the batch size to that of the declared call, which may call layers of the model, not the model itself."""
        if examples is not None:
            self.batch, self.sized = examples, True

    def note_examples(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the batch size from the arguments of the model's call. ValueError without the axis ``batch_axis``."""
        first = next((v for v in tensors(args, kwargs) if v.ndim > 0), None)
        if self._called_with or first is None:
            return
        self.called = (args, kwargs)
        if not self.batch_axis < first.ndim:
            raise ValueError(
                f"batch_axis={self.batch_axis}: the first tensor that goes into the model has shape {tuple(first.shape)}, "
                "which has no such axis: give the axis of its examples"
            )
        self.batch, self.sized, self._called_with = first.shape[self.batch_axis], True, True

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook: record a call, leave its output unchanged."""
        if not self._paused:
            self._record(module, args, kwargs, output)

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._repeating and module not in self._late:  # recomputation by a non-reentrant checkpoint
            return
        outputs = [v for v in tensors(output) if v.requires_grad]
        if outputs:
            self._append(module, args, kwargs, outputs)
        elif not torch.is_grad_enabled() and not self._repeating:
            self._late[module] = self._late.get(module, 0) + 1

    def _append(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]) -> None:
        edges = [edge_of(v) for v in outputs]
        shapes = [v.shape for v in outputs]
        device = outputs[0].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        empty: list[Tensor | None] = [None] * len(outputs)
        call = Call(module, args, kwargs, module.training, edges, shapes, outputs[0].dtype, empty, autocast)
        self.calls[module].append(call)
        for index, value in enumerate(outputs):
            self._output_hooks.append(value.register_hook(self._output_hook(call, index)))

    def _output_hook(self, call: Call, index: int) -> Callable[[Tensor], None]:
        def store(gradient: Tensor) -> None:
            own = self._own and foreign(gradient) == self._inside  # excludes a backward pass of another maker in between
            if own or (self.collecting and not foreign(gradient)):
                call.gradients[index] = gradient.detach()

        return store

    # ---------------------------------------------------------------- gradients of outputs
    def fired(self, module: nn.Module) -> bool:
        """Whether a module was called in the recorded pass."""
        return bool(self.calls[module]) or module in self._late

    def forget_late(self) -> None:
        """Before a backward pass: drop the recorded calls that a reentrant checkpoint is about to repeat."""
        for module in self._late:
            self.calls[module].clear()

    def collect(self, backward: Callable[[], None]) -> OutputGradients:
        """Run a backward pass and return its output gradients, with a cotangent axis of one."""
        self.forget_late()
        self._own, self._inside = True, borrowed()
        try:
            backward()
        finally:
            self._own = False
        return self.harvest()

    def harvest(self) -> OutputGradients:
        """The output gradients stored since the last call, zeros where none arrived."""
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
        """Vector-Jacobian products with cotangents of outputs, at the outputs of layers; keeps the graph.

        cotangents: each (k, *output); modules: those whose calls are wanted, None: all
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
        """`vjp` by whole backward passes, as a reentrant checkpoint allows nothing else; ``.grad`` is restored."""
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
        """``J^T u`` for some parameters; keeps the graph and ``.grad``.  cotangents: like the outputs"""
        if not self._reentrant:
            with self.paused():  # a checkpoint repeats its calls
                found = torch.autograd.grad(
                    outputs, self._differentiated(parameters), cotangents, retain_graph=True, materialize_grads=True
                )
            return list(found)
        with self.gradients_apart():
            self.collect(lambda: _backward(outputs, cotangents))
            return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]

    def vjp_rows(
        self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor], parameters: Sequence[nn.Parameter]
    ) -> list[Tensor]:
        """`vjp_parameters` for several cotangents, in one batched pass where possible.  # (k, *output) -> (k, *p)"""
        if not self._reentrant:
            with self.paused():
                found = vector_jacobian(outputs, own := self._differentiated(parameters), cotangents)
            k = len(cotangents[0])
            return [p.new_zeros(k, *p.shape) if g is None else g for p, g in zip(own, found, strict=True)]
        passes = [self.vjp_parameters(outputs, c, parameters) for c in zip(*cotangents, strict=True)]
        return [torch.stack(same) for same in zip(*passes, strict=True)]

    def _differentiated(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """The leaves of the graph that parameters are in the passes."""
        swapped = leaves(self.root)
        return [swapped.get(p, p) for p in parameters]

    @contextmanager
    def gradients_apart(self) -> Iterator[None]:
        """Context without gradients of parameters and recorded outputs; those from before are restored."""
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
