"""Evidence as a matrix-vector product, or as given Kronecker factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Evidence
from gradmaker.linalg.writes import Writer, at_once

__all__ = ["Factors", "Layers", "Product"]


@dataclass(frozen=True)
class Factors(Evidence):
    """Kronecker factors that are known already: ``C = B (x) A``; either factor may be a diagonal."""

    A: Tensor  # (G, i, i) or (G, i), of the inputs, the bias last
    B: Tensor  # (G, o, o) or (G, o), of the output gradients, carrying every scale
    transposed: bool = False  # as in `Outer`
    fresh: bool = True  # as in `Outer`
    counted: int | Tensor = 1  # positions that ``A`` is the mean over  # or ()

    def add_input_moment_(self, out: Tensor, beta: float, alpha: float, write: Writer = at_once) -> None:
        """``out <- beta out + alpha c A`` with the number ``c`` of `counted` positions, or its diagonal."""
        write(out.mul_, beta)
        write(out.add_, _as_form(self.A, out.ndim) * self.counted, alpha=alpha)

    def add_gradient_moment_(self, out: Tensor, beta: float, alpha: float, write: Writer = at_once) -> None:
        """``out <- beta out + alpha B``, or its diagonal."""
        write(out.mul_, beta)
        write(out.add_, _as_form(self.B, out.ndim), alpha=alpha)

    def rows(self) -> Tensor:
        spectra = (torch.linalg.eigh(_as_form(F, 3)) for F in (self.A, self.B))
        a, b = (Q * s.clamp(min=0).sqrt().unsqueeze(-2) for s, Q in spectra)
        J = torch.einsum("gok,gil->klgoi", b, a).flatten(0, 1)
        return J.mT if self.transposed else J


@dataclass(frozen=True)
class Moments(Evidence):
    """Sums over the examples of one process, of which the curvature is a function once those of all are added."""

    sites: tuple[str, ...]
    sums: tuple[Tensor, ...]

    def rows(self) -> Tensor:
        raise TypeError("Moments: sums over examples have no rows")


@dataclass(frozen=True)
class Layers:
    """Kronecker factors of layers, in the order of a vector of all parameters; None for layers without evidence."""

    sizes: tuple[int, ...]  # numbers of parameters
    factors: tuple[Factors | None, ...]


@dataclass(frozen=True)
class Product(Evidence):
    """The curvature of a whole block as a matrix-vector product, valid as long as the graph of the step."""

    matvec: Callable[[Tensor], Tensor]  # of k vectors, each flat or in the block's shape: (k, ...) -> (k, ...)
    loss_at: Callable[[Tensor], Tensor] | None = None  # the loss at a displacement of the block's parameters
    loss_and_gradient_at: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None  # likewise: (1, P) -> (), (1, P)
    squares: Tensor | None = None  # the diagonal of the empirical Fisher matrix  # (1, P)
    layers: Layers | None = None  # a Kronecker approximation of the Fisher matrix

    def rows(self) -> Tensor:
        raise TypeError("Product: a matrix-vector product has no rows; rows are those of Outer, Joint and Gradient")


def _as_form(F: Tensor, ndim: int) -> Tensor:
    """A factor as a matrix (``ndim`` 3), or its diagonal (2).  # (G, d, d) or (G, d)"""
    if F.ndim == ndim:
        return F
    return F.diag_embed() if ndim == 3 else F.diagonal(dim1=-2, dim2=-1)
