"""Loss terms and the factors of their Hessians in the outputs.

Every recognised loss is ``L = sum_m omega_m l_m(z_m) + const``, and its generalised Gauss-Newton matrix is
``G = sum_m J_m^T Lambda_m J_m`` with ``Lambda_m = omega_m d^2 l_m / dz_m^2 = sum_k s_mk s_mk^T``. The cotangents ``s`` contain
every scale of the loss: none is applied afterwards.

Letters: ``m`` loss terms (rows), ``C`` coordinates of a term, ``n`` examples, ``R`` positions per example (``m = n R``, the
position runs fastest, or the example, as of time-first outputs: `Terms.order`), ``k`` columns, ``M`` the effective number of
terms.

Reference: Martens, "New insights and perspectives on the natural gradient method", JMLR 2020, arXiv:1412.1193, sections 8-10;
Kunstner, Hennig, Balles, "Limitations of the empirical Fisher approximation", NeurIPS 2019, arXiv:1905.12558.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from gradmaker.loss.recorder import compute

__all__ = ["BernoulliTerms", "CategoricalTerms", "GaussianTerms", "Place", "Terms", "effective_number", "rows_of"]


def rows_of(x: Tensor, axis: int | None) -> Tensor:
    """A tensor like z with terms as rows, detached, in float32 or better.  # (m, C)"""
    x = compute(x.detach())
    return x.reshape(-1, 1) if axis is None else x.movedim(axis, -1).reshape(-1, x.shape[axis])


def effective_number(weights: Sequence[Tensor]) -> Tensor:
    """``M = sum omega / sum omega^2``: the number of equal terms that a mean is taken of; 1 for a sum, and if all are masked.

    It makes ``M sum_n g_n g_n^T``, with the gradients ``g_n`` of the loss itself, linear in a factor of the loss.  # ()
    """
    wide = [w.double().reshape(-1) for w in weights]  # squares may underflow in float32
    total, squares = (torch.stack([x.sum() for x in each]).sum() for each in (wide, [w.square() for w in wide]))
    return torch.where(squares > 0, total / torch.where(squares > 0, squares, 1.0), 1.0)


@dataclass(frozen=True, eq=False)
class Place:
    """The rows of some terms among those of a larger batch: what is drawn for them is what is drawn for these rows there."""

    total: int  # rows of the larger batch
    index: Tensor  # (m,) of these

    @classmethod
    def whole(cls, m: int) -> Place:
        """All rows of a batch."""
        return cls(m, torch.arange(m))

    def of(self, drawn: Tensor, axis: int) -> Tensor:
        """The rows of numbers that were drawn for the larger batch."""
        return drawn if len(self.index) == self.total else drawn.index_select(axis, self.index.to(drawn.device))


@dataclass(frozen=True, eq=False)
class Terms(ABC):
    """The terms of one loss call: ``L = sum_m omega_m l_m(z_m) + const``.

    ``denominator`` is the ``M`` of the empirical Fisher matrix, see `effective_number`: over all terms of the loss, also those
    of other calls. A term of independent elements is their sum, each with its own weight. A term that the user subtracts has
    no semidefinite curvature: its omega is 0.
    """

    z: Tensor  # argument of the loss, in the graph
    axis: int | None  # of z, along which the C coordinates of a term lie; None: every element is a term
    omega: Tensor  # (m,) dL/dl_m, detached; the mean over the elements of a term
    denominator: Tensor  # ()
    order: Literal["first", "last"] = field(default="first", kw_only=True)  # last: row ``m`` belongs to example ``m % n``
    assumed: Tensor | None = field(default=None, kw_only=True)  # (m,) weights, where the loss does not show them

    def weights(self) -> Tensor:
        """The weight of each term in the loss, or of each of its independent elements.  # (m,) or (m, C)"""
        return self._weights() if self.assumed is None else self.assumed

    def _weights(self) -> Tensor:
        return self.omega

    def valid(self) -> Tensor:
        """Whether each term contributes to the loss.  # (m,) bool"""
        return self.omega != 0

    def masked(self) -> Tensor:
        """Whether any term is masked.  # () bool"""
        return ~self.valid().all()

    def positions(self, examples: int) -> int:
        """Number ``R`` of loss terms per example. ValueError if they do not divide."""
        terms = self.omega.numel()
        if examples < 1 or terms % examples:
            raise ValueError(
                f"{terms} loss terms (z of shape {tuple(self.z.shape)}) do not divide into {examples} examples: every example "
                "needs the same number of terms; give the size of the batch that this z was computed from"
            )
        return terms // examples

    def owners(self, examples: int) -> Tensor:
        """The index of the example that each entry of z belongs to.  # like z, integer"""
        R, rows = self.positions(examples), torch.arange(self.omega.numel(), device=self.omega.device)
        return self.spread(rows // R if self.order == "first" else rows % examples)

    def by_example(self, values: Tensor, examples: int) -> Tensor:
        """Values of terms, laid out as examples and positions.  # (m, ...) -> (n, R, ...)"""
        R = self.positions(examples)
        if self.order == "first":
            return values.reshape(examples, R, *values.shape[1:])
        return values.reshape(R, examples, *values.shape[1:]).transpose(0, 1)

    def turned(self) -> Terms:
        """The same terms with the other order of rows."""
        return replace(self, order="last" if self.order == "first" else "first")

    def scaled(self, factor: float) -> Terms:
        """The terms of the loss times a factor."""
        scales = ("omega", "assumed", "curvature", "scale", "factor")
        power = {"factor": 0.5}  # S of Lambda = S S^T
        found = {k: getattr(self, k) * factor ** power.get(k, 1) for k in scales if getattr(self, k, None) is not None}
        return replace(self, denominator=self.denominator / factor, **found)

    def spread(self, values: Tensor) -> Tensor:
        """Values of terms, broadcast to all coordinates of each.  # (m,) -> like z"""
        shape = list(self.z.shape)
        if self.axis is None:
            return values.reshape(shape)
        width = shape.pop(self.axis)
        return values.reshape(shape).unsqueeze(self.axis).expand(*shape[: self.axis], width, *shape[self.axis :])

    def columns(self, examples: int) -> int:
        """Number of cotangents of `exact`, ``R C``."""
        return self.positions(examples) * self._width

    def exact(self, examples: int, chunk: int | None = None) -> Iterator[Tensor]:
        """Cotangents whose outer products sum to the GGN of each example; column ``(t, c)`` is zero except at position ``t``.

        So ``sum_k (J^T s_k)(J^T s_k)^T`` has no cross terms between positions. At most ``chunk`` columns are formed at once.
        ValueError for a chunk below 1.  # yields (k, *z.shape)
        """
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk={chunk}: expected an integer of at least 1, or None for all columns at once")
        total = self.columns(examples)
        size = max(1, total if chunk is None else chunk)
        for start in range(0, total, size):
            yield self._chunk(examples, start, min(start + size, total))

    @torch.no_grad()
    def sample(self, samples: int, generator: torch.Generator, place: Place | None = None) -> Tensor:
        """Gradients at targets drawn from the model, divided by ``sqrt(samples)``: ``E sum_k s_k s_k^T = Lambda``.

        Targets of different terms are independent; the user's targets are not used. ValueError for samples below 1.
        place: of the terms in the batch of all ranks; None: they are all of it
        # (samples, *z.shape)
        """
        if samples < 1:
            raise ValueError(f"samples={samples}: expected an integer of at least 1")
        place = Place.whole(self.omega.numel()) if place is None else place
        return self._restore(self._draw(samples, generator, place) / samples**0.5)

    @torch.no_grad()
    def empirical(self, gradient: Tensor, examples: int, root: Tensor) -> Tensor:
        """The loss gradient by positions: for each position ``t``, ``sqrt(M) dL/dz`` there and zero elsewhere.

        gradient: like z; root: ``sqrt(M)`` of each position (n, R)  # (R, *z.shape)
        """
        R = self.positions(examples)
        rows = self._rows(gradient)  # (m, C)
        rows = rows * (root if self.order == "first" else root.mT).reshape(-1, 1).to(rows)
        index = torch.arange(len(rows), device=rows.device)
        place = index % R if self.order == "first" else index // examples
        at = place == torch.arange(R, device=rows.device).unsqueeze(1)  # (R, m)
        return self._restore(torch.where(at.unsqueeze(-1), rows, 0.0))

    @torch.no_grad()
    def inner(self, u: Tensor, v: Tensor) -> Tensor:
        """``sum_m u_m^T Lambda_m v_m``: the inner product of two displacements of the outputs.  u, v: like z  # ()"""
        kept = self.valid().unsqueeze(-1)  # logits of masked rows, and their displacements, are arbitrary
        return self._inner(*(torch.where(kept, self._rows(x), 0.0) for x in (u, v)))

    @torch.no_grad()
    def multiply(self, u: Tensor) -> Tensor:
        """``Lambda_m u_m`` for all terms, without forming columns.  # like z -> like z"""
        kept = self.valid().unsqueeze(-1)  # as in `inner`
        image = self._multiply(torch.where(kept, self._rows(u), 0.0))
        return self._restore(torch.where(kept, image, 0.0).unsqueeze(0)).squeeze(0)

    def _rows(self, x: Tensor) -> Tensor:
        """A tensor like z with terms as rows.  # like z -> (m, C)"""
        return rows_of(x, self.axis)

    @property
    def _width(self) -> int:
        return 1 if self.axis is None else self.z.shape[self.axis]

    @torch.no_grad()
    def _chunk(self, examples: int, start: int, stop: int) -> Tensor:
        R, device = self.positions(examples), self.omega.device
        column = torch.arange(start, stop, device=device)
        t, c = column // self._width, column % self._width
        example = torch.arange(examples, device=device)
        rows = t.unsqueeze(1) + R * example if self.order == "first" else examples * t.unsqueeze(1) + example  # (k, n)
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
    def _draw(self, samples: int, generator: torch.Generator, place: Place) -> Tensor:
        """Gradients at sampled targets.  # (samples, m, C)"""

    @abstractmethod
    def _inner(self, u: Tensor, v: Tensor) -> Tensor:
        """`inner`, on rows.  # (m, C), (m, C) -> ()"""

    @abstractmethod
    def _multiply(self, u: Tensor) -> Tensor:
        """`multiply`, on rows.  # (m, C) -> (m, C)"""


@dataclass(frozen=True, eq=False)
class CategoricalTerms(Terms):
    """Softmax terms: ``Lambda = omega (diag p - p p^T)``, columns ``sqrt(omega p_c) (p - e_c)``."""

    p: Tensor  # (m, C)

    def _columns(self, rows: Tensor, c: Tensor) -> Tensor:
        out = self.p[rows]
        out[torch.arange(len(c), device=c.device), :, c] -= 1
        scale = self.omega[rows] * self.p[rows, c.unsqueeze(1)]
        return out.mul_(scale.sqrt().unsqueeze(-1))

    def _draw(self, samples: int, generator: torch.Generator, place: Place) -> Tensor:
        # by the inverse of the cumulative sum: torch.multinomial synchronises with the host for a single sample
        m, C = self.p.shape
        total = self.p.cumsum(-1)
        u = torch.rand(place.total, samples, generator=generator, dtype=self.p.dtype, device=self.p.device)
        u = place.of(u, 0)
        label = torch.searchsorted(total, u * total[:, -1:], right=True).clamp(max=C - 1)
        out = self.p.repeat(samples, 1, 1)
        out.scatter_add_(2, label.mT.unsqueeze(-1), out.new_full((samples, m, 1), -1.0))
        return out.mul_(self.omega.sqrt().unsqueeze(-1))

    def _inner(self, u: Tensor, v: Tensor) -> Tensor:
        """The covariance under ``p`` by centred vectors: the difference of two moments would cancel."""
        centred = (x - (self.p * x).sum(-1, keepdim=True) for x in (u, v))
        return (self.omega.unsqueeze(-1) * self.p * torch.stack(list(centred)).prod(0)).sum()

    def _multiply(self, u: Tensor) -> Tensor:
        return self.omega.unsqueeze(-1) * self.p * (u - (self.p * u).sum(-1, keepdim=True))


@dataclass(frozen=True, eq=False)
class GaussianTerms(Terms):
    """Normal terms: ``Lambda`` is diagonal, the gradient at a sampled target is normal."""

    curvature: Tensor  # (m, C), the diagonal of Lambda

    def _weights(self) -> Tensor:
        return self.curvature / 2

    def _columns(self, rows: Tensor, c: Tensor) -> Tensor:
        out = self.omega.new_zeros(*rows.shape, self._width)
        out[torch.arange(len(c), device=c.device), :, c] = self.curvature[rows, c.unsqueeze(1)].sqrt()
        return out

    def _draw(self, samples: int, generator: torch.Generator, place: Place) -> Tensor:
        noise = self.omega.new_empty(samples, place.total, self.curvature.shape[1]).normal_(generator=generator)
        return place.of(noise, 1).mul_(self.curvature.sqrt())

    def _inner(self, u: Tensor, v: Tensor) -> Tensor:
        return torch.where(self.curvature != 0, self.curvature * u * v, 0.0).sum()

    def _multiply(self, u: Tensor) -> Tensor:
        return torch.where(self.curvature != 0, self.curvature * u, 0.0)


@dataclass(frozen=True, eq=False)
class BernoulliTerms(GaussianTerms):
    """Sigmoid terms: ``Lambda = diag(scale sigma (1 - sigma))``, gradient at a sampled target ``sqrt(scale) (sigma - y)``."""

    scale: Tensor  # (m, C)
    sigma: Tensor  # (m, C)

    def _weights(self) -> Tensor:
        return self.scale

    def _draw(self, samples: int, generator: torch.Generator, place: Place) -> Tensor:
        sigma = self.sigma
        if len(sigma) < place.total:  # the other rows are drawn too, as one number each, and left out
            sigma = sigma.new_full((place.total, sigma.shape[1]), 0.5).index_copy_(0, place.index.to(sigma.device), sigma)
        label = place.of(torch.bernoulli(sigma.expand(samples, -1, -1), generator=generator), 1)
        return (self.sigma - label).mul_(self.scale.sqrt())
