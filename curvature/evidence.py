"""Evidence, what a curvature gives to a representation: a closed set of classes, each of one or several kinds.

The classes are `Outer`, `Joint`, `Gradient` and `Pair`, in `gradmaker.curvature.products` `Product` and `Factors`, and in
`gradmaker.curvature.tied` `Tied`.

Axes, here and everywhere in gradmaker: ``B`` stack of equal blocks, ``G`` groups (channels of a norm layer, groups of a
convolution), ``k`` cotangents per example, ``n`` examples, ``r`` weight-sharing positions, ``i`` / ``o`` in / out features,
``N = k n`` rows of the Jacobian factor.

All scaling of the loss (reduction, masks, class weights, number of samples) is folded into ``gradients`` where the evidence
is made, so that the curvature is always ``C = sum_N vec(J_N) vec(J_N)^T`` with no factor left over.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from gradmaker.capture.one_hot import OneHot
from gradmaker.capture.patches import Patches
from gradmaker.curvature.special_rows import input_rows, one_hot_squares
from gradmaker.linalg.moments import add_moment_
from gradmaker.linalg.writes import Writer, at_once

__all__ = ["PIECE", "WHOLE", "Evidence", "Gradient", "Joint", "Outer", "Pair", "PairKind"]

PIECE = 1 << 24
"""Entries of rows ``J`` that are formed at once where only sums over rows are needed: a bound on memory, 64 MiB in float32."""

WHOLE = ""
"""Name, in a chunk of evidence, of the evidence of all sites as one vector, in the order of ``step.sites``."""


class Evidence(ABC):
    """One measurement of a block's curvature: ``C = sum_N vec(J_N) vec(J_N)^T``."""

    kinds: ClassVar[tuple[str, ...]] = ("plain",)
    """The kinds of this class, the plain one first."""
    kind: str = "plain"

    @abstractmethod
    def rows(self) -> Tensor:
        """The rows ``J``, formed. TypeError for evidence that has none.  # (N, G, *shape)"""


OuterKind: TypeAlias = Literal["rows", "inputs", "with_secants"]
"""``inputs``: ``C = I (x) mean_nr a a^T``; ``gradients`` has no cotangents and gives only the number of outputs.
``with_secants``: of a layer whose `Pair` of the kind ``output_secant`` is given in the same chunk (K-BFGS)."""
GradientKind: TypeAlias = Literal["row", "initial_scaling", "located"]
"""``initial_scaling``: given beside secants, for the initial scaling of L-BFGS and the check of the descent direction.
``located``: with the weights at which it was taken."""
PairKind: TypeAlias = Literal["probe", "secant", "output_secant", "noise_and_gradient"]
"""``secant``: the last step and the change of the gradient over it, on one batch; ``output_secant``: the same for the mean
output of a layer, (G, o). ``noise_and_gradient``: independent vectors, whose covariances are compared (PSGD whitening)."""


@dataclass(frozen=True)
class Outer(Evidence):
    """Pairs of layer inputs and output gradients: ``J_kn = sum_r g_knr [a_nr 1]^T``, or its transpose.

    The products below never form ``J``, except `rows`.
    """

    inputs: Tensor | OneHot  # a: (G, n, r, i)
    gradients: Tensor  # g: (k, G, n, r, o), carrying every scale
    bias: bool = False  # a one is appended to every input
    transposed: bool = False  # the block is laid out as (i, o), as an embedding's weight is
    weights: Tensor | None = None  # (n, r): 1 counts, 0 is masked out of the mean over inputs; None: all positions count
    fresh: bool = True  # False: a further chunk of cotangents, whose inputs are in the moment already
    kind: OuterKind = "rows"
    own: Tensor | None = None  # (n,): the gradient of the pass is ``sum_n own_n J_n``; None: not known to be of these rows

    kinds: ClassVar[tuple[str, ...]] = get_args(OuterKind)

    @property
    def count(self) -> int:
        """Number of rows ``N = k n``."""
        return self.gradients.shape[0] * self.gradients.shape[2]

    @property
    def width(self) -> int:
        """Number of inputs ``i``, without the bias."""
        return self.inputs.size if isinstance(self.inputs, OneHot) else self.inputs.shape[-1]

    @property
    def counted(self) -> int | Tensor:
        """Number of positions in the moment of the inputs, without masked and empty ones.  # or ()"""
        if isinstance(self.inputs, OneHot) and (self.weights is not None or self.inputs.padding is not None):
            return self._index_weights(self.gradients.dtype).sum()
        return self.gradients.shape[2] * self.gradients.shape[3] if self.weights is None else self.weights.sum()

    def regrouped(self, examples: int) -> Outer:
        """The same rows in ``examples`` equal parts, where all positions belong to one; sums and counts stay what they are."""
        n, r = self.gradients.shape[2:4]
        if n != 1 or examples < 2 or r % examples or not isinstance(self.inputs, Tensor) or self.inputs.shape[2] != r:
            return self
        inputs, gradients = self.inputs.unflatten(2, (examples, -1)).squeeze(1), self.gradients.unflatten(3, (examples, -1))
        weights = None if self.weights is None else self.weights.reshape(examples, -1)
        return replace(self, inputs=inputs, gradients=gradients.squeeze(2), weights=weights, own=None)

    def scaled(self, factors: Tensor) -> Outer:
        """The evidence with the gradient of each example multiplied by a factor.  factors: (n,)"""
        axis = 2 if self.gradients.shape[2] == len(factors) else 0
        shape = [-1 if a == axis else 1 for a in range(self.gradients.ndim)]
        return replace(self, gradients=self.gradients * factors.to(self.gradients).view(shape), own=None)

    def settled(self) -> Outer:
        """The same with inputs that are formed, so that it may be held when those of the call have changed."""
        return replace(self, inputs=self.inputs.form()) if isinstance(self.inputs, Patches) else self

    def inputs_alone(self) -> Outer:
        """The inputs without output gradients, of the kind ``inputs``."""
        return replace(self, gradients=self.gradients[:0], fresh=True, kind="inputs", own=None)

    def reduced(self) -> Outer:
        """One position per example: the mean input and the summed gradient (K-FAC-reduce, arXiv:2311.00636)."""
        assert isinstance(self.inputs, Tensor)
        if self.weights is None and self.gradients.shape[3] == self.inputs.shape[2] == 1:
            return self
        if self.weights is None:
            inputs = self.inputs.mean(2, keepdim=True)
            weights = None
        else:
            total = self.weights.sum(1, keepdim=True)  # (n, 1)
            share = self.weights / total.clamp(min=1)
            inputs = torch.einsum("gnri,nr->gni", self.inputs, share).unsqueeze(2)
            weights = (total > 0).to(self.weights.dtype)
        return replace(self, inputs=inputs, gradients=self.gradients.sum(3, keepdim=True), weights=weights, own=None)

    # ---------------------------------------------------------------- moments, for Kronecker factors
    def add_input_moment_(self, out: Tensor, beta: float, alpha: float, write: Writer = at_once) -> None:
        """``out <- beta out + alpha sum_nr a a^T`` over the `counted` positions; the diagonal for one-hot inputs or a vector.

        It is a sum, not a mean, so that the parts of a batch add up to the batch however it is cut.

        ``out``: (G, i, i) or (G, i), with the bias as the last coordinate.
        """
        if isinstance(self.inputs, OneHot):
            write(out.mul_, beta)
            write(out[0].index_add_, 0, self.inputs.index.reshape(-1), self._index_weights(out.dtype), alpha=alpha)
            return
        if isinstance(self.inputs, Patches) and self.weights is None and out.ndim == 3:
            self._add_moment_of_patches_(self.inputs, out, beta, alpha, write)
            return
        G, n, r, i = self.inputs.shape
        x = self.inputs.reshape(G, n * r, i)
        weighed = x if self.weights is None else x * self.weights.reshape(1, n * r, 1)
        if out.ndim == 2:
            _add_(out[:, :i], (weighed * x).sum(1), beta, alpha, write)
        else:
            add_moment_(out[:, :i, :i], weighed, x, beta, alpha, write)
        self._add_bias_(weighed.sum(1) if self.bias and out.ndim == 3 else None, out, beta, alpha, write)

    def _add_moment_of_patches_(self, a: Patches, out: Tensor, beta: float, alpha: float, write: Writer) -> None:
        i = a.shape[-1]
        _add_(out[:, :i, :i], a.moment(), beta, alpha, write)
        self._add_bias_(a.total() if self.bias else None, out, beta, alpha, write)

    def _add_bias_(self, total: Tensor | None, out: Tensor, beta: float, alpha: float, write: Writer) -> None:
        """The row and the column of the bias.  total: ``sum_nr a``; None for a diagonal"""
        if not self.bias:
            return
        i = out.shape[1] - 1
        if total is not None:
            _add_(out[:, :i, i], total, beta, alpha, write)
            write(out[:, i, :i].copy_, out[:, :i, i])
        corner = out[:, i] if out.ndim == 2 else out[:, i, i]
        write(corner.mul_, beta)
        write(corner.add_, alpha * self.counted)

    def total(self) -> Tensor:
        """``sum_nr a`` over the `counted` positions, the bias last.  # (G, i)"""
        assert isinstance(self.inputs, Tensor)
        a = self.inputs if self.weights is None else self.inputs * self.weights.unsqueeze(-1)
        total = a.sum((1, 2))
        return torch.cat([total, torch.zeros_like(total[:, :1]) + self.counted], 1) if self.bias else total

    def _index_weights(self, dtype: torch.dtype) -> Tensor:
        """Weight of each index in the moment.  # (n r,)"""
        assert isinstance(self.inputs, OneHot)
        index = self.inputs.index.reshape(-1)
        w = torch.ones_like(index, dtype=dtype) if self.weights is None else self.weights.reshape(-1).to(dtype)
        return w if self.inputs.padding is None else w * (index != self.inputs.padding)

    def add_gradient_moment_(self, out: Tensor, beta: float, alpha: float, write: Writer = at_once) -> None:
        """``out <- beta out + alpha sum_knr g g^T``.  # (G, o, o), or its diagonal (G, o)

        For the kind ``inputs`` it adds ``alpha c I``, ``c`` the number of `counted` positions: the mean over them is ``I``.
        """
        if self.kind == "inputs":
            write(out.mul_, beta)
            write((out if out.ndim == 2 else out.diagonal(dim1=-2, dim2=-1)).add_, alpha * self.counted)
            return
        k, G, n, r, o = self.gradients.shape
        g = self.gradients.transpose(0, 1).reshape(G, k * n * r, o)
        if out.ndim == 2:
            _add_(out, (g * g).sum(1), beta, alpha, write)
        else:
            add_moment_(out, g, g, beta, alpha, write)

    # ---------------------------------------------------------------- products of J
    def rows(self) -> Tensor:
        inputs = self.inputs.dense(self.gradients.dtype) if isinstance(self.inputs, OneHot) else self.inputs
        if self.kind == "inputs":
            return input_rows(inputs, self.weights, self.bias, self.gradients.shape[-1], self.transposed)
        J = torch.einsum("kgnro,gnri->kngoi", self.gradients, inputs)
        if self.bias:
            J = torch.cat([J, self.gradients.sum(3).transpose(1, 2).unsqueeze(-1)], -1)
        J = J.flatten(0, 1)
        return J.mT if self.transposed else J

    def squares(self) -> Tensor:
        """``sum_N J * J``.  # (G, o, i), or (G, i, o) when transposed"""
        if isinstance(self.inputs, OneHot):
            return one_hot_squares(self.inputs, self.gradients[:, 0], self.transposed)
        if self.inputs.shape[2] == 1:  # one position: the square of an outer product is the product of squares
            a, g = self.inputs[:, :, 0], self.gradients[:, :, :, 0]
            g2 = g.square().sum(0)  # (G, n, o)
            out = g2.mT @ a.square()
            if self.bias:
                out = torch.cat([out, g2.sum(1).unsqueeze(-1)], -1)
            return out.mT if self.transposed else out
        parts = self.pieces()
        total = next(parts).rows().square().sum(0)
        for part in parts:
            total += part.rows().square().sum(0)
        return total

    def pieces(self) -> Iterator[Outer]:
        """Yields the same rows in parts of at most `PIECE` entries, each of at least one row."""
        assert isinstance(self.inputs, Tensor)
        _, G, n, _, o = self.gradients.shape
        row = G * o * (self.inputs.shape[-1] + self.bias)
        step, together = (max(1, PIECE // max(1, size)) for size in (row, row * n))
        for g in self.gradients.split(together):
            for own in (slice(start, start + step) for start in range(0, n, step)):
                weights = None if self.weights is None else self.weights[own]
                yield replace(self, inputs=self.inputs[:, own], gradients=g[:, :, own], weights=weights, own=None)

    def gram(self, other: Outer) -> Tensor:
        """``J J'^T`` of each group without ``J``: ``sum_rs (a_r . a'_s)(g_r . g'_s)``.  # (G, N, N')"""
        mine, its = (x.gradients.transpose(0, 1) for x in (self, other))
        (G, k, n, r, _), (_, h, m, s, _) = mine.shape, its.shape
        products = torch.bmm(mine.flatten(1, 3), its.flatten(1, 3).mT).view(G, k, n, r, h, m, s)
        products.mul_(self._input_products(other).view(G, 1, n, r, 1, m, s))
        return (products if r == s == 1 else products.sum((3, 6))).view(G, k * n, h * m)

    def _input_products(self, other: Outer) -> Tensor:
        """Inner products ``a . a'``, with the bias.  # (G, nr, ms)"""
        if isinstance(self.inputs, OneHot) and isinstance(other.inputs, OneHot):
            same = self.inputs.index.reshape(-1, 1) == other.inputs.index.reshape(1, -1)
            return same.to(self.gradients.dtype).unsqueeze(0)
        assert isinstance(self.inputs, Tensor) and isinstance(other.inputs, Tensor)
        products = torch.bmm(self.inputs.flatten(1, 2), other.inputs.flatten(1, 2).mT)
        return products.add_(1) if self.bias else products

    def project(self, v: Tensor) -> Tensor:
        """``<J_N, v>`` in each group.  v: (G, *shape) -> (G, N)"""
        v = v.mT if self.transposed else v
        if isinstance(self.inputs, OneHot):
            moved = v[0].mT[self.inputs.index.long()].unsqueeze(0)  # (1, n, r, o)
        else:
            i = self.inputs.shape[-1]
            moved = (self.inputs.flatten(1, 2) @ v[..., :i].mT).unflatten(1, self.inputs.shape[1:3])
            if self.bias:
                moved = moved + v[:, None, None, :, i]
        return torch.einsum("gknro,gnro->gkn", self.gradients.transpose(0, 1), moved).flatten(1)

    def weighted(self, z: Tensor) -> Tensor:
        """``sum_k z_kn g_kn``.  z: (G, N), or (1, N) for all groups -> (G, n, r, o)"""
        k, G, n = self.gradients.shape[:3]
        z = z.expand(G, -1).reshape(G, k, n)
        if k == 1:
            return self.gradients[0] * z.view(G, n, 1, 1)
        return torch.einsum("gknro,gkn->gnro", self.gradients.transpose(0, 1), z)

    def combine(self, z: Tensor) -> Tensor:
        """``sum_N z_N J_N``.  z: (G, N), or (1, N) for all groups -> (G, *shape)"""
        weighted = self.weighted(z)
        if isinstance(self.inputs, OneHot):
            out = weighted.new_zeros(1, self.inputs.size, weighted.shape[-1])
            out.index_add_(1, self.inputs.index.long().flatten(), weighted.flatten(1, 2))
            return out if self.transposed else out.mT
        G, i, o = len(weighted), self.inputs.shape[-1], weighted.shape[-1]
        out = weighted.new_empty(G, o, i + self.bias)
        out[..., :i].baddbmm_(weighted.flatten(1, 2).mT, self.inputs.flatten(1, 2), beta=0)
        if self.bias:
            out[..., i] = weighted.sum((1, 2))
        return out.mT if self.transposed else out


def _add_(out: Tensor, x: Tensor, beta: float, alpha: float, write: Writer) -> None:
    """``out <- beta out + alpha x``."""
    write(out.mul_, beta)
    write(out.add_, x, alpha=alpha)


@dataclass(frozen=True)
class Joint(Evidence):
    """Rows of several layers side by side, as one block: the evidence for the granularity ``full``."""

    parts: tuple[Outer, ...]

    def rows(self) -> Tensor:
        return torch.cat([part.rows().flatten(1) for part in self.parts], 1).unsqueeze(1)  # (N, 1, P)


@dataclass(frozen=True)
class Pair(Evidence):
    """A vector ``v`` and its image ``C v``: a random probe, or a secant (step, change of gradient)."""

    v: Tensor  # (G, *shape)
    cv: Tensor  # (G, *shape)
    kind: PairKind = "probe"
    counted: int | Tensor | None = None  # positions that ``v`` is a mean over; None: it is no mean  # or ()

    kinds: ClassVar[tuple[str, ...]] = get_args(PairKind)

    def rows(self) -> Tensor:
        raise TypeError("Pair: one column of the curvature has no rows; rows are those of Outer, Joint and Gradient")


@dataclass(frozen=True)
class Gradient(Evidence):
    """The mini-batch gradient of a block: ``C = vec(G) vec(G)^T``."""

    gradient: Tensor  # (G, *shape)
    weights: Tensor | None = None  # at which it was taken, for the kind `located`; shaped like the gradient
    kind: GradientKind = "row"

    kinds: ClassVar[tuple[str, ...]] = get_args(GradientKind)

    def rows(self) -> Tensor:
        return self.gradient.unsqueeze(0)
