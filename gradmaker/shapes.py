"""Shapes: how a tensor is cut into the blocks that methods with one factor for each axis see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Literal, TypeAlias

from torch import Tensor

__all__ = ["Merge", "ShapePolicy", "View"]

Merge: TypeAlias = Literal["none", "to_2d", "greedy"]
GREEDY_LIMIT = 1024
"""Product of merged axes where no block size says otherwise."""


@dataclass(frozen=True)
class View:
    """One block of a tensor: a chunk of the tensor with its axes merged, possibly transposed."""

    merged: tuple[int, ...]  # shape of the whole tensor, axes merged
    chunk: tuple[slice, ...]  # one slice for each merged axis
    transposed: bool = False  # of a matrix: its columns are the rows of the block

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the block."""
        sizes = tuple(s.stop - s.start for s in self.chunk)
        return sizes[::-1] if self.transposed else sizes

    @property
    def label(self) -> str:
        """What tells this block from the others of its tensor; empty for a whole tensor."""
        whole = all((s.start, s.stop) == (0, d) for s, d in zip(self.chunk, self.merged, strict=True))
        return "" if whole else "[" + ",".join(f"{s.start}:{s.stop}" for s in self.chunk) + "]"

    def read(self, tensor: Tensor) -> Tensor:
        """The block of a tensor."""
        block = tensor.reshape(self.merged)[self.chunk]
        return block.mT if self.transposed else block

    def write(self, tensor: Tensor, block: Tensor) -> None:
        """Put the block back into the storage of the tensor, whatever its strides."""
        whole = tensor.reshape(self.merged)
        whole[self.chunk] = block.mT if self.transposed else block
        if whole.data_ptr() != tensor.data_ptr():  # axes that do not lie next to each other were copied: channels_last
            tensor.copy_(whole.reshape(tensor.shape))


@dataclass(frozen=True)
class ShapePolicy:
    """First axes are merged, then each is cut into chunks of ``block_size``, the last one shorter.

    - ``merge="none"`` keeps a tensor as it is: a convolution has order four or five;
    - ``"to_2d"``: size-1 axes dropped, then all but the first in one, ``(O, I H W)``;
    - ``"greedy"``: size-1 axes dropped, then from the left as many in one as ``block_size`` (1024 without one) allows. A small
      matrix becomes a vector by it, and Shampoo full-matrix AdaGrad: 12 x 7 is 84 below 128.

    Every block is a tensor of its own: factors, roots and the length of grafting. ``rows`` transposes matrices: ``"short"``
    makes the shorter side the rows, ``"right"`` always.

    Reference: Anil et al., 2020, arXiv:2002.09018 (greedy merging, blocks); Jordan et al., Muon, 2024 (to_2d).
    """

    merge: Merge = "none"
    block_size: int | None = None
    rows: Literal["left", "right", "short"] = "left"

    def views(self, shape: tuple[int, ...]) -> list[View]:
        """The blocks of a tensor, row-major over the grid of chunks; the tensor itself is one view of its own shape."""
        merged = self._merged(shape)
        size = self.block_size
        grid = product(*([slice(0, d)] if size is None else list(_chunks(d, size)) for d in merged))
        return [View(merged, chunk, self._turns(tuple(s.stop - s.start for s in chunk))) for chunk in grid]

    def _turns(self, shape: tuple[int, ...]) -> bool:
        if len(shape) != 2 or self.rows == "left":
            return False
        return self.rows == "right" or shape[0] > shape[1]

    def _merged(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.merge == "none":
            return shape
        squeezed = tuple(d for d in shape if d > 1) or (1,)
        if self.merge == "to_2d":
            return squeezed if len(squeezed) < 3 else (squeezed[0], prod(squeezed[1:]))
        return _greedy(squeezed, self.block_size or GREEDY_LIMIT)


def _greedy(shape: tuple[int, ...], limit: int) -> tuple[int, ...]:
    out: list[int] = []
    for d in shape:
        if out and out[-1] * d <= limit:
            out[-1] *= d
        else:
            out.append(d)
    return tuple(out)


def _chunks(d: int, size: int) -> Iterator[slice]:
    yield from (slice(start, min(start + size, d)) for start in range(0, d, size))
