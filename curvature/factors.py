"""Kronecker factors of layers that are known already, as evidence and beside products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Evidence

__all__ = ["Factors", "Layers"]


@dataclass(frozen=True)
class Factors(Evidence):
    """A Kronecker product that is known already: ``C = B (x) A``; of either factor the diagonal may be all there is."""

    A: Tensor  # (G, i, i) or (G, i), of the inputs, the bias last
    B: Tensor  # (G, o, o) or (G, o), of the output gradients, carrying every scale
    transposed: bool = False  # as in `Outer`
    fresh: bool = True  # as in `Outer`
    counted: int | Tensor = 1  # positions that ``A`` is the mean over  # or ()

    def add_input_moment_(self, out: Tensor, beta: float, alpha: float) -> None:
        """``out <- beta out + alpha c A`` with the number ``c`` of `counted` positions, or its diagonal."""
        out.mul_(beta).add_(_fitting(self.A, out.ndim) * self.counted, alpha=alpha)

    def add_gradient_moment_(self, out: Tensor, beta: float, alpha: float) -> None:
        """``out <- beta out + alpha B``, or its diagonal."""
        out.mul_(beta).add_(_fitting(self.B, out.ndim), alpha=alpha)

    def rows(self) -> Tensor:
        spectra = (torch.linalg.eigh(_fitting(F, 3)) for F in (self.A, self.B))
        a, b = (Q * s.clamp(min=0).sqrt().unsqueeze(-2) for s, Q in spectra)
        J = torch.einsum("gok,gil->klgoi", b, a).flatten(0, 1)
        return J.mT if self.transposed else J


@dataclass(frozen=True)
class Layers:
    """Kronecker factors of layers, one after another in a vector of all parameters; None of those that took no part."""

    sizes: tuple[int, ...]  # numbers of parameters
    factors: tuple[Factors | None, ...]


def _fitting(F: Tensor, ndim: int) -> Tensor:
    """A factor as a matrix (``ndim`` 3) or as its diagonal (2).  # (G, d, d) or (G, d)"""
    if F.ndim == ndim:
        return F
    return F.diag_embed() if ndim == 3 else F.diagonal(dim1=-2, dim2=-1)
