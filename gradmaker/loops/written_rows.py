"""Rows of gradients that a loop's backward pass has written to ``.grad``, where these are the gradients of one recorded call.

The product node of a linear layer tells where in memory it has put the gradient of the weight. If that tensor is what ``.grad``
holds at the end of the backward pass, and nobody has written to it, ``.grad`` is ``g^T a`` of this call and of no other.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Set
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from gradmaker.capture.borrowing import foreign
from gradmaker.capture.hooks import ModuleHook
from gradmaker.capture.row_calls import RowLayer, readable
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.loops.eager import Eager
from gradmaker.loops.loop_pass import at_the_end

__all__ = ["WrittenRows"]

VIEWS = ("ViewBackward0", "UnsafeViewBackward0")
PRODUCTS = ("AddmmBackward0", "MmBackward0")
TOLERANCE = 1.0
"""Largest difference of two products with a vector, in roundoffs of ``|g| |a|``; correct ones differ by a quarter at most."""


class WrittenRows:
    """The calls of linear layers in one pass of a loop, each of one call at most."""

    def __init__(self) -> None:
        self._layers: dict[nn.Module, RowLayer] = {}
        self._calls: dict[nn.Module, _Written | None] = {}  # None: of several calls, or of one that shows nothing
        self._hooks = ExitStack()

    def begin(self, layers: Iterable[RowLayer], model: nn.Module | None) -> None:
        """Record the coming call of a model, unless it is compiled, instead of an earlier one.

        model: whose return ends it; None: `returned` is called
        """
        self.release()
        self._layers = {} if Eager.compiling else {layer.module: layer for layer in layers}
        hook = ModuleHook(self._called)
        for module in self._layers:
            self._hooks.callback(module.register_forward_hook(hook, prepend=True).remove)
        if self._layers and model is not None:  # the last of all hooks, since it is called after exceptions, too
            self._hooks.callback(model.register_forward_hook(ModuleHook(self.returned), always_call=True).remove)

    def release(self) -> None:
        """Forget the pass."""
        self._hooks.close()
        for call in self._calls.values():
            if call is not None:
                call.forget()
        self._calls = {}

    def returned(self, *_: Any) -> None:
        """End the recording when the model has returned."""
        self._hooks.close()

    def _called(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():  # a block that is compiled by itself, which reading its graph would break
            return
        layer = self._layers.get(module)
        if layer is None:
            return
        again = module in self._calls
        self._calls[module] = None
        if not again and len(args) == 1 and isinstance(output, Tensor) and readable(layer, module, args[0], output):
            node = _product(output)
            if node is not None and (places := _places(layer, node)) is not None:
                self._calls[module] = _Written(layer, args[0], node, places)

    @torch.no_grad()
    def proven(self, served: Set[nn.Parameter]) -> dict[str, FactoredGradient]:
        """Gradients in ``.grad`` by rows, by site, where they are those of a recorded call.  served: parameters of the step"""
        found: dict[str, FactoredGradient] = {}
        for call in self._calls.values():
            rows = None if call is None or not all(p in served for p in call.layer.parameters) else call.rows()
            if call is not None and rows is not None:
                found[call.layer.site.name] = rows
        return found


class _Written:
    """One call of a layer, and what its backward pass has written."""

    def __init__(self, layer: RowLayer, x: Tensor, node: Any, places: tuple[int, ...]) -> None:
        """places: of the parameters among the inputs of the node"""
        self.layer, self.places = layer, places
        self.x: Tensor | None = x
        self.version = x._version
        self.g: Tensor | None = None
        self.at: list[tuple[int, int]] = []  # address and version of the gradient of each parameter
        self.held: list[tuple[weakref.ref[Tensor], int]] = []  # what `.grad` was at the end of the backward pass
        node.register_hook(self.arrive)

    def forget(self) -> None:
        """Release the tensors; the hook stays, as long as the graph."""
        self.x = self.g = None
        self.held = []

    def arrive(self, inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> None:
        """Hook on the product node.  inputs: gradients that it has computed; outputs: those that it was given"""
        g = outputs[0]
        if self.x is None or g is None or foreign(g):
            return
        found = [v for v in (inputs[place] for place in self.places) if v is not None]
        self.g, self.held = None, []
        if len(found) == len(self.places):
            self.g, self.at = g.detach(), [(v.data_ptr(), v._version) for v in found]
            at_the_end(self.settle)

    def settle(self) -> None:
        """At the end of the backward pass: keep what `.grad` is, if it is what this call has written."""
        gradients = [p.grad for p in self.layer.parameters]
        held = [(weakref.ref(g), g._version) for g in gradients if g is not None]
        where = [(g.data_ptr(), g._version) for g in gradients if g is not None]
        if where == self.at and not any(p._backward_hooks for p in self.layer.parameters):
            self.held = held
        else:
            self.g = None

    def rows(self) -> FactoredGradient | None:
        """The rows, if nothing was written since: to the input, to the gradient, or to ``.grad``."""
        x, g, gradients = self.x, self.g, [p.grad for p in self.layer.parameters]
        if x is None or g is None or x._version != self.version:
            return None
        now = [(g, -1 if g is None else g._version) for g in gradients]
        if len(now) != len(self.held) or any(r() is not h or v != w for (r, v), (h, w) in zip(self.held, now, strict=True)):
            return None
        rows = self.layer.rows(x.detach(), g)
        return rows if _agrees(self.layer, rows) else None


def _product(output: Tensor) -> Any:
    """The node of the product of a linear layer, from its output; None where it is another."""
    node: Any = output.grad_fn
    while type(node).__name__ in VIEWS:
        ((node, _),) = node.next_functions
    return node if type(node).__name__ in PRODUCTS else None


def _places(layer: RowLayer, node: Any) -> tuple[int, ...] | None:
    """Where the parameters of a layer are among the inputs of a product node; None where they are not."""
    following = [f for f, _ in node.next_functions]
    weight = following[-1]
    if type(weight).__name__ == "TBackward0":
        ((weight, _),) = weight.next_functions
    leaves = [weight] if layer.bias is None else [weight, following[0]]
    own = [getattr(leaf, "variable", None) for leaf in leaves]
    right = all(p is q for p, q in zip(own, layer.parameters, strict=True))
    return ((len(following) - 1, 0) if layer.bias is not None else (len(following) - 1,)) if right else None


def _agrees(layer: RowLayer, rows: FactoredGradient) -> bool:
    """Whether ``.grad`` and the rows have the same product with a vector.

    Writing to ``p.grad.data`` counts no version. On an accelerator this would wait for it, and is left out.
    """
    if rows.g.device.type != "cpu":
        return True
    outputs, inputs = (rows.a[0], rows.g[0]) if layer.turned else (rows.g[0], rows.a[0])
    i = inputs.shape[1]
    v = torch.cos(torch.arange(1, i + 1, dtype=inputs.dtype) ** 2)  # any vector that a loop does not know
    W = layer.weight.grad
    assert W is not None
    W = W.mT if layer.inputs_first else W
    found = W @ v[: W.shape[1]]
    if layer.bias is not None and layer.bias.grad is not None:
        found = found + layer.bias.grad * v[-1]
    difference = (found - outputs.mT @ (inputs @ v)).norm()
    return bool(difference <= TOLERANCE * torch.finfo(v.dtype).eps * rows.bound() * v.norm())
