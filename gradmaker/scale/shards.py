"""Gradients of sharded parameters: the whole matrix from the shards of all ranks, and back.

``fully_shard`` cuts a parameter along one axis over the ranks of a mesh axis; along another mesh axis (HSDP) the shards are
replicated. Shards travel in one exchange with their exact sizes: uneven ones, and empty ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradmaker.capture.sharded import divided, is_sharded, local
from gradmaker.scale.ranks import Ranks, RefusedError
from gradmaker.step.state import Gradients

__all__ = ["reduced_by_mean", "whole_gradients"]


@dataclass(frozen=True)
class _Layout:
    """Where the shards of a parameter are."""

    shape: tuple[int, ...]
    axis: int  # of the tensor; 0 where it is replicated alone
    index: tuple[int, ...]  # the shard of each rank
    replica: tuple[int, ...]  # the replica that each rank is in

    @cached_property
    def cuts(self) -> list[int]:
        """Where the shards begin, and the end."""
        n, shards = self.shape[self.axis], max(self.index) + 1
        chunk = -(-n // shards)
        return [min(n, chunk * j) for j in range(shards + 1)]

    def part(self, rank: int, whole: Tensor) -> Tensor:
        """The shard of a rank: a view."""
        begin, end = self.cuts[self.index[rank]], self.cuts[self.index[rank] + 1]
        return whole.narrow(self.axis, begin, end - begin)

    def size(self, rank: int) -> int:
        begin, end = self.cuts[self.index[rank]], self.cuts[self.index[rank] + 1]
        rest = 1
        for j, n in enumerate(self.shape):
            rest *= 1 if j == self.axis else n
        return rest * (end - begin)


def _layout(p: Any, ranks: Ranks | None) -> _Layout:
    mesh = p.device_mesh.mesh
    members = [dist.get_rank()] if ranks is None else ranks.members
    if sorted(mesh.flatten().tolist()) != sorted(members):
        raise RefusedError(
            f"fully_shard has a mesh of the ranks {sorted(mesh.flatten().tolist())}, and the maker's process group those of "
            f"{sorted(members)}: give the maker the group of that mesh, maker.process_group = ..."
        )
    cut = [j for j, placement in enumerate(p.placements) if placement.is_shard()]
    axis = p.placements[cut[0]].dim % p.ndim if cut else 0
    index, replica = [], []
    for r in members:
        place = (mesh == r).nonzero()[0].tolist()
        index.append(place[cut[0]] if cut else 0)
        others = [(k, n) for j, (k, n) in enumerate(zip(place, mesh.shape, strict=True)) if not cut or j != cut[0]]
        number = 0
        for k, n in others:
            number = number * n + k
        replica.append(number)
    return _Layout(tuple(p.shape), axis, tuple(index), tuple(replica))


@torch.no_grad()
def _gathered(ranks: Ranks | None, pairs: Sequence[tuple[nn.Parameter, Tensor]]) -> list[Tensor]:
    """The whole tensors of which each rank has a shard, on all ranks."""
    layouts = [_layout(p, ranks) for p, _ in pairs]
    if ranks is None:
        return [local(t).clone() for _, t in pairs]
    found: list[Tensor] = [torch.empty(0)] * len(pairs)
    buckets: dict[tuple[torch.dtype, tuple[int, ...]], list[int]] = {}
    for j, (_, t) in enumerate(pairs):
        buckets.setdefault((t.dtype, layouts[j].replica), []).append(j)
    for (dtype, replica), places in buckets.items():
        own = torch.cat([local(pairs[j][1]).reshape(-1) for j in places])
        near = [r for r in range(ranks.size) if replica[r] == replica[ranks.rank]]
        pieces = ranks.exchange({r: own for r in near}, {r: sum(layouts[j].size(r) for j in places) for r in near}, dtype)
        wholes = [torch.empty(layouts[j].shape, dtype=dtype, device=own.device) for j in places]
        for r in near:
            parts = [layouts[j].part(r, w) for j, w in zip(places, wholes, strict=True)]
            for part, piece in zip(parts, pieces[r].split([p.numel() for p in parts]), strict=True):
                part.copy_(piece.view(part.shape))
        for j, w in zip(places, wholes, strict=True):
            found[j] = w
    return found


@contextmanager
def whole_gradients(ranks: Ranks | None, parameters: Sequence[nn.Parameter], before: Gradients) -> Iterator[Gradients]:
    """Context in which ``.grad`` of sharded parameters are whole; at its end each rank has its shard of what they are then.

    before: gradients from before the step, which the context is given whole, too
    """
    kept = {p: p.grad for p in parameters if is_sharded(p) and p.grad is not None}
    if not kept:
        yield before
        return
    if ranks is not None:
        ranks.meet([float(len(kept))])
    given = {p: g for p, g in before if g is not None and is_sharded(g)}
    wholes = _gathered(ranks, [*kept.items(), *given.items()])
    earlier = dict(zip(given, wholes[len(kept) :], strict=True))
    try:
        for p, w in zip(kept, wholes, strict=False):
            p.grad = w
        yield tuple((p, earlier.get(p, g)) for p, g in before)
    except BaseException:
        for p, g in kept.items():
            p.grad = g
        raise
    with torch.no_grad():
        for p, own in kept.items():
            made, target = p.grad, given.get(p, own)
            if made is not None:
                local(target).copy_(_layout(p, ranks).part(0 if ranks is None else ranks.rank, made))
            p.grad = target


@torch.no_grad()
def reduced_by_mean(ranks: Ranks, model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Make sums of the means over the ranks that `fully_shard` has reduced gradients to. Returns the other parameters."""
    sharded = [p for p in parameters if is_sharded(p)]
    if sharded and divided(model):
        raise RefusedError(
            "fully_shard divides gradients by a number of its own, and the maker has their sum: leave out "
            "set_gradient_divide_factor in declared calls"
        )
    held = [local(p.grad) for p in sharded if p.grad is not None]
    if held:
        torch._foreach_mul_(held, float(ranks.size))
    return [p for p in parameters if not is_sharded(p)]
