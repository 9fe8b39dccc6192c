"""Placements: sites with the triple that a method has chosen for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

from gradmaker.block_options import BlockOptions
from gradmaker.capture.sites import Site
from gradmaker.linalg.real_pairs import real_dtype
from gradmaker.representations.base import Frame
from gradmaker.representations.roles import FactoredAxes, WholeLayers, diagonal_axes
from gradmaker.triple import Triple

__all__ = ["Placement", "joined_frame", "slots_of"]


@dataclass(frozen=True)
class Placement:
    """A site with its triple and the options of its blocks."""

    site: Site
    triple: Triple
    options: BlockOptions = field(default_factory=BlockOptions)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one block."""
        grain = self.triple.representation.grain
        if grain == "unit":
            return self.site.shape[-1:]
        if grain == "full":
            return (prod(self.site.shape),)
        return self.site.shape if self.joins_groups else self.site.shape[1:]

    @property
    def count(self) -> int:
        """The number of blocks of the site."""
        grain = self.triple.representation.grain
        if grain == "unit":
            return prod(self.site.shape[:-1])
        return 1 if grain == "full" or self.joins_groups else self.site.shape[0]

    @property
    def joins_groups(self) -> bool:
        """Whether the groups of a layer are one block of shape (G, o, i); pieces of a cut tensor never are."""
        representation, grouped = self.triple.representation, self.site.view is None and self.site.shape[0] > 1
        return grouped and isinstance(representation, WholeLayers) and representation.grain == "layer"

    def frame(self) -> Frame:
        """The frame for which its representation allocates a statistic."""
        like = next(iter(self.site.parameters.values()))
        dtype = self.options.dtype or real_dtype(like)
        diagonal = diagonal_axes(self.triple.representation, self.shape, self.options.max_dim)
        own = self.site.one_hot_axis
        if own is not None and isinstance(self.triple.representation, FactoredAxes):
            diagonal |= {own}
        return Frame(self.count, self.shape, diagonal, dtype, like.device, self.options.max_dim, bool(self.site.uses))


def joined_frame(placements: Sequence[Placement], full: bool) -> Frame:
    """The frame of a block of some placements.  full: whether they are one vector"""
    frame = placements[0].frame()
    if not full:
        return replace(frame, stack=sum(p.count for p in placements))
    shape = (sum(prod(p.site.shape) for p in placements),)
    diagonal_axes(placements[0].triple.representation, shape, placements[0].options.max_dim)
    return replace(frame, shape=shape)


def slots_of(placements: Sequence[Placement], full: bool) -> list[slice]:
    """The slice of each placement in the stack of a block, or in its vector."""
    sizes = [prod(p.site.shape) if full else p.count for p in placements]
    ends = [sum(sizes[: j + 1]) for j in range(len(sizes))]
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
