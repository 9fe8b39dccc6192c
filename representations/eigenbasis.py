"""EKFAC's statistic: Kronecker factors, their eigenbases, and the second moments of the gradients in these bases.

A basis is part of the statistic, since the moments are measured in it: `update` recomputes it, and no solve changes it.
Letters: ``Q_B, Q_A`` bases of the output and the input side, ``D`` the moments, ``b, a`` the spectra of the factors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradmaker.capture.one_hot import OneHot
from gradmaker.curvature.evidence import PIECE, Evidence, Outer
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.linalg.eigen import eigh
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.factors import blocks, identity, is_tiled, rayleigh, transpose, turn
from gradmaker.linalg.fallbacks import none_of
from gradmaker.linalg.finite import finite_members
from gradmaker.linalg.mode_products import apply_factors
from gradmaker.linalg.state import State
from gradmaker.linalg.writes import Writer, at_once
from gradmaker.representations.base import Fold, Frame, Grain, average
from gradmaker.representations.kronecker import Kron
from gradmaker.representations.roles import ByExample, FactoredAxes, FoldsLast, OwnOrder, Renewal, Renewed, SlowTensors

__all__ = ["Eigenbasis", "rotated_squares"]

SIDES = ("left", "right")


@dataclass(frozen=True)
class Eigenbasis(FactoredAxes, ByExample, FoldsLast, OwnOrder, Renewed, SlowTensors):
    """EKFAC's curvature: ``C ~ (Q_B (x) Q_A) diag(D) (Q_B (x) Q_A)^T`` with ``D = sum_N (Q_B^T J_N Q_A)^2``.

    ``Q_B, Q_A`` are the eigenbases of `Kron`'s factors, ``J_N`` the gradient of a whole example: positions are summed before
    the square, whatever ``sharing`` is for the factors. The first step defines its own basis, which is known at its end only:
    until then ``D = b a^T``, the prediction of the factors alone, and a bias-corrected average drops the prediction when the
    second step begins. A refresh computes the basis from the factors as they were before the step, so that it does not depend
    on the cut of a batch into micro-batches. ``D`` then becomes the diagonal, in the new basis, of the matrix that is
    represented, ``D' = U_B^2 D (U_A^2)^T`` with the squared entries of ``U = Q'^T Q``. One-hot inputs keep the unit basis, and
    so do sides that are too wide, unless ``wide_sides="blocks"`` gives each of their blocks a basis: see `Kron`.

    Reference: George et al., NeurIPS 2018, arXiv:1806.03884, section 3 and algorithm 1 (running averages). The authors' code
    starts again from ``b a^T`` with every basis, so that with short intervals little more than `Kron` is left.
    """

    takes: ClassVar[frozenset[Kind]] = kinds(Outer, (Outer, "inputs"))

    sharing: Literal["expand", "reduce"] = "expand"
    wide_sides: Literal["diagonal", "blocks"] = "diagonal"

    def __post_init__(self) -> None:
        self._kron()

    def _kron(self) -> Kron:
        return Kron(sharing=self.sharing, wide_sides=self.wide_sides)

    @property
    def grain(self) -> Grain:
        return "layer"

    @property
    def groups(self) -> bool:
        return self.sharing == "reduce"

    @property
    def renewal(self) -> Renewal:
        """``D`` changes with every measurement."""
        return "measurement"

    def long_axes(self, shape: tuple[int, ...], max_dim: int) -> frozenset[int]:
        """The long axes of `Kron`."""
        return self._kron().long_axes(shape, max_dim)

    def slow(self, state: State) -> frozenset[str]:
        """The bases."""
        return frozenset(f"basis_{side}" for side in SIDES).intersection(state)

    def init(self, frame: Frame) -> State:
        state = self._kron().init(frame)
        for axis, side in enumerate(SIDES):
            if axis not in frame.diagonal:
                state[f"basis_{side}"] = identity(state[side]).expand(frame.stack, -1, -1).contiguous()
        return {**state, "moments": frame.zeros(*frame.shape), "mass": frame.zeros(), "predicted": frame.zeros()}

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        assert isinstance(evidence, Outer)
        if fold.begins and not fold.first:
            self._begin_step(state, fold)
        if not fold.postponed:
            self.fold(state, evidence, fold, at_once)
        inputs_alone = evidence.kind == "inputs"  # as in `Kron`
        state["moments"].mul_(fold.beta)
        if inputs_alone:
            fold.weigh_mean_(state["mass"], evidence.counted)
        else:
            fold.weigh_(state["mass"])
        if fold.first:
            for side in SIDES:
                self._renew_basis(state, side)
            state["predicted"].fill_(1)
        if fold.first or inputs_alone:  # `I (x) A` is given by the factors, in any basis
            self._predict(state)
        else:
            state["moments"].add_(rotated_squares(evidence, *_bases(state)), alpha=fold.alpha)

    def fold(self, state: State, evidence: Evidence | FactoredGradient, fold: Fold, write: Writer) -> None:
        """Fold evidence into the factors."""
        self._kron().fold(state, evidence, fold, write)

    def last(self, state: State, evidence: Evidence | FactoredGradient, fold: Fold) -> frozenset[str]:
        """The factors, unless the moments are predicted by them."""
        at_once = fold.first or not isinstance(evidence, Outer) or evidence.kind == "inputs"
        return frozenset() if at_once else frozenset(SIDES).union(f"{side}_mass" for side in SIDES)

    def _begin_step(self, state: State, fold: Fold) -> None:
        """Before the first evidence of a step: drop the prediction of the first step, and refresh the basis where due."""
        if not fold.summed:  # a sum would lack that step
            kept = 1 - state["predicted"]
            state["moments"].mul_(kept.view(-1, 1, 1))
            state["mass"].mul_(kept)
            state["predicted"].zero_()
        if fold.refresh:
            self.refresh(state)

    def refresh(self, state: State) -> None:
        for axis, side in enumerate(SIDES):
            overlap = self._renew_basis(state, side)
            if overlap is not None:
                state["moments"].copy_(apply_factors([*[None] * axis, overlap], state["moments"]))

    def _renew_basis(self, state: State, side: str) -> Tensor | None:
        """Recompute a basis.  Returns the squared entries of ``Q'^T Q``, in the form of ``Q``; None for the unit basis."""
        Q = state.get(f"basis_{side}")
        if Q is None:
            return None
        F = average(state[side], state[f"{side}_mass"])
        non_finite = [0 * block.sum((-2, -1), keepdim=True) for _, block in blocks(F)]  # in D too, for the solver to count
        new = [_eigenvectors(block, basis) for (_, block), (_, basis) in zip(blocks(F), blocks(Q), strict=True)]
        del F  # before the overlaps are formed
        squares = torch.empty_like(Q) if not is_tiled(Q) else torch.zeros_like(Q)
        for own, (_, basis), (_, overlap), lost in zip(new, blocks(Q), blocks(squares), non_finite, strict=True):
            torch.bmm(own.mT, basis, out=overlap).square_().add_(lost)
            basis.copy_(own)
        return squares

    def _predict(self, state: State) -> None:
        """Set ``D = b a^T``, the moments that the factors alone predict."""
        found = zip(self._kron().factors(state), _bases(state), strict=True)
        left, right = ((F if Q is None else rayleigh(F, Q)).clamp(min=0) for F, Q in found)
        state["moments"].copy_(left.unsqueeze(-1) * right.unsqueeze(-2) * state["mass"].view(-1, 1, 1))

    def to_dense(self, state: State) -> Tensor:
        eye = torch.eye(state["moments"][0].numel(), dtype=state["moments"].dtype, device=state["moments"].device)
        columns = eye.reshape(-1, *state["moments"].shape[1:])
        return torch.stack([self.matvec(state, v.expand_as(state["moments"])).flatten(1) for v in columns], -1)

    def matvec(self, state: State, v: Tensor) -> Tensor:
        bases = self.bases(state)
        rotated = apply_factors([None if Q is None else transpose(Q) for Q in bases], v)
        return apply_factors(bases, rotated * self.spectrum(state))

    # ---------------------------------------------------------------- Rotated: rows, then columns
    def bases(self, state: State) -> list[Tensor | None]:
        """``Q_B, Q_A``; None for a side that keeps the unit basis.  # (B, o, o), (B, i, i)"""
        return _bases(state)

    def spectrum(self, state: State) -> Tensor:
        """``D``, bias-corrected.  # (B, o, i)"""
        return average(state["moments"], state["mass"])

    def unfold(self, g: Tensor) -> Tensor:
        """The gradient itself.  # (B, o, i)"""
        return g


def _bases(state: State) -> list[Tensor | None]:
    return [state.get(f"basis_{side}") for side in SIDES]


def _eigenvectors(F: Tensor, before: Tensor) -> Tensor:
    """An eigenbasis of each factor; ``before`` where the decomposition fails.  # (B, d, d)"""
    finite = finite_members(F)
    try:
        Q = eigh(F if none_of(~finite) else torch.where(finite[:, None, None], F, 0.0))[1]
    except RuntimeError:  # LAPACK and cuSOLVER may raise on finite input: pytorch#94772, #105359
        return before.clone()
    kept = finite & finite_members(Q)
    return Q if none_of(~kept) else torch.where(kept[:, None, None], Q, before)


def rotated_squares(evidence: Outer, left: Tensor | None, right: Tensor | None) -> Tensor:
    """``sum_N (left^T J_N right)^2`` by the cheaper of two ways, in pieces that bound the memory.

    With one position the square of an outer product is the product of squares. With ``R`` positions either the ``k n`` rows are
    formed, or ``sum_rs (g_r * g_s)(a_r * a_s)^T`` is contracted over the ``n R^2`` pairs of positions.

    # (B, o, i), or (B, i, o) when transposed
    """
    outer, inner = (right, left) if evidence.transposed else (left, right)
    rotated = _rotate_inputs(evidence, inner)
    if outer is not None:
        rotated = replace(rotated, gradients=turn(rotated.gradients.transpose(0, 1), outer).transpose(0, 1))
    k, _, _, R, _ = rotated.gradients.shape
    if isinstance(rotated.inputs, OneHot) or R == 1 or R >= k or rotated.bias:
        return rotated.squares()
    return _paired_squares(rotated.inputs, rotated.gradients, rotated.transposed)


def _paired_squares(a: Tensor, g: Tensor, transposed: bool) -> Tensor:
    """The same, contracted over pairs of positions.  # (G, n, R, i), (k, G, n, R, o)"""
    _, G, _, R, o = g.shape
    i = a.shape[-1]
    total = g.new_zeros(G, o, i)
    step = max(1, PIECE // (G * R * R * (o + i)))
    for own, x in zip(g.split(step, 2), a.split(step, 1), strict=True):
        g2 = torch.einsum("kgnro,kgnso->gnrso", own, own).reshape(G, -1, o)
        a2 = torch.einsum("gnri,gnsi->gnrsi", x, x).reshape(G, -1, i)
        total.baddbmm_(g2.mT, a2)
    return total.mT if transposed else total


def _rotate_inputs(evidence: Outer, Q: Tensor | None) -> Outer:
    """The inputs in a basis, with the one of the bias included."""
    if Q is None or isinstance(evidence.inputs, OneHot):
        return evidence
    rotated = turn(evidence.inputs, Q)
    if evidence.bias:
        rows, block = blocks(Q)[-1]
        rotated[..., rows] += block[:, -1].reshape(-1, 1, 1, block.shape[-1])
    return replace(evidence, inputs=rotated, bias=False)
