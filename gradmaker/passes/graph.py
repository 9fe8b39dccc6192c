"""Hessian-vector and Gauss-Newton products of a step's loss, through the autograd graph of its forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor, nn

from gradmaker.loss.terms import Terms
from gradmaker.reentrant import nodes, refuse_reentrant

__all__ = ["Graph", "Vectors"]

Vectors: TypeAlias = Mapping[nn.Parameter, Tensor]
"""A vector of the parameter space, as one tensor for each parameter; parameters without one count as zero."""


class Graph:
    """Autograd graph of a loss, for products with its second derivatives.

    Double backward: Pearlmutter, Neural Computation 1994; Gauss-Newton products: Schraudolph, Neural Computation 2002.
    """

    def __init__(self, model: nn.Module, loss: Tensor, terms: Sequence[Terms], logits: Tensor | None = None) -> None:
        """logits: declared output of which the whole loss is a convex function; None: the loss is the sum of its terms."""
        refuse_reentrant(loss)
        self.outputs = [t.z for t in terms] if logits is None else [logits]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.loss, self.terms, self.logits = loss, list(terms), logits
        found = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
        self.gradients = dict(zip(self.parameters, found, strict=True))  # in the graph; None where L does not depend on p
        self._known_vjp: tuple[list[Tensor], list[nn.Parameter], list[Tensor], Sequence[Tensor | None]] | None = None
        self._sound = True  # whether all operations of the last vjp can be differentiated twice

    def write_gradients(self, weight: float) -> None:
        """Set ``.grad`` to the gradient of ``weight * loss``, as a backward pass from None would."""
        for p, g in self.gradients.items():
            p.grad = None if g is None else (g.detach() * weight if weight != 1.0 else g.detach().clone())

    def hessian(self, vectors: Vectors) -> dict[nn.Parameter, Tensor]:
        """Hessian-vector product ``H v``: the gradient of ``<grad L, v>``. RuntimeError if L is differentiable only once."""
        _refuse(self._cut)
        pairs = [(g, vectors[p]) for p, g in self.gradients.items() if g is not None and g.requires_grad and p in vectors]
        return self._differentiate([g for g, _ in pairs], [v for _, v in pairs])

    @cached_property
    def _cut(self) -> bool:
        return _ends_early(g for g in self.gradients.values() if g is not None)

    def gauss_newton(self, vectors: Vectors) -> dict[nn.Parameter, Tensor]:
        """Gauss-Newton product ``sum_t J_t^T Lambda_t J_t v`` over the loss terms, or ``J^T H_L J v`` with declared logits.

        ValueError where no outputs are known of which the loss is a convex function.
        """
        self.check_outputs()
        jvps = self.jvp(self.outputs, vectors)
        if self.logits is None:
            return self._differentiate(self.outputs, [t.multiply(u) for t, u in zip(self.terms, jvps, strict=True)])
        (loss_gradient,) = torch.autograd.grad(self.loss, self.logits, create_graph=True, allow_unused=True)
        if loss_gradient is None:
            raise ValueError(
                "the loss does not depend on what setup_logits_repr names as the logits: name the tensor that enters the loss"
            )
        if not loss_gradient.requires_grad:
            return self._differentiate([], [])
        curved = torch.autograd.grad(loss_gradient, self.logits, jvps, retain_graph=True, allow_unused=True)
        return self._differentiate([self.logits], list(curved)) if curved[0] is not None else self._differentiate([], [])

    def take(self, terms: Sequence[Terms], loss_gradients: Sequence[Tensor]) -> float:
        """Set the terms of the whole loss, with ``dL/dz``.

        Returns the relative norm of the part of the gradient that does not go through them.
        """
        self.terms, self.outputs = list(terms), [t.z for t in terms]
        through = self._differentiate(self.outputs, list(loss_gradients))
        pairs = [(torch.zeros_like(p) if g is None else g.detach(), through[p]) for p, g in self.gradients.items()]
        difference, size = (
            torch.stack([x.abs().double().square().sum() for x in each]).sum().sqrt()
            for each in ([g - u for g, u in pairs], [g for g, _ in pairs])
        )
        return float(difference / size) if size > 0 else 0.0

    def check_outputs(self) -> None:
        """ValueError where no outputs are known of which the loss is a convex function."""
        if not self.outputs:
            raise ValueError(
                "Gauss-Newton products need a recognised loss (F.cross_entropy, F.nll_loss, F.mse_loss or "
                "F.binary_cross_entropy_with_logits, as functions or modules), or setup_logits_repr to name the "
                "outputs in which the loss is convex"
            )

    def jvp(self, outputs: Sequence[Tensor], vectors: Vectors) -> list[Tensor]:
        """Jacobian-vector products ``J v`` of outputs: the derivative of ``u -> J^T u`` in the direction ``v``."""
        moved = [p for p in self.parameters if p in vectors]
        duals, vjps = self._vjp(outputs, moved)
        pairs = [(g, vectors[p]) for g, p in zip(vjps, moved, strict=True) if g is not None]
        if not pairs:
            return [torch.zeros_like(z) for z in outputs]
        found = torch.autograd.grad([g for g, _ in pairs], duals, [v for _, v in pairs], retain_graph=True, allow_unused=True)
        return [torch.zeros_like(z) if u is None else u for u, z in zip(found, outputs, strict=True)]

    def _vjp(self, outputs: Sequence[Tensor], moved: list[nn.Parameter]) -> tuple[list[Tensor], Sequence[Tensor | None]]:
        """``u`` and ``J^T u`` in the graph, which serve every vector; those of the last call are cached."""
        known = self._known_vjp
        if known is None or not (_same(known[0], outputs) and _same(known[1], moved)):
            duals = [torch.zeros_like(z, requires_grad=True) for z in outputs]
            found = torch.autograd.grad(outputs, moved, duals, create_graph=True, allow_unused=True)
            self._known_vjp = known = list(outputs), moved, duals, found
            self._sound = not _ends_early(g for g in found if g is not None)
        _refuse(not self._sound)
        return known[2], known[3]

    def _differentiate(self, values: list[Tensor], weights: list[Tensor]) -> dict[nn.Parameter, Tensor]:
        if not values:
            return {p: torch.zeros_like(p) for p in self.parameters}
        found = torch.autograd.grad(values, self.parameters, weights, retain_graph=True, allow_unused=True)
        return {p: torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)}


# ------------------------------------------------------------------ operations that are differentiable once
def _refuse(cut: bool) -> None:
    if cut:
        raise RuntimeError(
            "the gradient of an operation that was marked with @once_differentiable cannot be differentiated: replace the "
            "operation, or use a method without second derivatives"
        )


def _ends_early(gradients: Iterable[Tensor]) -> bool:
    """Whether the gradients pass through an operation that is marked with ``@once_differentiable``.

    Torch ends such a gradient in a node that raises. Derivatives in other tensors do not reach that node: without this check
    they would silently treat the gradient as a constant.
    """
    return any(node.name() == "torch::autograd::Error" for node in nodes(gradients))


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
