"""Calls of linear layers whose weight gradient ``G = g^T a`` is held by its rows instead of being computed.

The autograd graph of each pass proves where this is right: outside of the recorded call the loss depends on no parameter of the
layer. The backward pass then ends at the output of the call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradmaker.capture.borrowing import is_pass
from gradmaker.capture.hooks import ModuleHook, edge_of
from gradmaker.capture.rules.calls import LayerRule
from gradmaker.capture.rules.layers import rule_for
from gradmaker.capture.sites import Site
from gradmaker.linalg.factored_gradient import FactoredGradient

__all__ = ["RowCalls", "RowLayer", "readable"]

SAVED: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
"""Returns the hooks through which tensors are saved for a backward pass."""
NODES = 100_000
"""Nodes of a graph beyond which the proof would take longer than it can gain."""


@dataclass(frozen=True, eq=False)
class RowLayer:
    """A linear layer with the site that its whole weight is, with or without its bias."""

    site: Site
    module: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None  # if it is the last column of the site
    inputs_first: bool  # whether the weight is stored as (i, o)
    turned: bool  # whether the block is laid out as (i, o)
    held: Mapping[str, nn.Parameter | None]  # all parameters of the module, by name
    most: float  # rows from which on they do not pay

    @classmethod
    def of(cls, site: Site) -> RowLayer | None:
        """The layer of a site; None where the block is something else than the weight of one linear layer."""
        found = _rule_of(site)
        if found is None:
            return None
        module, rule = found
        weight, *others = site.parameters.values()
        held = module._parameters
        bias = held.get("bias") if others else None
        named = held.get(rule.weight_name) is weight and list(others) == ([] if bias is None else [bias])
        turned = site.rule is None and rule.inputs_first
        if site.view is not None:
            turned ^= site.view.transposed
        o, i = site.shape[:0:-1] if turned else site.shape[1:]
        if not named or (o, i - len(others)) != rule.shape(module)[1:]:
            return None
        most = o * i * (o + i) / (o * o + i * i)
        return cls(site, module, weight, bias, rule.inputs_first, turned, dict(held), most)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the site."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def rows(self, a: Tensor, g: Tensor) -> FactoredGradient:
        """The gradient of the block, from the input (..., i) and the output gradient (..., o) of a call."""
        inputs, outputs = (x.reshape(1, -1, x.shape[-1]) for x in (a, g))
        if self.bias is not None:
            inputs = torch.cat([inputs, inputs.new_ones(1, inputs.shape[1], 1)], -1)
        return FactoredGradient(inputs, outputs) if self.turned else FactoredGradient(outputs, inputs)

    def assign(self, value: FactoredGradient | Tensor, into: dict[nn.Parameter, Tensor]) -> None:
        """Form the gradient of each parameter, in the layout of the parameter.  into: new gradients of all sites"""
        if isinstance(value, FactoredGradient):
            self._assign_rows(value, into)
            return
        G = value[0].mT if self.turned else value[0]
        if self.bias is not None:
            into[self.bias], G = G[:, -1].contiguous(), G[:, :-1]
        into[self.weight] = (G.mT if self.inputs_first else G).contiguous()

    def _assign_rows(self, rows: FactoredGradient, into: dict[nn.Parameter, Tensor]) -> None:
        outputs, inputs = (rows.a[0], rows.g[0]) if self.turned else (rows.g[0], rows.a[0])
        if self.bias is not None:
            into[self.bias] = inputs[:, -1] @ outputs
            inputs = inputs[:, :-1]
        into[self.weight] = inputs.mT @ outputs if self.inputs_first else outputs.mT @ inputs


def _rule_of(site: Site) -> tuple[nn.Module, LayerRule] | None:
    """The module and the rule of a site that may be the weight of a linear layer."""
    if len(site.modules) != 1 or site.uses or site.rows or not site.weighted or site.shape[0] != 1 or len(site.shape) != 3:
        return None
    if site.view is not None and (not site.view.whole or site.view.parts != 1 or len(site.view.merged) != 2):
        return None
    if any(p.is_complex() for p in site.parameters.values()):
        return None
    rule = site.rule or rule_for(site.modules[0])
    return None if rule is None or not rule.multiplies else (site.modules[0], rule)


class _Call:
    """One call of a layer."""

    __slots__ = ("edge", "g", "layer", "reached", "source", "version", "x")

    def __init__(self, layer: RowLayer, x: Tensor, output: Tensor) -> None:
        self.layer, self.x, self.version = layer, x, x._version
        self.source: Any = x.grad_fn  # what the gradient of the input goes to, unless that is a leaf
        self.edge: Any = edge_of(output)
        self.reached = False  # whether the loss depends on it
        self.g: Tensor | None = None

    def keep(self, gradients: tuple[Tensor, ...]) -> None:
        """Hook on the node of the output."""
        self.g = gradients[0]

    @property
    def untouched(self) -> bool:
        """Whether its input and the gradients of its parameters are those of the call alone."""
        return self.x._version == self.version and all(_untouched(p) for p in self.layer.parameters)


def _untouched(p: nn.Parameter) -> bool:
    """Whether a parameter trains, has no gradient yet, and no hooks of a user that wait for one."""
    hooks: Any = p._backward_hooks or p._post_accumulate_grad_hooks
    return p.requires_grad and p.grad is None and not hooks


class RowCalls:
    """The calls of some linear layers in one pass, each of one call at most."""

    def __init__(self, layers: Iterable[RowLayer] = ()) -> None:
        self._layers = {layer.module: layer for layer in layers}
        self._calls: dict[nn.Module, _Call | None] = {}  # None: of several calls, which are not held by rows
        self._proven: list[_Call] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context that records the calls of the layers."""
        hook = ModuleHook(self._called)
        handles = [module.register_forward_hook(hook, prepend=True) for module in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _called(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        layer = self._layers.get(module)
        if torch.compiler.is_compiling() or layer is None:
            return
        if module in self._calls:
            self._calls[module] = None
        elif len(args) == 1 and isinstance(output, Tensor) and readable(layer, module, args[0], output):
            self._calls[module] = _Call(layer, args[0], output)

    # ---------------------------------------------------------------- the backward pass
    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """The backward pass of a loss, without the weight gradients that are held by rows."""
        leaves = self._prove(loss)
        if not self._proven:
            loss.backward(retain_graph=retain_graph)
            return
        handles = [call.edge.node.register_prehook(call.keep) for call in self._proven]
        try:
            inputs: Any = [*leaves, *(call.edge for call in self._proven)]
            torch.autograd.backward(loss, retain_graph=retain_graph, inputs=inputs)
        finally:
            for handle in handles:
                handle.remove()

    def gradients(self) -> dict[str, FactoredGradient]:
        """The gradients that are held by rows, by site; forgets the calls.

        A gradient that arrived in another way all the same, as from a backward pass inside of the graph, is added to.
        """
        found: dict[str, FactoredGradient] = {}
        for call in self._proven:
            if call.g is None:
                continue
            rows = call.layer.rows(call.x.detach(), call.g.detach())
            if any(p.grad is not None for p in call.layer.parameters):
                _add(call.layer, rows)
            else:
                found[call.layer.site.name] = rows
        self._calls, self._proven = {}, []
        return found

    @contextmanager
    def written(self, held: Mapping[str, FactoredGradient]) -> Iterator[None]:
        """Context in which gradients that are held by rows are in ``.grad``, as a whole backward pass leaves them."""
        layers = [layer for layer in self._layers.values() if layer.site.name in held]
        try:
            for layer in layers:
                _add(layer, held[layer.site.name])
            yield
        finally:
            for p in (p for layer in layers for p in layer.parameters):
                p.grad = None

    def kept(self, held: Mapping[str, FactoredGradient], layers: Iterable[RowLayer]) -> dict[str, FactoredGradient]:
        """The rows of these layers; those of others are written to ``.grad``."""
        wanted = {(layer.site.name, *layer.parameters) for layer in layers}
        found = dict[str, FactoredGradient]()
        for layer in (each for each in self._layers.values() if each.site.name in held):
            if (layer.site.name, *layer.parameters) in wanted:
                found[layer.site.name] = held[layer.site.name]
            else:
                _add(layer, held[layer.site.name])
        return found

    def _prove(self, loss: Tensor) -> list[Tensor]:
        """Find the calls that hold all uses of their layers in a loss. Returns the other leaves that it depends on.

        The graph is followed through the input of a recorded call alone: if a parameter of the layer is met, it has other uses.
        """
        calls = {call.edge.node: call for call in self._calls.values() if call is not None and call.untouched}
        leaves = _leaves(loss, calls) if calls else None
        if leaves is None:
            return []
        for call in calls.values():
            if call.reached and leaves.isdisjoint(call.layer.parameters):
                self._proven.append(call)
        ended = {p for call in self._proven for p in call.layer.parameters}
        for call in calls.values():
            if call.reached:
                leaves.update(p for p in call.layer.held.values() if p is not None and p.requires_grad and p not in ended)
        return list(leaves)


def readable(layer: RowLayer, module: nn.Module, x: Any, output: Tensor) -> bool:
    """Whether a call is one that rows can stand for: no other weight, dtype or kind of tensor, and rows that pay."""
    weight, own = layer.weight, vars(module)
    if "forward" in own or any(module._parameters.get(k) is not p or k in own for k, p in layer.held.items()):
        return False
    if type(x) is not type(weight.data) or not x.dtype == output.dtype == weight.dtype or output.grad_fn is None:
        return False
    if not 0 < x.numel() < layer.most * x.shape[-1] or not is_pass():
        return False
    others: Any = module._backward_hooks or module._backward_pre_hooks
    anywhere = nn.modules.module
    others = others or anywhere._global_forward_hooks or anywhere._global_backward_hooks
    # A checkpoint, or another owner of saved tensors, does not keep the input: it is not kept here either.
    return not others and SAVED is not None and SAVED(False) is None


def _leaves(loss: Tensor, calls: dict[Any, _Call]) -> set[Tensor] | None:
    """The leaves of a graph, followed through the inputs of these calls; None where a part of the graph is not shown."""
    leaves: set[Tensor] = set()
    stack = [] if loss.grad_fn is None else [loss.grad_fn]
    seen = set(stack)
    while stack:
        node: Any = stack.pop()
        call = calls.get(node)
        if call is not None:
            call.reached = True
            following = {call.source}
            if call.source is None and call.x.requires_grad:
                leaves.add(call.x)
        else:
            following = {f for f, _ in node.next_functions}
            variable = None if following else getattr(node, "variable", None)
            if variable is not None:
                leaves.add(variable)
            elif type(node).__name__.startswith("CheckpointFunction"):  # its backward pass is one without `inputs`
                return None
        following -= seen
        following.discard(None)
        seen |= following
        stack.extend(following)
        if len(seen) > NODES:
            return None
    return leaves


@torch.no_grad()
def _add(layer: RowLayer, rows: FactoredGradient) -> None:
    found: dict[nn.Parameter, Tensor] = {}
    layer.assign(rows, found)
    for p, value in found.items():
        p.grad = value if p.grad is None else p.grad + value
