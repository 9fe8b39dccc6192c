"""Losses as likelihoods: the one place that knows reductions, masks, class weights, smoothing, soft labels and loss factors.

Every recognised loss is ``L = sum_m omega_m l_m(z_m) + const``, and its generalised Gauss-Newton matrix is
``G = sum_m J_m^T Lambda_m J_m`` with ``Lambda_m = omega_m d^2 l_m / dz_m^2 = sum_k s_mk s_mk^T``. The cotangents ``s`` carry
every scale of the loss: nothing is left to fold in afterwards.

Letters: ``m`` loss terms (rows), ``C`` coordinates of a term, ``n`` examples, ``R`` positions per example (``m = n R``, the
position runs fastest), ``k`` columns, ``M`` the denominator of a mean.

Reference: Martens, "New insights and perspectives on the natural gradient method", JMLR 2020, arXiv:1412.1193, sections 8-10;
Kunstner, Hennig, Balles, "Limitations of the empirical Fisher approximation", NeurIPS 2019, arXiv:1905.12558.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmaker.curvature.recorder import LossCall, LossRecorder, Weighting, compute

__all__ = [
    "LIKELIHOODS",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "Likelihood",
    "LossCall",
    "LossRecorder",
    "Terms",
    "find_likelihood",
    "read_terms",
    "terms_from_gradient",
]


# -------------------------------------------------------------------- loss terms and the factors of their curvature
@dataclass(frozen=True, eq=False)
class Terms(ABC):
    """The terms of one loss call: ``L = sum_m omega_m l_m(z_m) + const``.

    ``denominator`` is the ``M`` of the loss' own mean: the number of valid terms, or their summed class weights; 1 for
    ``sum``; for ``none`` the number of terms that count, as if the user took their mean.
    A term that the user subtracts has no semidefinite curvature: its omega is 0.
    """

    z: Tensor  # as given to the loss, in the graph
    axis: int | None  # of z, the one that holds the C coordinates; None: every element is a term
    omega: Tensor  # (m,) dL/dl_m, detached
    denominator: Tensor  # ()

    def valid(self) -> Tensor:
        """Whether a term counts at all.  # (m,) bool"""
        return self.omega != 0

    def masked(self) -> Tensor:
        """Whether any term does not count.  # () bool"""
        return ~self.valid().all()

    def positions(self, examples: int) -> int:
        """Loss terms per example, ``R``."""
        terms = self.omega.numel()
        if examples < 1 or terms % examples:
            raise ValueError(
                f"{terms} loss terms (z of shape {tuple(self.z.shape)}) do not divide into {examples} examples: every example "
                "needs the same number of terms; give the size of the batch that this z was computed from"
            )
        return terms // examples

    def columns(self, examples: int) -> int:
        """Number of cotangents of `exact`, ``R C``."""
        return self.positions(examples) * self._width

    def exact(self, examples: int, chunk: int | None = None) -> Iterator[Tensor]:
        """Cotangents whose outer products sum to the GGN of each example; column ``(t, c)`` lives at position ``t`` only.

        One position at a time keeps cross terms between positions out of ``sum_k (J^T s_k)(J^T s_k)^T``.
        At most ``chunk`` columns are formed at once.  # yields (k, *z.shape)
        """
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk={chunk} columns cannot be formed: give 1 or more, or None for all at once")
        total = self.columns(examples)
        size = max(1, total if chunk is None else chunk)
        for start in range(0, total, size):
            yield self._chunk(examples, start, min(start + size, total))

    @torch.no_grad()
    def sample(self, samples: int, generator: torch.Generator) -> Tensor:
        """Gradients at labels drawn from the model, over ``sqrt(samples)``: ``E sum_k s_k s_k^T = Lambda``.

        Labels of different terms are independent; the user's labels, smoothed or not, do not enter.  # (samples, *z.shape)
        """
        if samples < 1:
            raise ValueError(f"samples={samples} cannot be drawn: give 1 or more")
        return self._restore(self._draw(samples, generator) / samples**0.5)

    @torch.no_grad()
    def empirical(self, gradient: Tensor, examples: int) -> Tensor:
        """The gradient of the loss itself, terms apart: ``sqrt(M) dL/dz`` at position ``t``, zero elsewhere, for each ``t``.

        Together ``1/M sum_m g_m g_m^T`` with ``g_m = M dL/dz_m``.  gradient: like z  # (R, *z.shape)
        """
        R = self.positions(examples)
        scaled = _rows(gradient, self.axis) * self.denominator.sqrt()  # (m, C)
        eye = torch.eye(R, dtype=scaled.dtype, device=scaled.device)
        return self._restore(scaled.reshape(examples, R, -1) * eye[:, None, :, None])

    @property
    def _width(self) -> int:
        return 1 if self.axis is None else self.z.shape[self.axis]

    @torch.no_grad()
    def _chunk(self, examples: int, start: int, stop: int) -> Tensor:
        R, device = self.positions(examples), self.omega.device
        column = torch.arange(start, stop, device=device)
        t, c = column // self._width, column % self._width
        rows = t.unsqueeze(1) + R * torch.arange(examples, device=device)  # (k, n)
        out = self.omega.new_zeros(stop - start, self.omega.numel(), self._width)
        out[torch.arange(stop - start, device=device).unsqueeze(1), rows] = self._columns(rows, c)
        return self._restore(out)

    def _restore(self, rows: Tensor) -> Tensor:
        """From rows back to the layout of z.  # (k, m, C) or (k, n, R, C) -> (k, *z.shape)"""
        shape = list(self.z.shape)
        if self.axis is None:
            return rows.reshape(-1, *shape).to(self.z.dtype)
        shape.append(shape.pop(self.axis))
        return rows.reshape(rows.shape[0], *shape).movedim(-1, self.axis + 1).to(self.z.dtype)

    @abstractmethod
    def _columns(self, rows: Tensor, c: Tensor) -> Tensor:
        """Column ``c`` of the factor of each row.  # (k, n), (k,) -> (k, n, C)"""

    @abstractmethod
    def _draw(self, samples: int, generator: torch.Generator) -> Tensor:
        """Gradients at sampled labels.  # (samples, m, C)"""


@dataclass(frozen=True, eq=False)
class CategoricalTerms(Terms):
    """``Lambda = omega (diag p - p p^T)``, columns ``sqrt(omega p_c) (p - e_c)``."""

    p: Tensor  # (m, C)

    def _columns(self, rows: Tensor, c: Tensor) -> Tensor:
        out = self.p[rows]
        out[torch.arange(len(c), device=c.device), :, c] -= 1
        scale = self.omega[rows] * self.p[rows, c.unsqueeze(1)]
        return out.mul_(scale.sqrt().unsqueeze(-1))

    def _draw(self, samples: int, generator: torch.Generator) -> Tensor:
        # by the inverse of the cumulative sum: torch.multinomial reads back to the host when one sample is asked for
        m, C = self.p.shape
        total = self.p.cumsum(-1)
        u = torch.rand(m, samples, generator=generator, dtype=self.p.dtype, device=self.p.device)
        label = torch.searchsorted(total, u * total[:, -1:], right=True).clamp(max=C - 1)
        out = self.p.repeat(samples, 1, 1)
        out.scatter_add_(2, label.mT.unsqueeze(-1), out.new_full((samples, m, 1), -1.0))
        return out.mul_(self.omega.sqrt().unsqueeze(-1))


@dataclass(frozen=True, eq=False)
class GaussianTerms(Terms):
    """``Lambda`` diagonal; the gradient at a sampled label is normal."""

    curvature: Tensor  # (m, C), the diagonal of Lambda

    def _columns(self, rows: Tensor, c: Tensor) -> Tensor:
        out = self.omega.new_zeros(*rows.shape, self._width)
        out[torch.arange(len(c), device=c.device), :, c] = self.curvature[rows, c.unsqueeze(1)].sqrt()
        return out

    def _draw(self, samples: int, generator: torch.Generator) -> Tensor:
        noise = self.omega.new_empty(samples, *self.curvature.shape).normal_(generator=generator)
        return noise.mul_(self.curvature.sqrt())


@dataclass(frozen=True, eq=False)
class BernoulliTerms(GaussianTerms):
    """``Lambda = diag(scale sigma (1 - sigma))``; the gradient at a sampled label is ``sqrt(scale) (sigma - y)``."""

    scale: Tensor  # (m, C)
    sigma: Tensor  # (m, C)

    def _draw(self, samples: int, generator: torch.Generator) -> Tensor:
        label = torch.bernoulli(self.sigma.expand(samples, -1, -1), generator=generator)
        return (self.sigma - label).mul_(self.scale.sqrt())


# -------------------------------------------------------------------- from weights to terms
def _rows(x: Tensor, axis: int | None) -> Tensor:
    """Terms as rows, detached, in single precision or better.  # (m, C)"""
    x = compute(x.detach())
    return x.reshape(-1, 1) if axis is None else x.movedim(axis, -1).reshape(-1, x.shape[axis])


def _denominator(total: Tensor, count: Tensor, reduction: str) -> Tensor:
    """``M``, with 1 for an empty mean: all of its terms are masked, so they stay 0 instead of NaN."""
    M = {"mean": total, "sum": torch.ones_like(total), "none": count.to(total.dtype)}[reduction]
    return torch.where(M > 0, M, 1.0)


# -------------------------------------------------------------------- likelihoods
@dataclass(frozen=True, kw_only=True)
class Likelihood(ABC):
    """What a loss is the negative log of; declared by the user where the loss itself is not recognised."""

    reduction: str = "mean"  # over the valid terms

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            name = type(self).__name__
            raise ValueError(f"{name}(reduction={self.reduction!r}) is not legal: choose 'mean' or 'sum', as the loss does")

    def terms(self, z: Tensor, factor: float | Tensor = 1.0, valid: Tensor | None = None) -> Terms:
        """The terms of ``factor * reduction_m l_m(z_m)``.  factor: a number, () or one for each term; valid: None for all"""
        rows = _rows(z, self.axis_of(z))
        kept = rows.new_ones(len(rows)) if valid is None else valid.detach().reshape(-1).to(rows)
        if len(kept) != len(rows):
            raise ValueError(
                f"valid has {len(kept)} elements, z of shape {tuple(z.shape)} has {len(rows)} terms: give one each"
            )
        scaled = kept * (factor.detach().reshape(-1).to(rows) if isinstance(factor, Tensor) else factor)
        weight, counted = self._spread(scaled, z), self._spread(kept, z)
        per = counted.numel() / max(len(rows), 1)
        return self.read(Weighting(type(self).__name__.lower(), z, weight, counted.sum(), per, self.reduction))

    @abstractmethod
    def axis_of(self, z: Tensor) -> int | None:
        """The axis of z that holds the coordinates of a term; None: every element is a term."""

    @abstractmethod
    def read(self, w: Weighting) -> Terms:
        """The terms of a weighted loss of this likelihood."""

    @abstractmethod
    def _spread(self, weight: Tensor, z: Tensor) -> Tensor:
        """Weights of terms as `Weighting` wants them.  weight: (m,)"""


@dataclass(frozen=True, kw_only=True)
class Categorical(Likelihood):
    """Softmax of z, as in `F.cross_entropy`."""

    axis: int = 1  # of the classes: 1 where torch puts them, -1 for (batch, position, class); a vector is one term

    def axis_of(self, z: Tensor) -> int:
        if z.ndim > 1 and not -z.ndim <= self.axis < z.ndim:
            raise ValueError(f"z of shape {tuple(z.shape)} has no class axis {self.axis}: give Categorical an axis that it has")
        return self.axis % z.ndim if z.ndim > 1 else 0

    def read(self, w: Weighting) -> Terms:
        axis = self.axis_of(w.z)
        z = _rows(w.z, axis)
        weight = w.weight.reshape(-1).to(z.dtype).clamp(min=0)
        M = _denominator(w.total, weight.count_nonzero(), w.reduction)
        omega = weight / M if w.reduction == "mean" else weight
        # logits of masked rows may be anything, NaN included
        p = torch.where((omega != 0).unsqueeze(-1), z.softmax(-1), 1.0 / z.shape[-1])
        return CategoricalTerms(w.z, axis, omega, M, p)

    def _spread(self, weight: Tensor, z: Tensor) -> Tensor:
        return weight


class Independent(Likelihood):
    """Likelihoods whose coordinates are independent: the last axis of z holds a term, a vector holds one term an element."""

    def axis_of(self, z: Tensor) -> int | None:
        return z.ndim - 1 if z.ndim > 1 else None

    def _spread(self, weight: Tensor, z: Tensor) -> Tensor:
        return weight.unsqueeze(-1).expand_as(_rows(z, self.axis_of(z))).reshape(z.shape)

    def _scale(self, w: Weighting) -> tuple[Tensor, Tensor, Tensor]:
        """A mean over elements is the mean over ``M = total / per`` terms, each the mean of its elements.

        Returns the scale of each element (m, C), omega (m,) and ``M`` ().
        """
        weight = _rows(w.weight, self.axis_of(w.z)).to(torch.promote_types(w.z.dtype, torch.float32)).clamp(min=0)
        M = _denominator(w.total / w.per, weight.any(-1).sum(), w.reduction)
        if w.reduction == "mean":
            scale = weight / (M * w.per)
            return scale, scale.sum(-1), M
        return weight, weight.mean(-1), M


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
        z = torch.where(scale != 0, _rows(w.z, axis), 0.0)  # logits of masked elements may be anything
        sigma = z.sigmoid()
        return BernoulliTerms(w.z, axis, omega, M, scale * sigma * (-z).sigmoid(), scale, sigma)


LIKELIHOODS: Mapping[str, type[Likelihood]] = {"categorical": Categorical, "gaussian": Gaussian, "bernoulli": Bernoulli}


def find_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """The likelihood of this name, or the given one."""
    if isinstance(likelihood, Likelihood):
        return likelihood
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"likelihood {likelihood!r} is unknown: choose from {sorted(LIKELIHOODS)}, or give a Likelihood")
    return LIKELIHOODS[likelihood]()


def terms_from_gradient(likelihood: str | Likelihood, z: Tensor, gradient: Tensor) -> Terms:
    """Terms in a loop that we do not own: all that is seen is z and ``dL/dz``.

    A term whose gradient is exactly zero is taken as masked. Factors of the loss cannot be seen and are taken as 1.
    """
    likelihood = find_likelihood(likelihood)
    return likelihood.terms(z, valid=_rows(gradient, likelihood.axis_of(z)).any(-1))


def read_terms(recorder: LossRecorder, loss: Tensor) -> list[Terms]:
    """The terms of each recorded call that the user's loss depends on, with ``dL/d(output)`` folded in: ``0.5 * ce + mse``.

    Calls outside the loss, or without a graph, are left out; the graph is kept.
    """
    calls = [call for call in recorder.calls if call.output.requires_grad]
    weightings = [call.weigh(factor) for call, factor in zip(calls, _factors(calls, loss), strict=True) if factor is not None]
    return [LIKELIHOODS[w.likelihood]().read(w) for w in weightings if w.z.requires_grad]


def _factors(calls: list[LossCall], loss: Tensor) -> tuple[Tensor | None, ...]:
    """``dL/d(output)`` of each call, None where L does not depend on it."""
    if len(calls) == 1 and calls[0].output is loss:
        return (torch.ones_like(loss),)
    outputs = [call.output for call in calls]
    return torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True) if outputs else ()
