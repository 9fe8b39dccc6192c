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
from torch.utils._pytree import tree_leaves, tree_map

from gradmaker.attention import Listener, Projection
from gradmaker.borrowing import foreign
from gradmaker.calls import Call, broadcasts
from gradmaker.hooks import ModuleHook
from gradmaker.reentrant import reenters

__all__ = ["OutputGradients", "Tape"]

OutputGradients: TypeAlias = dict[nn.Module, list[list[Tensor]]]
"""For each module, call and output tensor: the gradients for ``k`` cotangents.  # (k, *output)"""


class Tape:
    """Calls of the watched modules during one forward pass, in order."""

    def __init__(self, root: nn.Module, modules: Iterable[nn.Module]) -> None:
        self.root = root
        self.calls: dict[nn.Module, list[Call]] = {m: [] for m in modules}
        self.examples = 0  # batch size: the first axis of the model's first tensor argument
        self.collecting = False  # whether output gradients of a backward pass of the loop are kept
        self._own = False  # whether those of a backward pass that the tape runs itself are
        self._repeating = False
        self._paused = False
        self._hooks = ExitStack()  # takes those off the modules
        self._keepers: list[Any] = []  # handles of the hooks on outputs
        # Calls made without gradients. A reentrant checkpoint makes its calls so and repeats them during backward.
        self._late: dict[nn.Module, int] = {}

    # ---------------------------------------------------------------- recording
    @contextmanager
    def recording(self, sized: bool = False) -> Iterator[None]:
        """Record the calls made inside. Hooks are gone afterwards, whatever happens.  sized: the batch size is known"""
        with ExitStack() as stack:
            stack.callback(self._let_go)
            stack.callback(self.unhook)
            if not sized:
                self._hooks.callback(self.root.register_forward_pre_hook(self.note_examples, with_kwargs=True).remove)
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

    def end_forward(self) -> None:
        """From here on a call is the repetition of an earlier one, by a checkpoint: of use where that had no gradients."""
        self._repeating = True
        if not self._late:
            self.unhook()

    def note_examples(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the batch size off the arguments of the model's call."""
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor) and v.ndim > 0]
        if not self.examples and tensors:
            self.examples = tensors[0].shape[0]

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Record a call. An output that is one for all examples is repeated, for each of them to have a gradient of its own."""
        if self._paused:
            return output
        n = self.examples
        index = next((v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)), None)
        if isinstance(output, Tensor) and broadcasts(output, index, n):
            output = _repeated(output, n).contiguous()  # may be changed in place
            args, kwargs = tree_map(lambda v: _repeated(v, n), (args, kwargs))
        self._record(module, args, kwargs, output)
        return output

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._repeating and module not in self._late:  # a non-reentrant checkpoint recomputes what was recorded
            return
        outputs = [v for v in tree_leaves(output) if isinstance(v, Tensor) and v.requires_grad]
        if outputs:
            self._append(module, args, kwargs, outputs)
        elif not torch.is_grad_enabled() and not self._repeating:
            self._late[module] = self._late.get(module, 0) + 1

    def _append(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]) -> None:
        edges = [get_gradient_edge(v) for v in outputs]
        shapes = [v.shape for v in outputs]
        call = Call(module, args, kwargs, module.training, edges, shapes, outputs[0].dtype, [None] * len(outputs))
        self.calls[module].append(call)
        for index, value in enumerate(outputs):
            self._keepers.append(value.register_hook(self._keeper(call, index)))

    def _keeper(self, call: Call, index: int) -> Callable[[Tensor], None]:
        def keep(gradient: Tensor) -> None:
            if self._own or (self.collecting and not foreign(gradient)):
                call.gradients[index] = gradient.detach()

        return keep

    # ---------------------------------------------------------------- gradients of outputs
    def fired(self, module: nn.Module) -> bool:
        """Whether a module took part in the recorded pass."""
        return bool(self.calls[module]) or module in self._late

    def collect(self, backward: Callable[[], None]) -> OutputGradients:
        """Output gradients of a backward pass that runs anyway, with a cotangent axis of one."""
        for module in self._late:
            self.calls[module].clear()
        self._own = True
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

    def bytes_of_pull(self) -> int:
        """What the output gradients of one cotangent take: each call's output once."""
        calls = [call for calls in self.calls.values() for call in calls]
        return sum(shape.numel() * call.dtype.itemsize for call in calls for shape in call.shapes)

    def pull(self, z: Tensor, cotangents: Tensor) -> OutputGradients:
        """Output gradients for given cotangents of ``z``; keeps the graph.  cotangents: (k, *z.shape)"""
        if self._late or reenters(z):
            return self._pull_by_backward(z, cotangents)
        k = cotangents.shape[0]
        edges = [edge for calls in self.calls.values() for call in calls for edge in call.edges]
        gradients = iter(vector_jacobian(z, edges, cotangents))
        return {
            module: [[_or_zeros(next(gradients), (k, *shape), call) for shape in call.shapes] for call in calls]
            for module, calls in self.calls.items()
        }

    def _pull_by_backward(self, z: Tensor, cotangents: Tensor) -> OutputGradients:
        """As `pull`, where a reentrant checkpoint allows nothing but a whole backward pass; ``.grad`` is put back."""
        with self.gradients_apart():
            passes = [self.collect(lambda c=c: z.backward(c, retain_graph=True)) for c in cotangents]  # type: ignore[misc]
        return {
            module: [
                [torch.cat(same) for same in zip(*call, strict=True)] for call in zip(*(p[module] for p in passes), strict=True)
            ]
            for module in self.calls
        }

    def pull_parameters(self, z: Tensor, cotangent: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """``J^T u`` for some parameters; keeps the graph, and ``.grad``.  cotangent: like z"""
        if not reenters(z):
            with self.paused():  # a checkpoint repeats its calls
                pulled = torch.autograd.grad(z, parameters, cotangent, retain_graph=True, materialize_grads=True)
            return list(pulled)
        with self.gradients_apart():
            self.collect(lambda: z.backward(cotangent, retain_graph=True))
            return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]

    @contextmanager
    def gradients_apart(self) -> Iterator[None]:
        """No parameter has a gradient inside; afterwards it is as it was."""
        parameters = list(self.root.parameters())
        kept = [p.grad for p in parameters]
        try:
            for p in parameters:
                p.grad = None
            yield
        finally:
            for p, g in zip(parameters, kept, strict=True):
                p.grad = g


def _repeated(value: Any, n: int) -> Any:
    """Something that goes in or out of a call, for ``n`` examples instead of one for all."""
    lone = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == 1
    return value.expand(n, *value.shape[1:]) if lone else value


def _or_zeros(gradient: Tensor | None, shape: Iterable[int], call: Call) -> Tensor:
    return call.input.new_zeros(*shape, dtype=call.dtype) if gradient is None else gradient


def vector_jacobian(z: Tensor, edges: list[Any], cotangents: Tensor) -> list[Tensor | None]:
    """``cotangent^T dz/d(edge)`` for a batch of cotangents, in one batched pass where every operation allows it."""
    if not edges:
        return []
    if cotangents.shape[0] == 1:
        found = torch.autograd.grad(z, edges, cotangents[0], retain_graph=True, allow_unused=True)
        return [None if g is None else g.unsqueeze(0) for g in found]
    try:
        return list(torch.autograd.grad(z, edges, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True))
    except RuntimeError:  # an operation without a batching rule, or a checkpoint that recomputes
        passes = [torch.autograd.grad(z, edges, c, retain_graph=True, allow_unused=True) for c in cotangents]
        return [None if same[0] is None else torch.stack(same) for same in zip(*passes, strict=True)]
