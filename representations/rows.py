"""The evidence itself as a representation: inputs and output gradients of the last batch, multiplied out only where cheaper.

Axes as in `gradmaker.curvature.evidence`; ``G = B H``: groups in a block's stack. State of layer ``j`` in chunk ``p`` of a
step's evidence, each tensor with ``B`` first:

- ``p.j.gradients``: (B, H, k, n, r, o);
- ``p.j.inputs``: (B, H, n, r, i), or the indices (B, 1, n, r) that stand for one-hot inputs;
- ``p.j.layout``: no elements; its shape is (B, H, rows, columns, bias, transposed, 0) with ``bias``, ``transposed`` 0 or 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Evidence, Joint, OneHot, Outer
from gradmaker.options.checks import check_choice, check_count
from gradmaker.representations.base import NEWEST_ALONE, NO_LIMIT, Fold, Frame, Grain, State
from gradmaker.representations.low_rank import Spanned

__all__ = ["Part", "Rows", "chunks"]


@dataclass(frozen=True)
class Part:
    """A layer's share of some rows: ``J_kn = sum_r g_knr [a_nr 1]^T``, or its transpose, for ``G`` groups."""

    gradients: Tensor  # (G, k, n, r, o)
    inputs: Tensor  # (G, n, r, i), or indices (1, n, r)
    layout: torch.Size  # (B, H, rows, columns, bias, transposed, 0)

    @property
    def count(self) -> int:
        """Number of rows ``N``."""
        return self.gradients.shape[1] * self.gradients.shape[2]

    @property
    def bias(self) -> bool:
        """Whether a one is appended to every input."""
        return bool(self.layout[4])

    @property
    def transposed(self) -> bool:
        """Whether a block is laid out as (i, o)."""
        return bool(self.layout[5])

    @property
    def lookup(self) -> bool:
        """Whether the inputs are one-hot."""
        return self.inputs.ndim == 3

    @property
    def size(self) -> int:
        """Entries of a row, in one member of the stack."""
        return self.layout[1] * self.layout[2] * self.layout[3]

    def gram(self, other: Part) -> Tensor:
        """``J J'^T`` of two chunks of one layer, by whichever of two ways takes less memory.  # (B, N, N')"""
        flat = self.gradients.flatten(1, 3), other.gradients.flatten(1, 3)
        formed = self.layout[2] * self.layout[3] * (self.count + other.count)
        if self.layout != other.layout or flat[0].shape[1] * flat[1].shape[1] > formed:  # a silent layer is laid out flat
            J = self.rows()
            return J @ (J if other is self else other.rows()).mT
        (G, k, n, r, _), (_, h, m, s, _) = self.gradients.shape, other.gradients.shape
        products = (flat[0] @ flat[1].mT).view(G, k, n, r, h, m, s)
        products.mul_(self._input_products(other).view(G, 1, n, r, 1, m, s))
        return products.sum((3, 6)).view(*self.layout[:2], k * n, h * m).sum(1)

    def _input_products(self, other: Part) -> Tensor:
        """``a . a'``, with the bias.  # (G, nr, ms)"""
        if self.lookup:
            same = self.inputs.flatten(1).unsqueeze(2) == other.inputs.flatten(1).unsqueeze(1)
            return same.to(self.gradients.dtype)
        products = self.inputs.flatten(1, 2) @ other.inputs.flatten(1, 2).mT
        return products.add_(1) if self.bias else products

    def rows(self) -> Tensor:
        """``J``, formed.  # (B, N, P)"""
        a = self.inputs
        if self.lookup:
            a = torch.nn.functional.one_hot(a.long(), self.layout[2 if self.transposed else 3]).to(self.gradients.dtype)
        if self.bias:
            a = torch.cat([a, torch.ones_like(self.gradients[:, 0, :, :, :1])], -1)
        J = torch.einsum("gknro,gnri->gknoi", self.gradients, a)
        J = (J.mT if self.transposed else J).flatten(1, 2).flatten(2)  # (G, N, o i)
        out: Tensor = J.unflatten(0, self.layout[:2]).transpose(1, 2).flatten(2)
        return out

    def project(self, v: Tensor) -> Tensor:
        """``J v``.  # (B, H, rows, columns) -> (B, N)"""
        v = v.flatten(0, 1).mT if self.transposed else v.flatten(0, 1)
        i = v.shape[-1] - self.bias
        if self.lookup:
            moved = v[0].mT[self.inputs.long()]  # (1, n, r, o)
        else:
            moved = (self.inputs.flatten(1, 2) @ v[..., :i].mT).unflatten(1, self.inputs.shape[1:3])
        if self.bias:
            moved = moved + v[:, None, None, :, i]
        products: Tensor = torch.einsum("gknro,gnro->gkn", self.gradients, moved).flatten(1)
        return products.view(*self.layout[:2], -1).sum(1)

    def combine(self, z: Tensor) -> Tensor:
        """``J^T z``.  # (B, N) -> (B, H, rows, columns)"""
        G, k, n, r, o = self.gradients.shape
        z = z.unsqueeze(1).expand(-1, self.layout[1], -1).reshape(G, k, n)
        weighted = torch.einsum("gknro,gkn->gnro", self.gradients, z)
        if self.lookup:
            out = weighted.new_zeros(1, self.layout[2 if self.transposed else 3], o)
            out.index_add_(1, self.inputs.long().flatten(), weighted.flatten(1, 2))
            return (out if self.transposed else out.mT).reshape(self.layout[:4])
        out = weighted.flatten(1, 2).mT @ self.inputs.flatten(1, 2)
        if self.bias:
            out = torch.cat([out, weighted.sum((1, 2)).unsqueeze(-1)], -1)
        return (out.mT if self.transposed else out).reshape(self.layout[:4])


@dataclass(frozen=True)
class Rows(Spanned):
    """All rows of the latest step: ``C = sum_N vec(J_N) vec(J_N)^T`` exactly, as the evidence that it came as.

    A running average would add rows without bound, so that ``decay`` does not apply: what came before is dropped. ``full``
    couples all layers, ``layer`` takes each by itself, with all groups of a convolution and all channels of a norm layer.

    Reference: Ren & Goldfarb 2019, arXiv:1906.02353, section 3.
    """

    takes: ClassVar[tuple[type[Evidence], ...]] = (Outer, Joint)
    whole_layers: ClassVar[bool] = True
    inapplicable = NEWEST_ALONE | NO_LIMIT

    granularity: Literal["full", "layer"] = "full"
    max_rows: int = 8192
    """More rows than this are refused: a system of that size is solved, in double precision."""

    def __post_init__(self) -> None:
        check_choice("granularity", self.granularity, ("full", "layer"))
        check_count("max_rows", self.max_rows, 1)

    @property
    def grain(self) -> Grain:
        return self.granularity

    def init(self, frame: Frame) -> State:
        G, o, i = frame.shape if len(frame.shape) == 3 else (1, *frame.shape, 1)[:3]
        empty = Outer(frame.zeros(G, 0, 1, i - 1)[0], frame.zeros(G, 0, 1, o), bias=True)
        return {"mass": frame.zeros(), **self.lay(empty, 1.0, "0.0")}

    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        parts = evidence.parts if isinstance(evidence, Joint) else (evidence,)
        mass = state["mass"].clone()
        if fold.mass:  # the first evidence of a step
            state.clear()
            mass.zero_()
        fold.weigh_(mass)
        state["mass"] = mass
        chunk = len(chunks(state))
        for j, part in enumerate(parts):
            assert isinstance(part, Outer)
            new = self.lay(part, fold.alpha, f"{chunk}.{j}")
            last = f"{chunk - 1}.{j}.gradients"
            if self.merges(parts) and last in state:
                state[last] = torch.cat([state[last], new[f"{chunk}.{j}.gradients"]], 2)
            else:
                state.update(new)
        self._check_count(state)

    def merges(self, parts: Sequence[Evidence]) -> bool:
        """Whether these are further cotangents for the inputs of the chunk before."""
        return any(isinstance(part, Outer) and not part.fresh for part in parts)

    def _check_count(self, state: State) -> None:
        count = sum(parts[0].count for parts in chunks(state))
        if count > self.max_rows:
            raise ValueError(
                f"{type(self).__name__} would hold {count} rows (examples x cotangents), over max_rows={self.max_rows}: "
                "raise it, use a smaller batch, or a curvature with fewer rows an example, as FisherMC(samples=1) or FisherEmp"
            )

    def lay(self, part: Outer, alpha: float, name: str) -> State:
        """The state of a layer in a chunk of the evidence, which counts ``alpha``."""
        g = part.gradients.movedim(1, 0)
        g = g if alpha == 1.0 else g * alpha**0.5
        a = part.inputs.index.unsqueeze(0) if isinstance(part.inputs, OneHot) else part.inputs
        i = part.inputs.size if isinstance(part.inputs, OneHot) else part.inputs.shape[-1] + part.bias
        G, o = len(g), g.shape[-1]
        shape = (i, o) if part.transposed else (o, i)
        return {
            f"{name}.gradients": g.contiguous().unsqueeze(0),
            f"{name}.inputs": a.contiguous().unsqueeze(0),
            f"{name}.layout": g.new_empty(1, G, *shape, int(part.bias), int(part.transposed), 0),
        }

    # ---------------------------------------------------------------- LowRank
    def gram(self, state: State) -> Tensor:
        held = self.sketched(state)
        blocks = []
        for p, one in enumerate(held):  # the Gram matrices of the layers add
            lower = [torch.stack([x.gram(y) for x, y in zip(one, other, strict=True)]).sum(0) for other in held[: p + 1]]
            blocks.append(lower)
        whole = [[blocks[p][q] if q <= p else blocks[q][p].mT for q in range(len(held))] for p in range(len(held))]
        return torch.cat([torch.cat(row, 2) for row in whole], 1) / _positive(state["mass"])[:, None, None]

    def project(self, state: State, v: Tensor) -> Tensor:
        out = []
        for parts, whole in zip(self.sketched(state), chunks(state), strict=True):
            pieces = self.pick(state, whole, self._split(whole, v.to(whole[0].gradients.dtype)))
            out.append(torch.stack([x.project(u) for x, u in zip(parts, pieces, strict=True)]).sum(0))
        return torch.cat(out, 1) / _positive(state["mass"]).sqrt().unsqueeze(1)

    def combine(self, state: State, z: Tensor) -> Tensor:
        held = chunks(state)
        z = (z / _positive(state["mass"]).sqrt().unsqueeze(1)).to(held[0][0].gradients.dtype)
        pieces = z.split([parts[0].count for parts in held], 1)
        sums = [torch.cat([x.combine(y).flatten(1) for x in parts], 1) for parts, y in zip(held, pieces, strict=True)]
        out = torch.stack(sums).sum(0) if len(sums) > 1 else sums[0]
        groups = held[0][0].layout[1]
        return out if self.granularity == "full" else out.unflatten(1, held[0][0].layout[1 if groups > 1 else 2 : 4])

    def _split(self, parts: Sequence[Part], v: Tensor) -> list[Tensor]:
        """A block's vector, layer by layer.  # (B, *shape) -> each (B, H, rows, columns)"""
        pieces = v.flatten(1).split([part.size for part in parts], 1)
        return [u.reshape(part.layout[:4]) for part, u in zip(parts, pieces, strict=True)]

    # ---------------------------------------------------------------- what a sketch changes
    def sketched(self, state: State) -> list[list[Part]]:
        """The rows as the Gram matrix and projections see them."""
        return chunks(state)

    def pick(self, state: State, parts: Sequence[Part], pieces: list[Tensor]) -> list[Tensor]:
        """Vectors as these rows see them."""
        return pieces


def _positive(mass: Tensor) -> Tensor:
    return torch.where(mass > 0, mass, 1.0)


def chunks(state: State) -> list[list[Part]]:
    """The parts of every chunk, layer by layer."""
    found: list[list[Part]] = []
    while f"{len(found)}.0.layout" in state:
        p, parts = len(found), list[Part]()
        while (name := f"{p}.{len(parts)}.") + "layout" in state:
            g, a = (state[name + key].flatten(0, 1) for key in ("gradients", "inputs"))
            parts.append(Part(g, a, state[name + "layout"].shape))
        found.append(parts)
    return found
