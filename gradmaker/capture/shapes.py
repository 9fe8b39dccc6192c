"""Shape policies: how a tensor is reshaped and cut into the blocks of methods with one Kronecker factor for each axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import log, prod
from typing import Any, Literal, TypeAlias

from torch import Tensor

from gradmaker.options.rules import Rule, check_rule

__all__ = ["Merge", "ShapePolicy", "Split", "View", "as_split"]

Merge: TypeAlias = Literal["none", "squeeze", "to_2d", "balanced", "greedy"]
Split: TypeAlias = Literal["layers"] | tuple[tuple[Rule, int], ...]
"""Split of tensors that hold several linear maps: by layer type, or by pairs of name rule and number, the first match."""
GREEDY_LIMIT = 1024
"""Largest product of merged axes where no block size is given."""


@dataclass(frozen=True)
class View:
    """Equal blocks of a tensor: the same chunk of each of its parts, with axes merged, possibly transposed."""

    merged: tuple[int, ...]  # shape of a part, axes merged
    chunk: tuple[slice, ...]  # one slice for each merged axis
    transposed: bool = False  # of a matrix: its columns are the rows of the block
    parts: int = 1  # number of equal parts of the first axis

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of blocks, and the shape of each.  # (parts, d_1, ..., d_m)"""
        sizes = tuple(s.stop - s.start for s in self.chunk)
        return (self.parts, *(sizes[::-1] if self.transposed else sizes))

    @property
    def label(self) -> str:
        """Suffix for the name of the block, the slices of its chunk; empty for a whole tensor."""
        whole = all((s.start, s.stop) == (0, d) for s, d in zip(self.chunk, self.merged, strict=True))
        return "" if whole else "[" + ",".join(f"{s.start}:{s.stop}" for s in self.chunk) + "]"

    def read(self, tensor: Tensor) -> Tensor:
        """The blocks of a tensor.  # (parts, d_1, ..., d_m)"""
        blocks = tensor.reshape(self.parts, *self.merged)[(slice(None), *self.chunk)]
        return blocks.mT if self.transposed else blocks

    @cached_property
    def whole(self) -> bool:
        """Whether the blocks cover the tensor."""
        return not self.label

    def turned(self, blocks: Tensor) -> Tensor:
        """The blocks with the axes in the order of the tensor."""
        return blocks.mT if self.transposed else blocks

    def write(self, tensor: Tensor, blocks: Tensor) -> None:
        """Write the blocks into the storage of the tensor, whatever its strides."""
        whole = tensor.reshape(self.parts, *self.merged)
        whole[(slice(None), *self.chunk)] = self.turned(blocks)
        if whole.data_ptr() != tensor.data_ptr():  # the strides allow no view, as of channels_last
            tensor.copy_(whole.reshape(tensor.shape))


@dataclass(frozen=True)
class ShapePolicy:
    """Blocks of a tensor: the first axis is split into parts, axes are merged, and each is cut into chunks of ``block_size``.

    - ``merge="none"`` keeps a tensor as it is: a convolution has order four or five;
    - ``"squeeze"``: size-1 axes dropped;
    - ``"to_2d"``: size-1 axes dropped, then all but the first in one, ``(O, I H W)``;
    - ``"balanced"``: size-1 axes dropped, then two groups of neighbours, as nearly square as can be: ``(h, k, d)`` of attention
      becomes ``(h k, d)`` and ``(d, h, k)`` becomes ``(d, h k)``, and a convolution stays ``(O, I H W)``;
    - ``"greedy"``: size-1 axes dropped, then from the left as many merged as ``block_size`` (1024 without one) allows. A small
      matrix becomes a vector, for which Shampoo is full-matrix AdaGrad: 12 x 7 is 84 below 128.

    Every block has its own factors, roots and grafting norm. ``rows`` transposes matrices: ``"short"`` if that makes the
    shorter side the rows, ``"right"`` always. ``split`` gives the number of parts: ``"layers"`` by the type of the layer (gates
    of an LSTM or GRU, the projections of attention, the groups of a convolution), or rules by name.

    Reference: Anil et al., 2020, arXiv:2002.09018 (greedy merging, blocks); Jordan et al., Muon, 2024 (to_2d); Duvvuri et al.,
    CASPR, ICLR 2024 (attention).
    """

    merge: Merge = "none"
    block_size: int | None = None
    rows: Literal["left", "right", "short"] = "left"
    split: Split = ()

    def views(self, shape: tuple[int, ...], parts: int = 1) -> list[View]:
        """The blocks of a tensor, row-major over the grid of chunks; by the default policy one whole view.

        parts: number of equal parts of the first axis; ValueError if it does not divide
        """
        if parts > 1 and (not shape or shape[0] % parts):
            raise ValueError(f"a tensor of shape {shape} does not divide into {parts} equal parts along its first axis")
        part = (shape[0] // parts, *shape[1:]) if parts > 1 else shape
        merged = self._merged(part, whole=parts == 1)
        size = self.block_size
        grid = product(*([slice(0, d)] if size is None else list(_chunks(d, size)) for d in merged))
        return [View(merged, chunk, self._turns(tuple(s.stop - s.start for s in chunk)), parts) for chunk in grid]

    def _turns(self, shape: tuple[int, ...]) -> bool:
        if len(shape) != 2 or self.rows == "left":
            return False
        return self.rows == "right" or shape[0] > shape[1]

    def _merged(self, shape: tuple[int, ...], whole: bool = True) -> tuple[int, ...]:
        if self.merge == "none":
            return shape
        squeezed = tuple(d for d in shape if d > 1) or (1,)
        if self.merge == "to_2d" and not whole and shape[0] == 1:  # one output: its weights are a vector, whatever their axes
            return (prod(squeezed),)
        if self.merge == "squeeze" or (self.merge in ("to_2d", "balanced") and len(squeezed) < 3):
            return squeezed
        if self.merge == "greedy":
            return _greedy(squeezed, self.block_size or GREEDY_LIMIT)
        return _two(squeezed, 1 if self.merge == "to_2d" else _most_square(squeezed))


def as_split(given: Any) -> Split:
    """A `Split` from itself or from a mapping. ValueError for anything else."""
    if given == "layers":
        return "layers"
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, (list, tuple)) or any(not isinstance(pair, (list, tuple)) or len(pair) != 2 for pair in pairs):
        raise ValueError(f"split={given!r}: expected 'layers', or numbers of parts by name, as in {{'*.qkv': 3}}")
    for rule, parts in pairs:
        check_rule("split", rule)
        if not isinstance(parts, int) or isinstance(parts, bool) or parts < 1:
            raise ValueError(f"split: {parts!r} parts for {rule!r}: expected an integer of at least 1")
    return tuple((rule, parts) for rule, parts in pairs)


def _two(shape: tuple[int, ...], cut: int) -> tuple[int, ...]:
    return prod(shape[:cut]), prod(shape[cut:])


def _most_square(shape: tuple[int, ...]) -> int:
    """The position of the cut for which the products of both sides are closest."""
    return min(range(1, len(shape)), key=lambda cut: abs(log(prod(shape[:cut]) / prod(shape[cut:]))))


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
