"""Matrix-free curvature: matrix-vector products of the present step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Evidence
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.curvature.products import Layers, Product
from gradmaker.linalg.matrix_from_products import form_blocks
from gradmaker.linalg.state import State
from gradmaker.representations.base import NEWEST_ALONE, NO_LIMIT, Fold, Frame, Grain
from gradmaker.representations.capabilities import Multiplies
from gradmaker.representations.roles import Compact, PerStep, Snapshots, Unstacked

__all__ = ["Held", "Implicit", "MatrixFree"]

_NOW = "a product ends with its step, so that it is measured and prepared at every one; fewer iterations make it cheaper"
EVERY_STEP = dict.fromkeys(("curvature_interval", "preconditioner_interval", "warmup_steps"), _NOW)


class Held(dict[str, Tensor]):
    """A state of tensors with the matrix-vector products of the present step."""

    def __init__(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(tensors or {})
        self.products: list[tuple[float, Product]] = []  # with the weights of their micro-batches
        self.mass = 1.0  # of the step's first fold


@runtime_checkable
class MatrixFree(Multiplies, Protocol):
    """Matrix-vector products and losses at displaced parameters, with what helps a solver, for one block of the whole model."""

    def origin(self, state: State) -> Tensor:
        """The zero vector.  # (1, P)"""

    def loss_at(self, state: State, displacement: Tensor) -> Tensor | None:
        """``L(theta + displacement)``; None where it cannot be evaluated.  # (1, P) -> ()"""

    def loss_and_gradient_at(self, state: State, displacement: Tensor) -> tuple[Tensor, Tensor] | None:
        """The loss of the search batch at ``theta + displacement`` and its gradient there.  # (1, P) -> (), (1, P)"""

    def squares(self, state: State) -> Tensor | None:
        """The diagonal of the empirical Fisher matrix; None where it is not measured.  # (1, P)"""

    def layers(self, state: State) -> list[tuple[float, Layers]]:
        """Kronecker factors of this step's micro-batches, with their weights; empty where they are not measured."""


@dataclass(frozen=True)
class Implicit(Unstacked, PerStep, Snapshots, Compact):
    """``C`` as a matrix-vector product for all parameters as one vector: the weighted sum over the micro-batches of a step.

    A product keeps the graph of its pass, and is valid until the step ends: there are no averages over steps and no intervals
    between measurements. A saved state has only the number of parameters.
    """

    takes: ClassVar[frozenset[Kind]] = kinds(Product)
    inapplicable = NEWEST_ALONE | NO_LIMIT | EVERY_STEP

    @property
    def grain(self) -> Grain:
        return "full"

    def init(self, frame: Frame) -> State:
        return Held({"extent": frame.zeros(*frame.shape, 0)})

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        if not isinstance(evidence, Product):
            raise TypeError("Implicit: expected Product evidence; verify() has no dense matrix of a matrix-free curvature")
        assert isinstance(state, Held)
        if not state.products:
            if not fold.mass:
                raise RuntimeError("Implicit: the products of this step's first micro-batches are gone: begin the step again")
            state.mass = fold.mass
        state.products.append((fold.alpha / state.mass, evidence))  # the decay, which has no meaning here, cancels

    def duplicate(self, state: State) -> State:
        held = Held(state)
        if isinstance(state, Held):
            held.products, held.mass = list(state.products), state.mass
        return held

    def release(self, state: State) -> None:
        if isinstance(state, Held):
            state.products.clear()

    def snapshot(self, state: State) -> State:
        held = Held(state)
        held.products = state.products if isinstance(state, Held) else []  # the same list: it ends with the step
        return held

    def origin(self, state: State) -> Tensor:
        extent = state["extent"]
        return extent.new_zeros(extent.shape[:2])

    def matvec(self, state: State, v: Tensor) -> Tensor:
        image = torch.zeros_like(v)
        for weight, product in _products(state):
            image.add_(product.matvec(v), alpha=weight)
        return image

    def loss_at(self, state: State, displacement: Tensor) -> Tensor | None:
        """``sum_j w_j L_j(theta + displacement)`` over the micro-batches of this step.  # (1, P) -> ()"""
        known = [(w, product.loss_at) for w, product in _products(state)]
        losses = [w * loss_at(displacement) for w, loss_at in known if loss_at is not None]
        return torch.stack(losses).sum() if len(losses) == len(known) else None

    def loss_and_gradient_at(self, state: State, displacement: Tensor) -> tuple[Tensor, Tensor] | None:
        known = [(w, product.loss_and_gradient_at) for w, product in _products(state)]
        found = [(w, evaluate(displacement)) for w, evaluate in known if evaluate is not None]
        if len(found) < len(known):
            return None
        return torch.stack([w * loss for w, (loss, _) in found]).sum(), torch.stack([w * g for w, (_, g) in found]).sum(0)

    def squares(self, state: State) -> Tensor | None:
        known = [(w, product.squares) for w, product in _products(state)]
        found = [w * squares for w, squares in known if squares is not None]
        return torch.stack(found).sum(0) if len(found) == len(known) else None

    def layers(self, state: State) -> list[tuple[float, Layers]]:
        known = [(w, product.layers) for w, product in _products(state)]
        return [(w, layers) for w, layers in known if layers is not None]

    def to_dense(self, state: State) -> Tensor:
        origin = self.origin(state)
        return form_blocks(partial(self.matvec, state), origin.unsqueeze(-1).expand(1, -1, origin.shape[1]))


def _products(state: State) -> list[tuple[float, Product]]:
    if not isinstance(state, Held) or not state.products:
        raise RuntimeError("Implicit: the products are valid in the step that measured them, and that is over: measure again")
    return state.products
