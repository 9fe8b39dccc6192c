"""Products with second derivatives of a step's loss, through the graph of its forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from gradmaker.curvature.likelihood import Terms

__all__ = ["Graph", "Vectors"]

Vectors: TypeAlias = Mapping[nn.Parameter, Tensor]
"""One tensor for each parameter, in its shape; parameters that are left out count as zero."""


class Graph:
    """The graph of a loss, kept until it is dropped.

    Double backward: Pearlmutter, Neural Computation 1994; Gauss-Newton products: Schraudolph, Neural Computation 2002.
    """

    def __init__(self, model: nn.Module, loss: Tensor, terms: Sequence[Terms], logits: Tensor | None = None) -> None:
        """logits: what the loss is a convex function of, where it was not recognised."""
        self.outputs = [t.z for t in terms] or ([] if logits is None else [logits])
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.loss, self.terms = loss, list(terms)
        found = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
        self.gradients = dict(zip(self.parameters, found, strict=True))  # in the graph; None where the loss does not reach

    def write_gradients(self, weight: float) -> None:
        """``.grad`` as a backward pass of ``weight * loss`` would leave it where there was none."""
        for p, g in self.gradients.items():
            p.grad = None if g is None else (g.detach() * weight if weight != 1.0 else g.detach().clone())

    def hessian(self, vectors: Vectors) -> dict[nn.Parameter, Tensor]:
        """``H v``: the gradient of ``<grad L, v>``."""
        pairs = [(g, vectors[p]) for p, g in self.gradients.items() if g is not None and g.requires_grad and p in vectors]
        return self._differentiate([g for g, _ in pairs], [v for _, v in pairs])

    def gauss_newton(self, vectors: Vectors) -> dict[nn.Parameter, Tensor]:
        """``J^T H_L J v``, with ``H_L`` the Hessian of the loss in the logits."""
        self.check_outputs()
        outputs = self.outputs
        pushed = self.push(outputs, vectors)
        slopes = torch.autograd.grad(self.loss, outputs, create_graph=True)
        live = [(s, u) for s, u in zip(slopes, pushed, strict=True) if s.requires_grad]
        if not live:
            return {p: torch.zeros_like(p) for p in self.parameters}
        curved = torch.autograd.grad([s for s, _ in live], outputs, [u for _, u in live], retain_graph=True, allow_unused=True)
        reached = [(z, c) for z, c in zip(outputs, curved, strict=True) if c is not None]
        return self._differentiate([z for z, _ in reached], [c for _, c in reached])

    def check_outputs(self) -> None:
        """ValueError unless it is known what the loss is a convex function of."""
        if not self.outputs:
            raise ValueError(
                "Gauss-Newton products need a recognised loss (F.cross_entropy, F.nll_loss, F.mse_loss or "
                "F.binary_cross_entropy_with_logits, as functions or modules), or setup_logits_repr to name what the loss is a "
                "convex function of"
            )

    def push(self, outputs: Sequence[Tensor], vectors: Vectors) -> list[Tensor]:
        """``J v`` for several outputs: the derivative of ``u -> J^T u`` in the direction ``v``."""
        moved = [p for p in self.parameters if p in vectors]
        duals = [torch.zeros_like(z, requires_grad=True) for z in outputs]
        pulled = torch.autograd.grad(outputs, moved, duals, create_graph=True, allow_unused=True)
        pairs = [(g, vectors[p]) for g, p in zip(pulled, moved, strict=True) if g is not None]
        if not pairs:
            return [torch.zeros_like(z) for z in outputs]
        found = torch.autograd.grad([g for g, _ in pairs], duals, [v for _, v in pairs], retain_graph=True, allow_unused=True)
        return [torch.zeros_like(z) if u is None else u for u, z in zip(found, outputs, strict=True)]

    def _differentiate(self, values: list[Tensor], weights: list[Tensor]) -> dict[nn.Parameter, Tensor]:
        if not values:
            return {p: torch.zeros_like(p) for p in self.parameters}
        found = torch.autograd.grad(values, self.parameters, weights, retain_graph=True, allow_unused=True)
        return {p: torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)}
