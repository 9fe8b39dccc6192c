"""KL-Shampoo's covariance factors, which minimise a KL divergence: each axis is measured after the others are whitened.

Letters: ``S_k`` the factor of axis ``k``, ``d_k`` its length, ``D`` the number of elements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Evidence, Gradient
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.linalg.diagnosis import COLUMNS, renew_row, spectral_residual
from gradmaker.linalg.eigen import decompose_again
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.factors import for_members
from gradmaker.linalg.fallbacks import count_failures, is_empty
from gradmaker.linalg.mode_products import add_product_, apply_factors, mode_matrix
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_interval
from gradmaker.representations.base import Fold, Frame
from gradmaker.representations.held_spectra import HeldSpectra
from gradmaker.representations.roles import FoldsRows, SlowTensors

__all__ = ["CrossDims"]


@dataclass(frozen=True)
class CrossDims(HeldSpectra, FoldsRows, SlowTensors):
    """KL-Shampoo's factors: ``C ~ S_1 (x) ... (x) S_m``, ``S_k <- b S_k + (1 - b) (d_k / D) mat_k(G_w) mat_k(G_w)^T``.

    ``G_w`` is the gradient with all other axes whitened, by the factors of the last refresh, with eigenvalues above ``floor``.
    The stationary point is that of ``KL(N(0, E g g^T) | N(0, S_1 (x) ...))``. Only the product of the factors has a scale: a
    refresh makes their average eigenvalues equal, which does not change the product. There is no bias correction: ``S_k``
    starts at ``start I``.

    Reference: Lin et al. 2025, arXiv:2509.03378, KL-Shampoo.
    """

    takes: ClassVar[frozenset[Kind]] = kinds(Gradient)
    exponent: ClassVar[int] = 1

    start: float = 0.1
    floor: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("start", "floor"):
            check_interval(name, getattr(self, name), 0, inf)

    def init(self, frame: Frame) -> State:
        none = torch.zeros(frame.stack, dtype=torch.int64, device=frame.device)
        state = {"failures": none, "failing": none.clone()}
        for axis, size in enumerate(frame.shape or (1,)):
            state[f"values_{axis}"] = frame.zeros(size) + self.start
            state[f"factor_{axis}"] = frame.zeros(size) + self.start
            if axis not in frame.diagonal:
                state[f"factor_{axis}"] = frame.unit(size, self.start)
                state[f"basis_{axis}"] = frame.unit(size)
        return state | {"diagnosis": frame.zeros(len(frame.shape or (1,)), len(COLUMNS))}

    def slow(self, state: State) -> frozenset[str]:
        """The factors that are applied."""
        return frozenset(name for name in state if name.startswith(("values_", "basis_")))

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        assert isinstance(evidence, Gradient)
        G = self.unfold(evidence.gradient)
        axes = range(G.ndim - 1)
        whiteners = [self._whitener(state, axis) for axis in axes]
        for axis in axes:
            others = [None if k == axis else W for k, W in enumerate(whiteners)]
            x = mode_matrix(apply_factors(others, G), axis)
            add_product_(state[f"factor_{axis}"], x, x.mT, fold.beta, fold.alpha / x.shape[-1])

    def update_rows(self, state: State, rows: FactoredGradient, fold: Fold) -> None:
        g, a = (apply_factors([None, self._whitener(state, axis)], x) for axis, x in enumerate((rows.g, rows.a)))
        for axis, whitened in enumerate((replace(rows, a=a), replace(rows, g=g))):
            alpha = fold.alpha / rows.shape[2 - axis]
            add_product_(state[f"factor_{axis}"], *whitened.moment_halves(axis), fold.beta, alpha)

    def _whitener(self, state: State, axis: int) -> Tensor:
        """``s^(-1/2) Q^T``: it lacks a rotation, of which a second moment is independent.  # (B, d, d) or (B, d)"""
        w, Q = state[f"values_{axis}"].rsqrt(), state.get(f"basis_{axis}")
        return w if Q is None else (Q * w.unsqueeze(-2)).mT

    def refresh(self, state: State) -> None:
        axes = self.axes(state)
        factors = [state[f"factor_{axis}"] for axis in axes]
        means = torch.stack([(S if S.ndim == 2 else S.diagonal(dim1=-2, dim2=-1)).mean(-1) for S in factors])
        usable = (torch.isfinite(means) & (means > 0)).all(0)
        scales = torch.where(usable, means.log().mean(0).exp() / means, 1.0)
        all_usable = usable.device.type == "cpu" and bool(usable.all())
        found: list[tuple[Tensor, Tensor | None, Tensor, Tensor]] = []
        for axis, S in zip(axes, factors, strict=True):
            S.mul_(for_members(scales[axis], S))
            found.append(_spectrum(S if all_usable else torch.where(for_members(usable, S), S, 0.0)))
        failed = ~torch.stack([usable, *(ok for _, _, ok, _ in found)]).all(0)
        for axis, (s, Q, _, retries) in enumerate(found):  # all axes of a member or none: each is measured through the others
            for name, new in (("values", s.clamp(min=self.floor)), ("basis", Q)):
                if new is not None:
                    held = state[f"{name}_{axis}"]
                    torch.where(for_members(failed, held), held, new, out=held)
            error = spectral_residual(factors[axis], (s,) if Q is None else (s, Q), s.clamp(min=self.floor))
            renew_row(state["diagnosis"], axis, failed, error, s.amax(-1), self.floor, retries=retries)
        for name, value in count_failures(failed, state, is_empty(factors)).items():
            state[name].copy_(value)


def _spectrum(S: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Eigenvalues, basis, whether they are finite and accurate, retries.  # (B, d, d) or (B, d), then as `decompose_again`"""
    if S.ndim == 3:
        return decompose_again(S)
    return S, None, torch.isfinite(S).all(-1), torch.zeros_like(S[:, 0])
