"""Stacking of the evidence and the gradients of the members of a block, and unstacking of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from math import prod
from types import MappingProxyType

import torch
from torch import Tensor

from gradmaker.capture.sites import Site
from gradmaker.curvature.evidence import WHOLE, Evidence, Gradient, Joint, Outer, Pair
from gradmaker.curvature.products import Factors
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.representations.base import Fold, Frame

__all__ = ["NO_ROWS", "STACK_LIMIT", "Members", "Piece", "picked", "placed", "runs", "stacked"]

STACK_LIMIT = 128
"""Blocks with a longer axis are not stacked, nor is evidence with more than ``STACK_LIMIT^2`` entries a member.

On one core of a CPU, 48 members together take 0.02 to 0.3 of the time of 48 calls at side 64 and below, 0.6 to 0.9 at 128 and
1.0 to 1.6 beyond; factors of 48 layers from 512 rows each, where operands are copied to be stacked, 0.5 at 16 k entries a
member and 0.6 to 1.4 beyond, with the memory of all operands at once.
"""


@dataclass(frozen=True)
class Piece:
    """Evidence of some members of a block."""

    names: tuple[str, ...]  # names of their sites
    slots: tuple[slice, ...]  # slice of the stack of each site
    evidence: Evidence

    @property
    def count(self) -> int:
        """The number of members."""
        return sum(slot.stop - slot.start for slot in self.slots)


NO_ROWS: Mapping[str, FactoredGradient] = MappingProxyType({})


# ------------------------------------------------------------------ parts of a stack
def run_of(slots: Sequence[slice]) -> slice | None:
    """Adjacent slices, in order, as one; None if there are gaps."""
    adjoin = all(a.stop == b.start for a, b in pairwise(slots))
    return slice(slots[0].start, slots[-1].stop) if adjoin else None


def runs(slots: Sequence[slice]) -> list[slice]:
    """The same members by as few slices: one where they are adjacent."""
    run = run_of(slots) if slots else None
    return list(slots) if run is None else [run]


def picked(state: Mapping[str, Tensor], slots: Sequence[slice]) -> dict[str, Tensor]:
    """Some members of a stack: views where they are adjacent, copies otherwise."""
    if (run := run_of(slots)) is not None:
        return {key: value[run] for key, value in state.items()}
    return {key: torch.cat([value[slot] for slot in slots]) for key, value in state.items()}


def placed(state: Mapping[str, Tensor], slots: Sequence[slice], part: Mapping[str, Tensor]) -> None:
    """Write what `picked` has copied back, in place."""
    if run_of(slots) is None:
        for key, value in part.items():
            pieces = value.split([slot.stop - slot.start for slot in slots])
            for slot, piece in zip(slots, pieces, strict=True):
                state[key][slot] = piece


# ------------------------------------------------------------------ stacking evidence
def stacked(pieces: Iterable[Piece], fold: Callable[[Piece], Fold]) -> Iterator[tuple[Piece, Fold]]:
    """The same evidence in as few pieces as possible: pieces of one fold have their operands stacked along the member axis.

    Large operands are not stacked, and are released before the next are formed.
    """
    waiting: dict[tuple[Fold, tuple[object, ...]], list[Piece]] = {}
    for piece in pieces:
        own, signature = fold(piece), _signature(piece.evidence)
        if signature is None:
            yield piece, own
        else:
            waiting.setdefault((own, signature), []).append(piece)
        del piece
    yield from ((_merged(group), own) for (own, _), group in waiting.items())


def _merged(group: list[Piece]) -> Piece:
    if len(group) == 1:
        return group[0]
    names, slots = (tuple(x for piece in group for x in getattr(piece, part)) for part in ("names", "slots"))
    return Piece(names, slots, _concatenated([piece.evidence for piece in group]))


def _operands(evidence: Evidence) -> dict[str, int]:
    """The tensors that have a member axis, with that axis; none for evidence that is never stacked."""
    if isinstance(evidence, Outer):
        return {"inputs": 0, "gradients": 1} if isinstance(evidence.inputs, Tensor) else {}
    if isinstance(evidence, Factors):
        return {"A": 0, "B": 0}
    if isinstance(evidence, Pair):
        return {"v": 0, "cv": 0}
    if isinstance(evidence, Gradient):
        return {f.name: 0 for f in fields(evidence) if isinstance(getattr(evidence, f.name), Tensor)}
    return {}


def _signature(evidence: Evidence) -> tuple[object, ...] | None:
    """What has to be equal in evidence that is stacked; None for evidence that is not."""
    axes = _operands(evidence)
    operands = {name: getattr(evidence, name) for name in axes}
    if not axes or sum(x.numel() // max(1, x.shape[axes[k]]) for k, x in operands.items()) > STACK_LIMIT**2:
        return None
    shapes = [(x.dtype, x.device, *x.shape[: axes[k]], -1, *x.shape[axes[k] + 1 :]) for k, x in operands.items()]
    shared = (value for name, value in vars(evidence).items() if name not in axes)
    return type(evidence), *shapes, *(id(x) if isinstance(x, Tensor) else x for x in shared)


def _concatenated(evidence: Sequence[Evidence]) -> Evidence:
    axes = _operands(evidence[0])
    operands = {name: torch.cat([getattr(e, name) for e in evidence], axis) for name, axis in axes.items()}
    return replace(evidence[0], **operands)  # type: ignore[type-var]


# ------------------------------------------------------------------ the members of a block
@dataclass(frozen=True)
class Members:
    """The sites of a block, and their slices of its stack."""

    sites: list[Site]
    slots: list[slice]
    frame: Frame
    full: bool  # all sites are one block
    joins_groups: bool  # the groups of a layer are one block

    # ---------------------------------------------------------------- evidence
    def evidence(self, chunk: Mapping[str, Evidence]) -> Iterator[Piece]:
        """The evidence of a chunk: a piece for each site, or one for all of them."""
        names = tuple(s.name for s in self.sites if s.name in chunk)
        if self.full:
            if WHOLE in chunk:
                yield Piece(names or tuple(s.name for s in self.sites), (slice(0, 1),), chunk[WHOLE])
            elif names:
                yield Piece(names, (slice(0, 1),), self._joined(chunk))
            return
        for site, slot in zip(self.sites, self.slots, strict=True):
            if site.name in chunk:
                yield Piece((site.name,), (slot,), self._of_block(chunk[site.name]))

    def stacks(self, chunk: Mapping[str, Evidence], fold: Callable[[Piece], Fold]) -> Iterator[tuple[Piece, Fold]]:
        """`evidence` in as few pieces as possible, with how each enters the statistic."""
        pieces = self.evidence(chunk)
        alone = self.full or len(self.sites) == 1
        if alone or self.joins_groups:  # rows of the groups of a layer have no axis left for members
            yield from ((piece, fold(piece)) for piece in pieces)
        else:
            yield from stacked(pieces, fold)

    def _of_block(self, evidence: Evidence) -> Evidence:
        """Evidence of the groups of a layer, as one block where they are one.  # (G, o, i) -> (1, G, o, i)"""
        if not self.joins_groups:
            return evidence
        if isinstance(evidence, Gradient):
            return replace(evidence, gradient=evidence.gradient.unsqueeze(0))
        if isinstance(evidence, Pair):
            return replace(evidence, v=evidence.v.unsqueeze(0), cv=evidence.cv.unsqueeze(0))
        return evidence  # rows and products are of the whole layer already

    def _joined(self, chunk: Mapping[str, Evidence]) -> Evidence:
        """All layers as one piece of evidence; a layer without evidence contributes zeros."""
        known = [chunk.get(s.name) for s in self.sites]
        like = next(e for e in known if e is not None)
        if isinstance(like, Gradient):
            return replace(like, gradient=self._flat([e.gradient if isinstance(e, Gradient) else None for e in known]))
        if isinstance(like, Pair):
            pairs = [e if isinstance(e, Pair) else None for e in known]
            v, cv = ([None if e is None else getattr(e, part) for e in pairs] for part in ("v", "cv"))
            return replace(like, v=self._flat(v), cv=self._flat(cv))
        assert isinstance(like, Outer)
        k, _, n = like.gradients.shape[:3]
        return Joint(
            tuple(e if isinstance(e, Outer) else self._zero_rows(s, k, n) for s, e in zip(self.sites, known, strict=True))
        )

    def _flat(self, pieces: Sequence[Tensor | None]) -> Tensor:
        """The concatenated tensors of all sites, zeros where there is none.  # (1, P)"""
        full = [self._zeros(s) if x is None else x.reshape(-1) for s, x in zip(self.sites, pieces, strict=True)]
        return torch.cat(full).unsqueeze(0)

    def _zeros(self, site: Site) -> Tensor:
        return torch.zeros(prod(site.shape), dtype=self.frame.dtype, device=self.frame.device)

    def _zero_rows(self, site: Site, k: int, n: int) -> Outer:
        empty = torch.zeros(1, n, 1, 0, dtype=self.frame.dtype, device=self.frame.device)
        return Outer(empty, empty.new_zeros(k, 1, n, 1, prod(site.shape)), bias=True)

    # ---------------------------------------------------------------- gradients
    def read(self, rows: Mapping[str, FactoredGradient] = NO_ROWS) -> Tensor | None:
        """The gradients of all sites, zeros where there is none; None if there is none at all.  # (B, *shape)

        rows: gradients of sites of one block that are held by rows, where they are not in ``.grad``
        """
        if not any(site.name in rows or site.has_gradient for site in self.sites):
            return None
        if self.full:
            found = [
                site.read() if site.has_gradient or site.name not in rows else rows[site.name].form() for site in self.sites
            ]
            return self._flat([None if g is None else g.to(self.frame.dtype) for g in found])
        pieces = [[self._as_blocks(piece) for piece in site.pieces()] for site in self.sites]
        if len(pieces) == 1:
            return _cat(pieces[0], -1).to(self.frame.dtype)
        if all(len(row) == 1 for row in pieces):
            return _cat([piece for (piece,) in pieces], 0).to(self.frame.dtype)
        out = self.frame.empty(*self.frame.shape)
        targets = [out[t].split([x.shape[-1] for x in row], -1) for t, row in zip(self.slots, pieces, strict=True)]
        torch._foreach_copy_([x for row in targets for x in row], [x for row in pieces for x in row])
        return out

    def _as_blocks(self, piece: Tensor) -> Tensor:
        """Some columns of a site, split by block.  # (B, ..., columns)"""
        shape = self.frame.shape
        return piece.reshape(-1, *shape[:-1], piece.shape[-1]) if shape else piece.reshape(-1)


def _cat(tensors: Sequence[Tensor], axis: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), axis)
