"""The head of a pass: the outputs that the loss is a function of, with their loss gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from gradmaker.errors import SelfCheckError
from gradmaker.loss.likelihood import loss_gradients_of
from gradmaker.loss.recorder import LossRecorder
from gradmaker.loss.terms import Terms
from gradmaker.trees import tensors

__all__ = ["Head"]


@dataclass
class Head:
    """Outputs ``z`` of one pass, those of the recognised loss terms or else of the model, and ``dL/dz``.

    The gradient in an output is that of its own loss term: where another output is computed from it, that path is left out.
    """

    outputs: list[Tensor]
    terms: list[Terms] = field(default_factory=list)  # one for each output; none where the loss is not recognised
    loss: Tensor | None = None  # None: not known
    recorder: LossRecorder | None = None
    known: list[Tensor] | None = None  # loss gradients, if they are known already
    order: Literal["first", "last"] = "first"  # of output rows: example by example, or the example runs fastest
    whole: bool = False  # whether the terms are those of the whole loss, by autograd

    @classmethod
    def of(cls, loss: Tensor, output: Any, terms: Sequence[Terms], recorder: LossRecorder) -> Head:
        """The head of a declared loss.  output: of the model"""
        if terms:
            return cls([t.z for t in terms], list(terms), loss, recorder)
        found = (v for v in tensors(output) if v.requires_grad and v.is_floating_point())
        unique = {id(v): v for v in found if v is not loss}
        return cls(list(unique.values()), [], loss, recorder)

    @property
    def declared(self) -> bool:
        """Whether the terms are those of a likelihood that the user has declared, not of recognised calls."""
        return self.recorder is None or not any(call.output.requires_grad for call in self.recorder.calls)

    @property
    def loss_gradients(self) -> list[Tensor]:
        """``dL/dz`` of each output. SelfCheckError where the loss does not depend on the declared logits."""
        found = [s for s in self._found if s is not None]
        if len(found) < len(self.outputs):
            raise SelfCheckError(
                "the loss does not depend on what setup_logits_repr names: name the same tensor that goes into the loss, not "
                "another view of it"
            )
        return found

    @cached_property
    def _found(self) -> list[Tensor | None]:
        if self.known is not None:
            return list(self.known)
        assert self.loss is not None and self.recorder is not None
        if self.terms:
            return loss_gradients_of(self.recorder, self.loss, self.terms)
        if not self.outputs:
            return []
        found = torch.autograd.grad(self.loss, self.outputs, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(z) if s is None else s for z, s in zip(self.outputs, found, strict=True)]

    def probes(self, generator: torch.Generator) -> list[Tensor]:
        """Cotangents for self-checks: the loss gradients, or random numbers where there are none.  # like z each"""
        return [
            torch.randn(z.shape, generator=generator).to(z) if s is None else s
            for z, s in zip(self.outputs, self._found, strict=True)
        ]

    def divides(self, n: int) -> bool:
        """Whether the rows of every output divide into ``n`` equal parts."""
        if self.terms:
            return all(t.omega.numel() % n == 0 for t in self.terms)
        return all(z.ndim > 0 and z.shape[0] % n == 0 for z in self.outputs)

    def owners(self, n: int) -> list[Tensor]:
        """The index of the example that each entry of an output belongs to, by `order`.  # like z each"""
        if self.terms:
            return [t.owners(n) for t in self.terms]
        return [_owners(z, n, self.order) for z in self.outputs]

    def repeats(self, n: int) -> bool:
        """Whether an output has several rows for each of ``n`` examples."""
        if self.terms:
            return any(t.omega.numel() > n for t in self.terms)
        return any(len(z) > n for z in self.outputs)

    def turn(self) -> None:
        """Switch to the other order of output rows."""
        self.order = "last" if self.order == "first" else "first"
        self.terms = [t.turned() for t in self.terms]

    def counted(self) -> list[Tensor]:
        """1 where an entry of an output contributes to the loss, else 0.  # like z each"""
        if not self.terms:
            return [torch.ones_like(z) for z in self.outputs]
        return [t.spread(t.valid().to(t.omega.dtype)) for t in self.terms]


def _owners(z: Tensor, n: int, order: str) -> Tensor:
    if n == 1:
        return torch.zeros((), dtype=torch.int64, device=z.device)
    rows = torch.arange(z.shape[0], device=z.device)
    rows = rows // (z.shape[0] // n) if order == "first" else rows % n
    return rows.view(-1, *[1] * (z.ndim - 1)).expand(z.shape)
