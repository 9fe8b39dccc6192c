"""The quadratic model of a step's loss, with the exact Fisher matrix of the step's own batch.

Letters: ``d`` displacements of the weights, ``g`` the gradient, ``F`` the Fisher matrix, ``J`` the Jacobian of the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import torch.autograd.forward_ad as forward
from torch import Tensor, nn

from gradmaker.curvature.hessian import ADVICE, UNSUPPORTED
from gradmaker.loss.recorder import LossRecorder
from gradmaker.loss.terms import Terms
from gradmaker.passes.batches import Batch, terms_of
from gradmaker.reentrant import refuse_reentrant

__all__ = ["Displacement", "QuadraticModel", "inner"]

Displacement: TypeAlias = Mapping[nn.Parameter, Tensor]


@dataclass(frozen=True)
class QuadraticModel:
    """``m(d) = g^T d + d^T F d / 2``, ``F = sum_m J_m^T Lambda_m J_m``, around the weights of a step.

    A direction costs one forward-mode pass over each batch of the step, with the random numbers of the step; no matrix and no
    further gradient is formed. The batches are held, the activations are not.

    Reference: Martens & Grosse, ICML 2015, arXiv:1503.05671, section 6.4 and appendix C.
    """

    weights: dict[nn.Parameter, Tensor]  # of the step
    passes: tuple[tuple[Batch, float], ...] = ()  # each with its share in the loss of the step

    @classmethod
    def at(cls, model: nn.Module) -> QuadraticModel:
        """The model around the present weights."""
        return cls({p: p.detach().clone() for p in model.parameters() if p.requires_grad})

    def plus(self, batch: Batch, weight: float) -> QuadraticModel:
        """The model with one more pass of the step."""
        return replace(self, passes=(*self.passes, (batch, weight)))

    def expand(self, directions: Sequence[Displacement]) -> tuple[Tensor, Tensor, Tensor]:
        """``L``, ``g^T d_i`` and ``d_i^T F d_j``.  # (), (k,), (k, k)"""
        parts = [[x * weight for x in self._expand(batch, directions)] for batch, weight in self.passes]
        loss, derivatives, F = (torch.stack(each).sum(0) for each in zip(*parts, strict=True))
        return loss, derivatives, F

    def _expand(self, batch: Batch, directions: Sequence[Displacement]) -> tuple[Tensor, Tensor, Tensor]:
        jvps = [self._jvp(batch, d) for d in directions]
        loss, _, _, terms = jvps[0]
        images = [us for _, _, us, _ in jvps]
        rows = [
            torch.stack(
                [torch.stack([t.inner(u, v) for t, u, v in zip(terms, us, vs, strict=True)]).double().sum() for vs in images]
            )
            for us in images
        ]
        return loss, torch.stack([derivative for _, derivative, _, _ in jvps]), torch.stack(rows)

    @torch.enable_grad()
    def _jvp(self, batch: Batch, direction: Displacement) -> tuple[Tensor, Tensor, list[Tensor], list[Terms]]:
        """``L``, ``g^T d``, and ``J d`` of every loss call, with its terms. RuntimeError or ValueError without these."""
        try:
            with forward.dual_level(), LossRecorder() as recorder:
                duals = {p: forward.make_dual(w.detach().requires_grad_(), direction[p]) for p, w in self.weights.items()}
                logits, loss = batch.replay.run(duals)
                refuse_reentrant(loss)
                terms = terms_of(recorder, loss, logits, batch.reading.likelihood)
                value, derivative = forward.unpack_dual(loss)
                images = [forward.unpack_dual(t.z).tangent for t in terms]
        except RuntimeError as error:
            if not isinstance(error, NotImplementedError) and not any(words in str(error) for words in UNSUPPORTED):
                raise
            raise RuntimeError(
                "the quadratic model of a step is differentiated forwards, which this model does not support "
                f"({str(error).splitlines()[0]}); {ADVICE}"
            ) from error
        if not terms:
            raise ValueError(
                "the quadratic model needs the Fisher matrix of the loss: a recognised loss (F.cross_entropy, F.nll_loss, "
                "F.mse_loss or F.binary_cross_entropy_with_logits), or likelihood= and setup_logits_repr"
            )
        zero = torch.zeros_like(value) if derivative is None else derivative
        moved = [torch.zeros_like(t.z) if u is None else u.detach() for u, t in zip(images, terms, strict=True)]
        return _number(value), _number(zero), moved, terms

    @torch.no_grad()
    def loss_now(self) -> Tensor:
        """The loss of the step at the present weights.  # ()"""
        return torch.stack([_number(batch.replay.run()[1]) * weight for batch, weight in self.passes]).sum()

    @torch.no_grad()
    def displacement(self) -> dict[nn.Parameter, Tensor]:
        """The displacement of the weights since the step."""
        return {p: p.detach() - w for p, w in self.weights.items()}


def _number(x: Tensor) -> Tensor:
    return x.detach().reshape(()).double()


def inner(a: Displacement, b: Displacement) -> Tensor:
    """``<a, b>`` in double precision.  # ()"""
    return torch.stack([(v.double() * b[p].double()).sum() for p, v in a.items()]).sum()
