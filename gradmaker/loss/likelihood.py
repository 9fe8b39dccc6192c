"""Likelihoods: losses as negative log-likelihoods, with reductions, masks, class weights, smoothing and loss factors.

The terms, and the factors of their curvature, are in `gradmaker.loss.terms`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradmaker.loss.recorder import LossCall, LossRecorder, Weighting
from gradmaker.loss.terms import BernoulliTerms, CategoricalTerms, GaussianTerms, Terms, effective_number, rows_of
from gradmaker.loss.weights import together
from gradmaker.options.checks import check_choice

__all__ = [
    "LIKELIHOODS",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "Likelihood",
    "find_likelihood",
    "loss_gradients_of",
    "read_terms",
    "terms_from_gradient",
    "weightings",
]


# -------------------------------------------------------------------- from weights to terms
def _reduced(weight: Tensor, w: Weighting) -> Tensor:
    """``omega``. A mean over nothing divides by 1: all of its terms are masked, and stay 0 instead of NaN."""
    return weight / torch.where(w.total > 0, w.total, 1.0) if w.reduction == "mean" else weight


# -------------------------------------------------------------------- likelihoods
@dataclass(frozen=True, kw_only=True)
class Likelihood(ABC):
    """A distribution whose negative log is the loss; declared by the user where the loss is not recognised."""

    reduction: str = "mean"  # over the valid terms

    def __post_init__(self) -> None:
        check_choice(f"{type(self).__name__}.reduction", self.reduction, ("mean", "sum"), hint=", as the loss does")

    def terms(self, z: Tensor, factor: float | Tensor = 1.0, valid: Tensor | None = None) -> Terms:
        """The terms of ``factor * reduction_m l_m(z_m)``. ValueError where ``valid`` is not one number for each term.

        factor: a number, () or one for each term; valid: which terms count, None for all
        """
        rows = rows_of(z, self.axis_of(z))
        kept = rows.new_ones(len(rows)) if valid is None else valid.detach().reshape(-1).to(rows)
        if len(kept) != len(rows):
            raise ValueError(
                f"valid has {len(kept)} elements, z of shape {tuple(z.shape)} has {len(rows)} terms: give one each"
            )
        scaled = kept * (factor.detach().reshape(-1).to(rows) if isinstance(factor, Tensor) else factor)
        weight, counted = self._spread(scaled, z), self._spread(kept, z)
        return self.read(Weighting(type(self).__name__.lower(), z, weight, counted.sum(), self.reduction))

    @abstractmethod
    def axis_of(self, z: Tensor) -> int | None:
        """The axis of z that holds the coordinates of a term; None: every element is a term. ValueError without it."""

    @abstractmethod
    def read(self, w: Weighting) -> Terms:
        """The terms of a weighted loss of this likelihood."""

    @abstractmethod
    def _spread(self, weight: Tensor, z: Tensor) -> Tensor:
        """Weights of terms in the shape that `Weighting` has.  weight: (m,)"""


@dataclass(frozen=True, kw_only=True)
class Categorical(Likelihood):
    """Softmax of z, as in `F.cross_entropy`."""

    axis: int = 1  # of the classes: 1 where torch puts them, -1 for (batch, position, class); a vector is one term

    def axis_of(self, z: Tensor) -> int:
        if z.ndim > 1 and not -z.ndim <= self.axis < z.ndim:
            raise ValueError(f"z of shape {tuple(z.shape)} has no class axis {self.axis}: give Categorical(axis=) an axis of z")
        return self.axis % z.ndim if z.ndim > 1 else 0

    def read(self, w: Weighting) -> Terms:
        axis = self.axis_of(w.z) if w.axis is None else w.axis
        z = rows_of(w.z, axis)
        omega = _reduced(w.weight.reshape(-1).to(z.dtype).clamp(min=0), w)
        # logits of masked rows are arbitrary, possibly NaN
        p = torch.where((omega != 0).unsqueeze(-1), z.softmax(-1), 1.0 / z.shape[-1])
        return CategoricalTerms(w.z, axis, omega, effective_number([omega]), p)

    def _spread(self, weight: Tensor, z: Tensor) -> Tensor:
        return weight


class Independent(Likelihood):
    """A likelihood with independent coordinates: a term is a row along the last axis of z, or an element of a vector."""

    def axis_of(self, z: Tensor) -> int | None:
        return z.ndim - 1 if z.ndim > 1 else None

    def _spread(self, weight: Tensor, z: Tensor) -> Tensor:
        return weight.unsqueeze(-1).expand_as(rows_of(z, self.axis_of(z))).reshape(z.shape)

    def _scale(self, w: Weighting) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of elements and terms. A term is the sum of its elements, so that equal losses have one ``omega``.

        Returns the scale of each element (m, C), omega (m,), which is their mean, and ``M`` ().
        """
        weight = rows_of(w.weight, self.axis_of(w.z)).to(torch.promote_types(w.z.dtype, torch.float32)).clamp(min=0)
        scale = _reduced(weight, w)
        return scale, scale.mean(-1), effective_number([scale])


@dataclass(frozen=True, kw_only=True)
class Gaussian(Independent):
    """Normal around z, ``l = (z - y)^2`` per element as in `F.mse_loss`: variance 1/2; for another ``v``, factor ``1 / 2v``."""

    def read(self, w: Weighting) -> Terms:
        scale, omega, M = self._scale(w)
        return GaussianTerms(w.z, self.axis_of(w.z), omega, M, 2 * scale)


@dataclass(frozen=True, kw_only=True)
class Bernoulli(Independent):
    """Sigmoid of z, ``l = log(1 + exp(z)) - y z`` per element as in `F.binary_cross_entropy_with_logits`."""

    def read(self, w: Weighting) -> Terms:
        scale, omega, M = self._scale(w)
        axis = self.axis_of(w.z)
        z = torch.where(scale != 0, rows_of(w.z, axis), 0.0)  # logits of masked elements are arbitrary
        sigma = z.sigmoid()
        return BernoulliTerms(w.z, axis, omega, M, scale * sigma * (-z).sigmoid(), scale, sigma)


LIKELIHOODS: Mapping[str, type[Likelihood]] = {"categorical": Categorical, "gaussian": Gaussian, "bernoulli": Bernoulli}


def find_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """The likelihood of this name, or the given one. ValueError for an unknown name."""
    if isinstance(likelihood, Likelihood):
        return likelihood
    check_choice("likelihood", likelihood, LIKELIHOODS, hint=", or a Likelihood")
    return LIKELIHOODS[likelihood]()


def terms_from_gradient(likelihood: str | Likelihood, z: Tensor, gradient: Tensor) -> Terms:
    """Terms of a loss that is not recorded, of which z and ``dL/dz`` are known.

    A term whose gradient is exactly zero counts as masked. Factors of the loss are not known, and taken as 1.
    """
    likelihood = find_likelihood(likelihood)
    return likelihood.terms(z, valid=rows_of(gradient, likelihood.axis_of(z)).any(-1))


def read_terms(recorder: LossRecorder, loss: Tensor) -> list[Terms]:
    """The terms of all recorded calls that the loss depends on, with the factor ``dL/d(output)``, as in ``0.5 * ce + mse``.

    Calls that the loss does not depend on, or without a graph, are left out; the graph is kept.
    """
    terms = [LIKELIHOODS[w.likelihood]().read(w) for _, _, w in _weighted(recorder, loss)]
    if len(terms) < 2:
        return terms
    M = effective_number([w for _, w in together(terms)])
    return [replace(t, denominator=M) for t in terms]


def loss_gradients_of(recorder: LossRecorder, loss: Tensor, terms: list[Terms]) -> list[Tensor | None]:
    """``dL/dz`` of the terms, each of its own call alone: a path from ``z`` through another output is left out.

    None where the loss does not depend on the declared logits.  # like z each
    """
    calls = [(call.output, factor) for call, factor, _ in _weighted(recorder, loss)]
    if len(calls) != len(terms):  # a likelihood that was declared for all of the loss
        calls = [(loss, torch.ones_like(loss)) for _ in terms]
    pairs = zip(calls, terms, strict=True)
    return [torch.autograd.grad(out, t.z, factor, retain_graph=True, allow_unused=True)[0] for (out, factor), t in pairs]


def weightings(recorder: LossRecorder, loss: Tensor) -> list[tuple[LossCall, int, Weighting]]:
    """The recorded calls that the loss depends on, each with the number of its terms and their weights."""
    found = [(call, w) for call, _, w in _weighted(recorder, loss)]
    return [(call, LIKELIHOODS[w.likelihood]().read(w).omega.numel(), w) for call, w in found]


def _weighted(recorder: LossRecorder, loss: Tensor) -> list[tuple[LossCall, Tensor, Weighting]]:
    """The recorded calls that the loss depends on, each with ``dL/d(output)`` and its weights."""
    calls = [call for call in recorder.calls if call.output.requires_grad]
    pairs = zip(calls, _factors(calls, loss), strict=True)
    found = [(call, factor, call.weigh(factor)) for call, factor in pairs if factor is not None]
    return [(call, factor, w) for call, factor, w in found if w.z.requires_grad]


def _factors(calls: list[LossCall], loss: Tensor) -> tuple[Tensor | None, ...]:
    """``dL/d(output)`` of each call; None where L does not depend on it."""
    if len(calls) == 1 and calls[0].is_all_of(loss):
        return (torch.ones_like(loss),)
    outputs = [call.output for call in calls]
    return torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True) if outputs else ()
