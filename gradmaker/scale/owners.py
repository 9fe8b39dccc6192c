"""Owners: each block is held, refreshed and solved by one rank, and its ``P g`` goes to all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gradmaker.blocks import Block
from gradmaker.scale.assignment import BlockWork, assign
from gradmaker.scale.ranks import Ranks

__all__ = ["deal", "share"]


def deal(blocks: Sequence[Block], ranks: Ranks) -> None:
    """Let each block be held by its owner alone. Blocks with parts of the same parameter have the same owner."""
    together: list[list[Block]] = []
    for block in blocks:
        own = {p for s in block.sites for p in s.parameters.values()}
        met = [g for g in together if any(not own.isdisjoint(s.parameters.values()) for b in g for s in b.sites)]
        together = [g for g in together if g not in met] + [[b for g in met for b in g] + [block]]
    works = [
        BlockWork(str(blocks.index(g[0])), (g[0].name,), sum(int(b.cost) for b in g), sum(b.bytes for b in g), whole=True)
        for g in together
    ]
    owners = {piece.block: rank for piece, rank in assign(works, ranks.size).owners.items()}
    for g in together:
        for block in g:
            block.give_to(owners[str(blocks.index(g[0]))], ranks.rank)


@torch.no_grad()
def share(ranks: Ranks, blocks: Sequence[Block], found: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
    """The preconditioned gradients of all ranks.  found: those of the blocks of this rank"""
    ranks.meet()
    owners: dict[nn.Parameter, int] = {}
    for block in blocks:
        if block.owner is not None:
            owners |= {p: block.owner for s in block.sites for p in s.parameters.values()}
    holders = ranks.present([p in found for p in owners])
    held = [(p, r) for (p, r), there in zip(owners.items(), holders, strict=True) if there]
    made: dict[nn.Parameter, Tensor] = {}
    for dtype in dict.fromkeys(p.dtype for p, _ in held):
        of_type = [(p, r) for p, r in held if p.dtype == dtype]
        values = [found[p].to(dtype) for p, r in of_type if r == ranks.rank]
        own = [torch.view_as_real(v) if v.is_complex() else v for v in values]
        like = torch.empty(0, dtype=dtype.to_real(), device=ranks.device)
        flat = torch.cat([like, *(v.reshape(-1) for v in own)])
        lengths = {p: p.numel() * (2 if dtype.is_complex else 1) for p, _ in of_type}
        pieces = ranks.gather(flat, [sum(lengths[p] for p, r in of_type if r == rank) for rank in range(ranks.size)])
        for rank, piece in enumerate(pieces):
            its = [p for p, r in of_type if r == rank]
            for p, value in zip(its, piece.split([lengths[p] for p in its]), strict=True):
                whole = torch.view_as_complex(value.view(*p.shape, 2)) if dtype.is_complex else value.view(p.shape)
                made[p] = whole
    return made
