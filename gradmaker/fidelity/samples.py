"""Frobenius norms and inner products of matrices that are known by random rows, or by products with random vectors.

Rows ``r`` with ``E r r^T = C``: ``|C|_F^2 = E (r_i^T r_j)^2`` over pairs of different rows and ``<C, A> = E r^T A r``. Products
with random signs ``v``: ``|C|_F^2 = E |C v|^2`` and ``<C, A> = E (C v)^T (A v)``. Standard errors are those of the jackknife.

Reference: Hutchinson, Communications in Statistics 1990; Hoeffding, Annals of Mathematical Statistics 1948, for the pairs;
Efron & Stein, Annals of Statistics 1981.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Estimate", "ProductSamples", "RowSamples", "Samples", "combined"]


@dataclass(frozen=True)
class Estimate:
    """An estimate, and the same without each of the samples; none of these where it is exact."""

    value: float
    without: Tensor  # (K,), or (0,)
    least: float = 0.0  # of its error, where it is known to be larger than that of the jackknife

    @property
    def error(self) -> float:
        """The standard error of the jackknife."""
        K = len(self.without)
        own = float(((K - 1) / K * (self.without - self.without.mean()).square().sum()).sqrt()) if K > 1 else 0.0
        return max(own, self.least)


def combined(of: Callable[..., Tensor], *given: Estimate) -> Estimate:
    """A function of estimates from the same samples; exact ones are constants."""
    value = of(*(torch.tensor(x.value, dtype=torch.float64) for x in given))
    K = max(len(x.without) for x in given)
    if not K:
        return Estimate(float(value), torch.zeros(0, dtype=torch.float64))
    spread = [x.without.cpu() if len(x.without) else torch.full((K,), x.value, dtype=torch.float64) for x in given]
    return Estimate(float(value), of(*spread))


class Samples(ABC):
    """What is known of ``C`` and of the blocks of its layers."""

    vectors: Tensor
    """The vectors whose products with an approximation `inner` needs.  # (K, P)"""

    @abstractmethod
    def norm(self, index: Tensor | None) -> Estimate:
        """``|C|_F^2`` of a layer's block, or of the whole matrix."""

    @abstractmethod
    def trace(self, index: Tensor | None) -> Estimate:
        """``tr C``."""

    @abstractmethod
    def inner(self, index: Tensor | None, products: Tensor) -> Estimate:
        """``<C, A>``.  products: ``A`` times each of `vectors`  # (K, P)"""

    def coupling(self, first: Tensor, second: Tensor) -> float | None:
        """``|C_lk|_F^2`` of two layers; None where it is not known."""
        return None


class RowSamples(Samples):
    """Random rows of ``C``; or all of its rows, with which everything is exact."""

    def __init__(self, rows: Tensor, exact: bool) -> None:
        self.vectors, self.exact = rows, exact
        self._grams: dict[int, Tensor] = {}

    def _gram(self, index: Tensor | None) -> Tensor:
        key = -1 if index is None else int(index[0])
        if key not in self._grams:
            own = self.vectors if index is None else self.vectors[:, index]
            self._grams[key] = (own @ own.mT).double()
        return self._grams[key]

    def norm(self, index: Tensor | None) -> Estimate:
        return self._pairs(self._gram(index).square())

    def coupling(self, first: Tensor, second: Tensor) -> float | None:
        return self._pairs(self._gram(first) * self._gram(second)).value

    def _pairs(self, products: Tensor) -> Estimate:
        K = len(products)
        if self.exact:
            return Estimate(float(products.sum()), products.new_zeros(0))
        apart = products - products.diag().diag()
        total, own = apart.sum(), apart.sum(0) + apart.sum(1)
        return Estimate(float(total) / (K * (K - 1)), (total - own) / max(1, (K - 1) * (K - 2)))

    def trace(self, index: Tensor | None) -> Estimate:
        return self._mean(self._gram(index).diagonal())

    def inner(self, index: Tensor | None, products: Tensor) -> Estimate:
        pairs = (self.vectors, products) if index is None else (self.vectors[:, index], products[:, index])
        return self._mean(torch.stack([a.double() @ b.double() for a, b in zip(*pairs, strict=True)]))

    def _mean(self, values: Tensor) -> Estimate:
        if self.exact:
            return Estimate(float(values.sum()), values.new_zeros(0))
        return _mean_of(values)


class ProductSamples(Samples):
    """Products with random signs, of the whole matrix and of the block of each layer."""

    def __init__(self, signs: Tensor, whole: Tensor, layers: Tensor) -> None:
        self.vectors = signs
        self.whole, self.layers = whole, layers  # (K, P) each

    def norm(self, index: Tensor | None) -> Estimate:
        return _mean_of(self._images(index).double().square().sum(1))

    def trace(self, index: Tensor | None) -> Estimate:
        signs = self.vectors if index is None else self.vectors[:, index]
        return _mean_of((self._images(index).double() * signs.double()).sum(1))

    def inner(self, index: Tensor | None, products: Tensor) -> Estimate:
        own = products if index is None else products[:, index]
        return _mean_of((self._images(index).double() * own.double()).sum(1))

    def _images(self, index: Tensor | None) -> Tensor:
        return self.whole if index is None else self.layers[:, index]


def _mean_of(values: Tensor) -> Estimate:
    K = len(values)
    return Estimate(float(values.mean()), (values.sum() - values) / max(1, K - 1))
