"""Low-rank curvature ``C = J^T J``: the shared base of its forms, and rows from a stream of gradients.

A state holds ``c`` rows. Its tensors are replaced, never written to, so that a solver's cache may share them. The rows are held
in pieces: a step replaces only the newest piece, and an old one is dropped when its last row has left the window.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Evidence, Gradient
from gradmaker.curvature.evidence_kinds import Kind, kinds
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.state import State
from gradmaker.options.checks import check_choice, check_count
from gradmaker.representations.base import NO_LIMIT, Fold, Frame, Grain
from gradmaker.representations.capabilities import LowRank
from gradmaker.representations.roles import Compact, SpansGradient, Unstacked, WholeLayers

__all__ = ["Spanned", "Truncated", "Window", "form_rows"]

PIECE = 32
"""Most rows of a stream in one tensor: a window holds at most two pieces more than its size; two products for each."""

ENTRIES = 1 << 18
"""Entries of a piece, of at least one row: a step copies the newest one to add its row."""

COLUMNS = 1 << 16
"""Entries that are converted to double precision at once, so that they stay in a cache."""


def form_rows(representation: LowRank, state: State) -> Tensor:
    """``J`` as a matrix, row by row by ``J^T e_n``: for oracles.  # (B, N, P)"""
    K = representation.gram(state)
    eye = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device).expand_as(K)
    nothing = representation.combine(state, torch.zeros_like(K[..., 0])).flatten(1)
    rows = [representation.combine(state, eye[:, n]).flatten(1) for n in range(K.shape[-1])]
    return torch.stack(rows, 1) if rows else nothing.unsqueeze(1)[:, :0]


class Spanned(Unstacked, Compact):
    """``C = J^T J`` given by the three products of `LowRank`."""

    inapplicable = NO_LIMIT

    def duplicate(self, state: State) -> State:
        """The same tensors: they are replaced, never written to."""
        return dict(state)

    @abstractmethod
    def gram(self, state: State) -> Tensor:
        """``J J^T``.  # (B, N, N)"""

    @abstractmethod
    def project(self, state: State, v: Tensor) -> Tensor:
        """``J v``.  # (B, *shape) -> (B, N)"""

    @abstractmethod
    def combine(self, state: State, z: Tensor) -> Tensor:
        """``J^T z``.  # (B, N) -> (B, *shape)"""

    def to_dense(self, state: State) -> Tensor:
        J = form_rows(self, state)
        return J.mT @ J

    def matvec(self, state: State, v: Tensor) -> Tensor:
        return self.combine(state, self.project(state, v)).to(v.dtype)


class _Stream(Spanned, WholeLayers, SpansGradient):
    """Gradients ``r_j`` of past steps, oldest first: ``C = sum_j w_j r_j r_j^T``; each step adds a row to the Gram matrix."""

    takes: ClassVar[frozenset[Kind]] = kinds(Gradient)

    def init(self, frame: Frame) -> State:
        rows, gram = frame.zeros(0, *frame.shape), frame.zeros(0, 0).double()
        return {"rows.0": rows, "gram": gram, "weights": frame.zeros(0), "mass": frame.zeros()}

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        assert isinstance(evidence, Gradient)
        pieces, gram, weights = self.make_room(_pieces(state), state["gram"], state["weights"])
        new = evidence.gradient.reshape(pieces[0].shape[0], 1, *pieces[0].shape[2:])
        last = pieces.pop()
        full = min(PIECE, max(1, ENTRIES // max(1, new[0].numel())))
        pieces += [last, new.clone()] if last.shape[1] >= full else [torch.cat([last, new], 1)]  # new may be .grad itself
        cross = _inner(pieces, new)  # (B, c, 1)
        for k in range(len(_pieces(state))):
            del state[f"rows.{k}"]
        state.update({f"rows.{k}": rows for k, rows in enumerate(pieces)})
        state["gram"] = torch.cat([torch.cat([gram, cross[:, :-1]], 2), cross.mT], 1)
        state["weights"] = torch.cat([weights * fold.beta, weights.new_ones(len(weights), 1)], 1)
        mass = state["mass"]
        state["mass"] = torch.ones_like(mass) if fold.summed else mass * fold.beta + 1

    @abstractmethod
    def make_room(self, pieces: list[Tensor], gram: Tensor, weights: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """The pieces, Gram matrix and weights with fewer rows, where one more would be too many."""

    @abstractmethod
    def shares(self, state: State) -> Tensor:
        """The weights ``w`` of the rows.  # (B, c)"""

    def gram(self, state: State) -> Tensor:
        root = self.shares(state).to(state["gram"].dtype).sqrt()
        return state["gram"] * root.unsqueeze(-1) * root.unsqueeze(-2)

    def project(self, state: State, v: Tensor) -> Tensor:
        pieces = _pieces(state)
        vector = v.to(pieces[0].dtype).reshape(len(v), -1, 1)
        return self.shares(state).sqrt() * torch.cat([_vectors(rows) @ vector for rows in pieces], 1).squeeze(-1)

    def combine(self, state: State, z: Tensor) -> Tensor:
        pieces = _pieces(state)
        weighted = (self.shares(state).sqrt() * z.to(pieces[0].dtype)).unsqueeze(1).split([x.shape[1] for x in pieces], 2)
        total: Tensor = weighted[0] @ _vectors(pieces[0])
        for share, rows in zip(weighted[1:], pieces[1:], strict=True):
            total = torch.baddbmm(total, share, _vectors(rows))
        return total.reshape(len(total), *pieces[0].shape[2:])

    def own(self, state: State) -> Tensor | None:
        """The newest row is the gradient of the step."""
        shares = self.shares(state)
        y = torch.zeros_like(shares)
        y[:, -1:] = shares[:, -1:].rsqrt()
        return y

    def weighted(self, state: State, z: Tensor) -> Tensor:
        return self.combine(state, z)

    def project_rows(self, state: State, rows: FactoredGradient) -> None:
        return None


def _pieces(state: State) -> list[Tensor]:
    """The rows, oldest first.  # each (B, up to PIECE, *shape)"""
    return [state[f"rows.{k}"] for k in range(sum(name.startswith("rows.") for name in state))]


def _vectors(rows: Tensor) -> Tensor:
    """Rows of any shape, or of scalars, as vectors; their number may be zero.  # (B, c, *shape) -> (B, c, P)"""
    return rows.unsqueeze(-1).flatten(2)


def _inner(pieces: Sequence[Tensor], y: Tensor) -> Tensor:
    """Inner products in double precision, over a slice of the columns at a time.

    A Gram matrix has the squares of the rows' singular values: single precision would lose those below 3e-4 of the
    largest.  # each (B, c, *shape), (B, d, *shape) -> (B, sum c, d)
    """
    rows = [_vectors(piece) for piece in pieces]
    out = [x.new_zeros(x.shape[0], x.shape[1], y.shape[1], dtype=torch.float64) for x in rows]
    width = max(1, COLUMNS // max(1, *(x.shape[0] * x.shape[1] for x in rows), y.shape[0] * y.shape[1]))
    for start in range(0, rows[0].shape[2], width):
        columns = slice(start, start + width)
        b = _vectors(y)[..., columns].double().mT
        for total, x in zip(out, rows, strict=True):
            total.baddbmm_(x[..., columns].double(), b)
    return torch.cat(out, 1)


@dataclass(frozen=True)
class Window(_Stream):
    """The last ``size`` mini-batch gradients: ``C = (1/z) sum_j beta^age_j r_j r_j^T`` with ``beta`` the decay (None: 1).

    ``scale`` is ``z``: ``size`` divides by the size even before the window is full, as M-FAC does, ``mean`` by the sum of the
    weights that are held, ``sum`` by one.

    Reference: Frantar, Kurtic & Alistarh, NeurIPS 2021, arXiv:2107.03356, section 3.2; Agarwal et al., ICML 2019,
    arXiv:1806.02958, section 2.
    """

    size: int = 128
    granularity: Literal["full", "layer"] = "full"
    scale: Literal["size", "mean", "sum"] = "size"

    def __post_init__(self) -> None:
        check_count("size", self.size, 1)
        check_choice("granularity", self.granularity, ("full", "layer"))
        check_choice("scale", self.scale, ("size", "mean", "sum"))

    @property
    def grain(self) -> Grain:
        return self.granularity

    def make_room(self, pieces: list[Tensor], gram: Tensor, weights: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        start = over = max(0, weights.shape[1] - self.size + 1)
        while over and pieces[0].shape[1] <= over and len(pieces) > 1:
            over -= pieces[0].shape[1]
            pieces = pieces[1:]
        return [pieces[0][:, over:], *pieces[1:]], gram[:, start:, start:], weights[:, start:]

    def shares(self, state: State) -> Tensor:
        weights = state["weights"]
        if self.scale == "size":
            return weights / self.size
        return weights / weights.sum(1, keepdim=True) if self.scale == "mean" else weights


@dataclass(frozen=True)
class Truncated(_Stream):
    """The running average of ``g_t g_t^T``, truncated to its ``rank`` largest eigenpairs after every ``window`` more gradients.

    ``X^T X = sum_t w_t g_t g_t^T`` is replaced by ``U^T U`` with ``U = Q_k^T X``, where ``X X^T = Q D Q^T``: its best
    approximation of rank ``k``. Between truncations it is exact.

    Reference: Le Roux, Manzagol & Bengio, NeurIPS 2007, "Topmoumoute online natural gradient", section 4.
    """

    rank: int = 10
    window: int = 50
    granularity: Literal["full", "layer", "unit"] = "full"

    def __post_init__(self) -> None:
        for name in ("rank", "window"):
            check_count(name, getattr(self, name), 1)
        check_choice("granularity", self.granularity, ("full", "layer", "unit"))

    @property
    def grain(self) -> Grain:
        return self.granularity

    def make_room(self, pieces: list[Tensor], gram: Tensor, weights: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        if weights.shape[1] < self.rank + self.window:
            return pieces, gram, weights
        rows = torch.cat(pieces, 1)
        X = weights.sqrt().unsqueeze(-1) * _vectors(rows)
        s, Q = torch.linalg.eigh(_inner([X], X))  # formed anew: the held one has accumulated rounding errors
        U = (Q[..., -self.rank :].mT.to(X.dtype) @ X).reshape(rows.shape[0], self.rank, *rows.shape[2:])
        return [U], torch.diag_embed(s[..., -self.rank :].clamp(min=0)), torch.ones_like(weights[:, : self.rank])

    def shares(self, state: State) -> Tensor:
        mass = state["mass"]
        return state["weights"] / torch.where(mass > 0, mass, 1.0).unsqueeze(-1)
