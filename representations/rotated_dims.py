"""SOAP's statistic: Shampoo's factors, their eigenbases, and the second moment of gradients in these bases.

A basis is part of the statistic, since the moments are measured in it. Letters: ``Q`` bases, ``V`` moments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Evidence, Gradient
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.linalg.diagnosis import COLUMNS, estimate_largest, renew_row
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.factors import for_members
from gradmaker.linalg.fallbacks import count_failures
from gradmaker.linalg.mode_products import add_product_, mode_matrix
from gradmaker.linalg.orthogonal_iteration import (
    off_diagonal,
    orthonormal,
    power_step,
    rayleigh_quotients,
    sort_axis,
    sorted_eigenvectors,
    staleness,
)
from gradmaker.linalg.rotation import coordinates, from_coordinates
from gradmaker.linalg.state import State
from gradmaker.linalg.writes import Writer, at_once
from gradmaker.options.checks import check_choice, check_interval
from gradmaker.representations.base import Fold, Frame, Grain, average
from gradmaker.representations.roles import (
    PROJECTED,
    FactoredAxes,
    FoldsLast,
    FoldsRows,
    OwnOrder,
    Projects,
    Renewal,
    Renewed,
    SlowTensors,
)

__all__ = ["RotatedDims"]

COUNTERS = ("failures", "failing")
BIRTH = 1e-4
"""What stays of the first second moment, of equal entries, in the average that begins with it.

With nothing, the second step would divide the rounding noise in the null space of the first gradient by its own size.
"""


@dataclass(frozen=True)
class RotatedDims(FactoredAxes, FoldsRows, FoldsLast, OwnOrder, Projects, Renewed, SlowTensors):
    """SOAP's curvature: ``C ~ Q diag(V) Q^T``, ``V = E (Q^T g)^2``, in the eigenbases ``Q = Q_1 (x) ... (x) Q_m`` of Shampoo.

    ``V`` is the diagonal nearest to ``C`` in its basis. A new basis does not rotate it, but where the columns of the basis are
    sorted, ``V`` is permuted with them. A basis is kept until the next refresh, or longer while it is within ``tolerance``.

    After a refresh ``diagnosis`` says how far the old basis was from diagonalising the factor, and whether there is a new one.

    - ``sequence="moments_first"``: a gradient enters ``V`` in the basis that earlier gradients made (SOAP);
    - ``"basis_first"``: it enters the factors first, and a refresh comes before it enters ``V`` (EShampoo).

    So a refresh comes before the gradient of its step, or between its two uses.

    The first gradient is diagonal in its own basis, where a second moment would be rounding noise: all entries of ``V`` start
    at their mean, of which `BIRTH` stays in an average when the next gradient comes; or, with ``skip_first``, ``V`` starts with
    the next gradient, and the first step is left out.

    Reference: Vyas et al., ICLR 2025, arXiv:2409.11321, algorithm 3 (SOAP); Eschenhagen et al., 2025, arXiv:2506.03595
    (eigenvalue-corrected Shampoo, ``tolerance``).
    """

    takes: ClassVar[frozenset[Kind]] = kinds(Gradient)

    tracking: Literal["power", "qr", "eigh"] = "power"
    tolerance: float = 0.0
    sequence: Literal["moments_first", "basis_first"] = "moments_first"
    skip_first: bool = False
    vectors: bool = False
    """Whether a tensor with one axis gets a basis too; otherwise its moments are Adam's."""

    def __post_init__(self) -> None:
        for name, legal in (("tracking", ("power", "qr", "eigh")), ("sequence", ("moments_first", "basis_first"))):
            check_choice(name, getattr(self, name), legal)
        check_interval("tolerance", self.tolerance, 0, 1, closed=True)

    @property
    def grain(self) -> Grain:
        return "tensor"

    @property
    def renewal(self) -> Renewal:
        """``V`` changes with every gradient."""
        return "measurement"

    @property
    def skips_first(self) -> bool:
        return self.skip_first

    def slow(self, state: State) -> frozenset[str]:
        """The bases."""
        return frozenset(f"basis_{axis}" for axis in self._axes(state))

    def init(self, frame: Frame) -> State:
        shape = frame.shape or (1,)
        state = {"moments": frame.zeros(*shape), "mass": frame.zeros(), "factor_mass": frame.zeros()}
        state["equal"] = frame.zeros()  # 1 while the moments are those of the first gradient
        state["diagnosis"] = frame.zeros(len(shape), len(COLUMNS))
        state |= {name: torch.zeros(frame.stack, dtype=torch.int64, device=frame.device) for name in COUNTERS}
        for axis, size in enumerate(shape):
            if axis not in frame.diagonal and (len(shape) > 1 or self.vectors):
                state[f"factor_{axis}"] = frame.zeros(size, size)
                state[f"basis_{axis}"] = frame.unit(size)
        return state

    # ---------------------------------------------------------------- the statistic
    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        assert isinstance(evidence, Gradient)
        self._update(state, self.unfold(evidence.gradient), fold)

    def update_rows(self, state: State, rows: FactoredGradient, fold: Fold) -> None:
        self._update(state, rows, fold)

    def _update(self, state: State, G: Tensor | FactoredGradient, fold: Fold) -> None:
        early = fold.first or self.sequence == "basis_first"
        if early and not fold.postponed:
            self._fold_factors(state, G, fold, at_once)
        if fold.first:
            self._renew(state, born=True)
        elif fold.refresh:
            self.refresh(state)
        if not (fold.first and self.skip_first):
            self._fold_moments(state, G, fold, born=fold.first)
        if not early and not fold.postponed:
            self._fold_factors(state, G, fold, at_once)

    def fold(self, state: State, evidence: Evidence | FactoredGradient, fold: Fold, write: Writer) -> None:
        """Fold a gradient into the factors."""
        G = self.unfold(evidence.gradient) if isinstance(evidence, Gradient) else evidence
        assert isinstance(G, (Tensor, FactoredGradient))
        self._fold_factors(state, G, fold, write)

    def last(self, state: State, evidence: Evidence | FactoredGradient, fold: Fold) -> frozenset[str]:
        """The factors, unless this step's basis is made of them with their new evidence."""
        if fold.first or (fold.refresh and self.sequence == "basis_first"):
            return frozenset()
        return frozenset(f"factor_{axis}" for axis in self._axes(state)) | {"factor_mass"}

    def refresh(self, state: State) -> None:
        self._renew(state, born=False)

    def _fold_factors(self, state: State, G: Tensor | FactoredGradient, fold: Fold, write: Writer) -> None:
        for axis in self._axes(state):
            if isinstance(G, FactoredGradient):
                add_product_(state[f"factor_{axis}"], *G.moment_halves(axis), fold.beta, fold.alpha, write)
            else:
                x = mode_matrix(G, axis)
                add_product_(state[f"factor_{axis}"], x, x.mT, fold.beta, fold.alpha, write)
        fold.weigh_(state["factor_mass"], write)

    def _fold_moments(self, state: State, G: Tensor | FactoredGradient, fold: Fold, born: bool) -> None:
        rotated = coordinates(self.bases(state), G)
        if fold.solved and isinstance(G, Tensor):  # by rows it takes less to project them again than to keep the result
            state[PROJECTED] = rotated
        kept = 1 - (1 - BIRTH) * state["equal"] if fold.begins else torch.ones_like(state["equal"])
        state["moments"].mul_(for_members(fold.beta * kept, rotated))
        if born and self._axes(state):
            state["moments"].add_(for_members(rotated.square().flatten(1).mean(1), rotated), alpha=fold.alpha)
        else:
            state["moments"].addcmul_(rotated, rotated, value=fold.alpha)
        state["mass"].mul_(kept)
        fold.weigh_(state["mass"])
        state["equal"].fill_(float(born and bool(self._axes(state)) and not fold.summed))

    def _renew(self, state: State, born: bool) -> None:
        failed = torch.zeros_like(state["failing"], dtype=torch.bool)
        for axis in self._axes(state):
            H, Q = state[f"factor_{axis}"], state[f"basis_{axis}"]
            image = Q.mT @ H  # H is symmetric
            quotients = rayleigh_quotients(Q, image)
            stale = torch.isfinite(quotients).all(-1)  # an entry of H that is not finite is in all of them
            failed |= ~stale
            error = off_diagonal(H, Q, image) if self.tolerance else staleness(H, quotients)
            if not born and self.tolerance:
                stale &= error > self.tolerance
            new, order = self._tracked(H, Q, image, stale, born)
            right = torch.isfinite(new.sum((-2, -1)))
            stale, failed = stale & right, failed | (stale & ~right)
            torch.where(stale[:, None, None], new, Q, out=Q)
            largest = estimate_largest(H) if born else torch.linalg.vector_norm(image, dim=-1).amax(-1)
            renew_row(state["diagnosis"], axis, ~torch.isfinite(error), error, largest, iterations=stale.to(H.dtype))
            if order is not None:
                same = torch.arange(H.shape[-1], device=H.device).expand_as(order)
                state["moments"].copy_(sort_axis(state["moments"], torch.where(stale[:, None], order, same), axis + 1))
        for name, value in count_failures(failed, state).items():
            state[name].copy_(value)

    def _tracked(self, H: Tensor, Q: Tensor, image: Tensor, stale: Tensor, born: bool) -> tuple[Tensor, Tensor | None]:
        """The new basis, and how its columns are sorted where they are.  image: ``Q^T H``"""
        if born or self.tracking == "eigh":
            return sorted_eigenvectors(torch.where(stale[:, None, None], H, 0.0)), None
        return power_step(H, Q, image) if self.tracking == "power" else (orthonormal(image.mT), None)

    def _axes(self, state: State) -> list[int]:
        return [axis for axis in range(state["moments"].ndim - 1) if f"basis_{axis}" in state]

    def to_dense(self, state: State) -> Tensor:
        V = state["moments"]
        eye = torch.eye(V[0].numel(), dtype=V.dtype, device=V.device)
        columns = eye.reshape(-1, *V.shape[1:])
        return torch.stack([self.matvec(state, v.expand_as(V)).flatten(1) for v in columns], -1)

    def matvec(self, state: State, v: Tensor) -> Tensor:
        bases = self.bases(state)
        rotated = coordinates(bases, self.unfold(v))
        return from_coordinates(bases, rotated * self.spectrum(state)).reshape(v.shape)

    # ---------------------------------------------------------------- Rotated
    def bases(self, state: State) -> list[Tensor | None]:
        """``Q_k``; None for an axis that keeps the unit basis.  # (B, d_k, d_k)"""
        return [state.get(f"basis_{axis}") for axis in range(state["moments"].ndim - 1)]

    def spectrum(self, state: State) -> Tensor:
        """``V``, bias-corrected.  # (B, d_1, ..., d_m)"""
        return average(state["moments"], state["mass"])

    def unfold(self, g: Tensor) -> Tensor:
        """The gradient itself; a scalar parameter is a vector of length one.  # (B, d_1, ..., d_m)"""
        return g if g.ndim > 1 else g.unsqueeze(1)
