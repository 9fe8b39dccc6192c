"""Owners of refreshes: a pure function of sizes, so that every rank computes the same answer without asking the others.

A block is cut no further than balance needs: into runs of members, the matrices of a member, the diagonal blocks of a matrix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import heapify, heapreplace
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

from gradmaker.options.checks import check_count

__all__ = ["Assignment", "BlockWork", "Matrix", "Piece", "assign"]

FINE = 4
"""A piece that costs more than the mean over ranks divided by this is cut, so that a rank has at most 1 + 1 / FINE means."""


@dataclass(frozen=True)
class Matrix:
    """A square matrix of a member, of which diagonal blocks of some width are held; its diagonal, with a width of 1."""

    name: str
    side: int
    width: int

    @property
    def tiles(self) -> list[int]:
        """Widths of the diagonal blocks; a diagonal counts as one piece."""
        if self.width == 1:
            return [self.side]
        whole, rest = divmod(self.side, self.width)
        return [self.width] * whole + [rest] * bool(rest)

    @property
    def cubes(self) -> int:
        """``sum w^3`` over the diagonal blocks, to which the cost of a refresh is proportional; zero of a diagonal."""
        return 0 if self.width == 1 else sum(w**3 for w in self.tiles)

    @property
    def entries(self) -> int:
        """Entries of the diagonal blocks."""
        return self.side if self.width == 1 else sum(w**2 for w in self.tiles)


@dataclass(frozen=True)
class BlockWork:
    """The sizes of a block: a stack of equal members.

    cost: operations of a refresh of one member, in a whole number; bytes: what the owner of one member holds.
    matrices: what a refresh works on, one by one; empty where it takes a member as a whole.
    whole: whether not even the members can be refreshed apart.
    """

    name: str
    members: tuple[str, ...]
    cost: int
    bytes: int
    matrices: tuple[Matrix, ...] = ()
    whole: bool = False

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError(f"{self.name}: members=(): expected at least one")
        for name in ("cost", "bytes"):
            check_count(name, getattr(self, name), 0)

    def total(self, what: Literal["cost", "bytes"]) -> int:
        """That of all members; of a block that is refreshed as a whole it is given at once."""
        each: int = getattr(self, what)
        return each * (1 if self.whole else len(self.members))


@dataclass(frozen=True, order=True)
class Piece:
    """A part of a block that is refreshed by one rank: a run of members, a matrix of one member, or a diagonal block of that.

    path: index of the matrix, then that of its diagonal block
    """

    block: str
    start: int
    stop: int
    path: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sized:
    """A piece with its cost, its bytes, and the block that it is of."""

    piece: Piece
    cost: int
    bytes: int
    work: BlockWork

    def cut(self) -> list[Sized]:
        """What it falls into next: halves of a run, matrices, diagonal blocks; itself if it is one computation."""
        p, work = self.piece, self.work
        if work.whole:
            return [self]
        if (count := p.stop - p.start) > 1:
            halves = [(p.start, p.start + count // 2), (p.start + count // 2, p.stop)]
            return [self._run(*half) for half in halves]
        if not p.path and len(work.matrices) > 1:
            return self._parts([m.cubes for m in work.matrices], [m.entries for m in work.matrices])
        if not p.path and work.matrices:
            return replace(self, piece=replace(p, path=(0,))).cut()
        if len(p.path) == 1 and len(tiles := work.matrices[p.path[0]].tiles) > 1:
            return self._parts([w**3 for w in tiles], [w**2 for w in tiles])
        return [self]

    def _run(self, start: int, stop: int) -> Sized:
        work, count = self.work, stop - start
        return Sized(Piece(work.name, start, stop), work.cost * count, work.bytes * count, work)

    def _parts(self, costs: Sequence[int], sizes: Sequence[int]) -> list[Sized]:
        """The parts of one member."""
        p, found = self.piece, zip(_shares(self.cost, costs), _shares(self.bytes, sizes), strict=True)
        return [Sized(replace(p, path=(*p.path, j)), *each, self.work) for j, each in enumerate(found)]


def _shares(total: int, weights: Sequence[int]) -> list[int]:
    """A whole number in proportion to weights, without a rest: the last one that has a weight takes what rounding leaves."""
    every = sum(weights)
    if not every:
        return [total, *[0] * (len(weights) - 1)]
    made = [total * w // every for w in weights]
    made[max(j for j, w in enumerate(weights) if w)] += total - sum(made)
    return made


@dataclass(frozen=True)
class Assignment:
    """The owner of every piece, and what each rank then computes in a refresh of all, and holds."""

    world: int
    owners: Mapping[Piece, int]
    costs: tuple[int, ...]  # by rank
    bytes: tuple[int, ...]  # by rank
    largest: Sized | None  # the costliest piece
    bound: int  # the largest cost of a rank cannot be less

    @cached_property
    def balance(self) -> float:
        """The largest cost of a rank over the mean; 1 is perfect."""
        return max(self.costs) * self.world / total if (total := sum(self.costs)) else 1.0

    @cached_property
    def least(self) -> float:
        """The balance that no assignment of these pieces can be better than."""
        return max(1.0, self.bound * self.world / total) if (total := sum(self.costs)) else 1.0

    def why(self) -> str:
        """The piece that keeps the ranks from balance, since it cannot be cut; empty if none does."""
        if self.largest is None or self.least <= 1 + 1 / FINE:
            return ""
        piece, work = self.largest.piece, self.largest.work
        member = work.name if work.whole else work.members[piece.start]
        what = f"{work.matrices[piece.path[0]].name} of {member}" if piece.path else member
        return f"{what}, which cannot be cut, keeps {self.world} ranks at {self.least:.1f} times their mean"


def assign(blocks: Iterable[BlockWork], world: int) -> Assignment:
    """The owner of each piece: the costliest one first, each to the rank that has the least so far.

    Neither the order of the blocks nor the rank matters; ties go to the lower rank, and costs are integers. What costs nothing
    is dealt by bytes. The largest cost of a rank is at most ``4/3 - 1/(3 world)`` times the least possible of these pieces.

    Reference: Graham, SIAM J. Appl. Math. 17 (1969), theorem 2.
    """
    check_count("world", world, 1)
    works = sorted(blocks, key=lambda work: work.name)
    for one, other in pairwise(works):
        if one.name == other.name:
            raise ValueError(f"blocks: {one.name!r} is the name of two; expected distinct names")
    pieces = _pieces(works, world)
    owners, costs, sizes = dict[Piece, int](), [0] * world, [0] * world
    for key in ("cost", "bytes"):
        chosen = [p for p in pieces if bool(p.cost) == (key == "cost")]
        heap = [(load, rank) for rank, load in enumerate(costs if key == "cost" else sizes)]
        heapify(heap)
        for p in sorted(chosen, key=lambda p: (-getattr(p, key), p.piece)):
            load, rank = heap[0]
            heapreplace(heap, (load + getattr(p, key), rank))
            owners[p.piece] = rank
            costs[rank] += p.cost
            sizes[rank] += p.bytes
    in_order = MappingProxyType({p: owners[p] for p in sorted(owners)})
    falling = sorted(pieces, key=lambda p: (-p.cost, p.piece))
    bound = max((k * p.cost for k, p in enumerate(falling[::world], 1)), default=0)  # of k W + 1 pieces one rank has k + 1
    return Assignment(world, in_order, tuple(costs), tuple(sizes), falling[0] if falling else None, bound)


def _pieces(works: Sequence[BlockWork], world: int) -> list[Sized]:
    """All blocks in pieces, none of which costs much more than its share, if it can be cut further; by bytes without a cost."""
    waiting = [Sized(Piece(w.name, 0, len(w.members)), w.total("cost"), w.total("bytes"), w) for w in works]
    total: Counter[str] = Counter()
    for p in waiting:
        total["cost" if p.cost else "bytes"] += p.cost or p.bytes
    found = []
    while waiting:
        p = waiting.pop()
        key, size = ("cost", p.cost) if p.cost else ("bytes", p.bytes)
        small = size * world * FINE <= total[key]
        parts = [p] if small else p.cut()
        if len(parts) == 1:
            found.append(p)
        else:
            waiting += parts
    return found
