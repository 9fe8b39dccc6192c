"""Kronecker sums (CASPR): the factors of the axes are averaged as operators instead of multiplied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Evidence, Gradient
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.mode_products import apply_factors
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_count
from gradmaker.representations.base import Fold, Frame, Grain
from gradmaker.representations.kronecker import KronDims
from gradmaker.representations.roles import FactoredAxes, FoldsRows
from gradmaker.representations.root_dims import RootKronDims

__all__ = ["KronSum", "axis_mean", "dense_mean"]

_AXES, _ROOTS = KronDims(), RootKronDims()


def axis_mean(roots: Sequence[Tensor], g: Tensor) -> Tensor:
    """``(1/m) sum_k g x_k X_k``: the mean over factors, each on its axis.  # (B, d_k, d_k) or (B, d_k); (B, d_1, ..., d_m)"""
    first, *others = [apply_factors([*[None] * k, X], g) for k, X in enumerate(roots)]
    for term in others:
        first.add_(term)
    return first.div_(len(roots))


def dense_mean(roots: Sequence[Tensor]) -> Tensor:
    """``(1/m) sum_k I (x) .. X_k .. (x) I`` as a matrix.  # (B, P, P)"""
    shape = [X.shape[-1] for X in roots]
    eye = torch.eye(torch.Size(shape).numel(), dtype=roots[0].dtype, device=roots[0].device)
    columns = [axis_mean(roots, e.reshape(1, *shape).expand(len(roots[0]), *shape)).flatten(1) for e in eye]
    return torch.stack(columns, -1)


@dataclass(frozen=True)
class KronSum(FactoredAxes, FoldsRows):
    """CASPR's curvature: ``C^(-1/2) = [(1/m) sum_k H_k^(-1/2p)]^p``, each ``H_k`` acting on axis ``k`` of the gradient.

    A family of power means of the axes' inverse roots, from the arithmetic mean (``p = 1``) over CASPR (``p = 2``) to the
    geometric mean of Shampoo (``p -> inf``, `KronDims`); ``p=None`` is the number of axes. In the Loewner order ``C^(-1/2)``
    falls as ``p`` rises, and never exceeds ``sqrt(r)`` times full-matrix AdaGrad's, ``r`` the largest rank of a gradient.
    All factors have one scale: unlike a product, the mean changes when one is multiplied and another divided.
    ``square_roots`` holds ``R_k`` with ``H_k = R_k^T R_k``, as `RootKronDims` does, for float32.

    Reference: Duvvuri, Devvrit, Anil, Hsieh, Dhillon, ICLR 2024, "Combining axes preconditioners through Kronecker
    approximation for deep learning", section 3.
    """

    takes: ClassVar[frozenset[Kind]] = kinds(Gradient)

    p: int | None = 2
    square_roots: bool = False

    def __post_init__(self) -> None:
        if self.p is not None:
            check_count("p", self.p, 1, hint=", or None for the number of axes")

    @property
    def grain(self) -> Grain:
        return "tensor"

    def init(self, frame: Frame) -> State:
        return self._axes.init(frame)

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        self._axes.update(state, evidence, fold)

    def update_rows(self, state: State, rows: FactoredGradient, fold: Fold) -> None:
        self._axes.update_rows(state, rows, fold)

    @property
    def _axes(self) -> KronDims:
        return _ROOTS if self.square_roots else _AXES

    def to_dense(self, state: State) -> Tensor:
        """``C``; for singular factors, the limit of a vanishing ridge.  # (B, P, P)"""
        spectra = self._roots(state)
        roots = [torch.diag_embed(r) if Q is None else (Q * r.unsqueeze(-2)) @ Q.mT for r, Q in spectra]
        inverse = torch.linalg.matrix_power(torch.linalg.inv(dense_mean(roots)), 2 * self.passes(len(roots)))
        C: Tensor = (inverse + inverse.mT) / 2
        return C

    def matvec(self, state: State, v: Tensor) -> Tensor:
        """``C v``, in the eigenbasis of the factors, where the mean of the roots is diagonal.  # (B, *shape)"""
        spectra, x = self._roots(state), self.unfold(v)
        m = len(spectra)
        mean = sum(r.reshape(len(x), *[1] * k, -1, *[1] * (m - k - 1)) for k, (r, _) in enumerate(spectra)) / m
        x = apply_factors([None if Q is None else Q.mT for _, Q in spectra], x) * mean ** (-2 * self.passes(m))
        return apply_factors([Q for _, Q in spectra], x).reshape(v.shape)

    def _roots(self, state: State) -> list[tuple[Tensor, Tensor | None]]:
        """``H_k^(-1/2p)`` as eigenvalues, floored, and eigenvectors; None for the unit basis.  # (B, d), (B, d, d)"""
        factors, found = self.summands(state), []
        for F in factors:
            s, Q = (F, None) if F.ndim == 2 else torch.linalg.eigh(F)
            floor = torch.finfo(s.dtype).eps * s.amax(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)
            found.append((torch.maximum(s, floor) ** (-1 / (2 * self.passes(len(factors)))), Q))
        return found

    # ---------------------------------------------------------------- Summed: one factor for each axis
    def summands(self, state: State) -> list[Tensor]:
        """``H_k``, bias-corrected.  # (B, d_k, d_k)"""
        return self._axes.factors(state)

    def summand_roots(self, state: State) -> list[Tensor]:
        """``R_k``, bias-corrected, where they are held.  # (B, d_k, d_k)"""
        return _ROOTS.factor_roots(state)

    def unfold(self, g: Tensor) -> Tensor:
        """The gradient itself; a scalar parameter is a vector of length one.  # (B, d_1, ..., d_m)"""
        return _AXES.unfold(g)

    def passes(self, factors: int) -> int:
        """The ``p`` of the formula.  factors: the number of axes"""
        return factors if self.p is None else self.p
