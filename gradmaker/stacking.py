"""Grouping of sites into blocks, the stagger of their refreshes, and transfer of their tensors to the blocks of a new plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from gradmaker import gathering
from gradmaker.blocks import Block
from gradmaker.placement import Placement
from gradmaker.representations.roles import Unstacked
from gradmaker.step.held import Held

__all__ = ["build_blocks", "carry"]


def build_blocks(placements: list[Placement]) -> list[Block]:
    """Group placements into blocks: one block for granularity ``full``, equal small shapes in a stack otherwise."""
    groups: dict[object, list[Placement]] = {}
    for p in placements:
        frame = p.frame() if p.triple.representation.grain != "full" else None
        key: tuple[object, ...] = (p.triple, p.options)
        if frame is not None:
            large = isinstance(p.triple.representation, Unstacked) or max(frame.shape, default=1) > gathering.STACK_LIMIT
            alone = p.site.name if large else ""
            key = (*key, replace(frame, stack=0), alone)
        groups.setdefault(key, []).append(p)
    blocks = [Block(group) for group in groups.values()]
    for method in dict.fromkeys(b.options.method for b in blocks):
        _share([b for b in blocks if b.options.method == method])
    return blocks


def _share(blocks: list[Block]) -> None:
    """Stagger the refreshes of a method's blocks over its interval, by their cost."""
    total, before = sum(b.cost for b in blocks), 0.0
    for block in blocks:
        block.share = before / total
        before += block.cost


def carry(
    old: Iterable[tuple[Block, Held]],
    new: Iterable[tuple[Block, Held]],
    parts: Sequence[str] = ("state", "average", "grafting_state"),
) -> None:
    """Copy the tensors of old blocks into new ones, for sites that are in both.  new: with tensors of their own"""
    members = [
        (block, held, *pair) for block, held in old if not block.full for pair in zip(block.sites, block.slots, strict=True)
    ]
    known = {site.name: (block, held, slot) for block, held, site, slot in members}
    for block, held in new:
        if block.full or isinstance(block.triple.representation, Unstacked):
            continue
        for site, slot in zip(block.sites, block.slots, strict=True):
            if site.name not in known or not known[site.name][0].holds_like(block):
                continue
            _, before, place = known[site.name]
            for part in parts:
                for key, value in getattr(before, part).items():
                    getattr(held, part)[key][slot] = value[place]
