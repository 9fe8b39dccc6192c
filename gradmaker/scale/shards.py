"""Gradients of sharded parameters: the whole matrix from the shards of all ranks, and back.

``fully_shard`` cuts a parameter along one axis over the ranks of a mesh axis; along another mesh axis (HSDP) the shards are
replicated. Shards travel in one exchange with their exact sizes: uneven ones, and empty ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
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


@dataclass(frozen=True)
class _Wanted:
    """A sharded tensor, and the ranks that need all of it."""

    shard: Tensor
    layout: _Layout
    by: frozenset[int]

    def senders(self, to: int) -> frozenset[int]:
        """The ranks that send a shard to a rank: those of its replica."""
        near = self.layout.replica[to]
        return frozenset(r for r, replica in enumerate(self.layout.replica) if replica == near and to in self.by)


@torch.no_grad()
def _gathered(ranks: Ranks | None, wanted: Sequence[_Wanted]) -> list[Tensor]:
    """The whole tensors on the ranks that need them; elsewhere zeros of their shapes, without memory."""
    if ranks is None:
        return [w.shard.clone() for w in wanted]
    found = [w.shard.new_zeros(()).expand(w.layout.shape) for w in wanted]
    for dtype in dict.fromkeys(w.shard.dtype for w in wanted):
        of_type = [j for j, w in enumerate(wanted) if w.shard.dtype == dtype]
        lists = {to: [j for j in of_type if ranks.rank in wanted[j].senders(to)] for to in range(ranks.size)}
        send = {to: torch.cat([wanted[j].shard.reshape(-1) for j in js]) for to, js in lists.items() if js}
        mine = [j for j in of_type if ranks.rank in wanted[j].by]
        sent = {r: [j for j in mine if r in wanted[j].senders(ranks.rank)] for r in range(ranks.size)}
        pieces = ranks.exchange(send, {r: sum(wanted[j].layout.size(r) for j in js) for r, js in sent.items()}, dtype)
        for j in mine:
            found[j] = torch.empty(wanted[j].layout.shape, dtype=dtype, device=ranks.device)
        for r, js in sent.items():
            parts = [wanted[j].layout.part(r, found[j]) for j in js]
            for part, piece in zip(parts, pieces[r].split([p.numel() for p in parts]), strict=True):
                part.copy_(piece.view(part.shape))
    return found


@torch.no_grad()
def _scattered(ranks: Ranks, made: Sequence[Tensor], layouts: Sequence[_Layout], owners: Sequence[int]) -> list[Tensor]:
    """The shards of this rank of whole tensors that their owners have."""
    found: list[Tensor] = [torch.empty(0)] * len(made)
    for dtype in dict.fromkeys(t.dtype for t in made):
        of_type = [j for j, t in enumerate(made) if t.dtype == dtype]
        own = [j for j in of_type if owners[j] == ranks.rank]
        send = {to: torch.cat([layouts[j].part(to, made[j]).reshape(-1) for j in own]) for to in range(ranks.size) if own}
        sent = {r: [j for j in of_type if owners[j] == r] for r in range(ranks.size)}
        pieces = ranks.exchange(send, {r: sum(layouts[j].size(ranks.rank) for j in js) for r, js in sent.items()}, dtype)
        for r, js in sent.items():
            for j, piece in zip(js, pieces[r].split([layouts[j].size(ranks.rank) for j in js]), strict=True):
                found[j] = piece.view(layouts[j].part(ranks.rank, made[j]).shape)
    return found


@contextmanager
def whole_gradients(
    ranks: Ranks | None,
    parameters: Sequence[nn.Parameter],
    before: Gradients,
    owners: Mapping[nn.Parameter, int] = MappingProxyType({}),
) -> Iterator[Gradients]:
    """Context in which ``.grad`` of sharded parameters are whole; at its end each rank has its shard of what they are then.

    before: gradients from before the step, which the context is given whole, too. owners: by parameter the rank that needs it
    whole, where it is zeros without memory on the others; else all do
    """
    kept = {p: p.grad for p in parameters if is_sharded(p) and p.grad is not None}
    if not kept:
        yield before
        return
    if ranks is not None:
        ranks.meet([float(len(kept))])
    layouts = {p: _layout(p, ranks) for p in kept}
    everyone = range(1 if ranks is None else ranks.size)
    by = {p: frozenset([owners[p]] if p in owners else everyone) for p in kept}
    given = {p: g for p, g in before if g is not None and p in kept}
    wholes = _gathered(ranks, [_Wanted(local(g), layouts[p], by[p]) for p, g in (*kept.items(), *given.items())])
    own = 0 if ranks is None else ranks.rank
    earlier = {p: w if own in by[p] else None for p, w in zip(given, wholes[len(kept) :], strict=True)}
    try:
        for p, w in zip(kept, wholes, strict=False):
            p.grad = w
        yield tuple((p, earlier.get(p, g)) for p, g in before)
    except BaseException:
        for p, g in kept.items():
            p.grad = g
        raise
    made = {p: w if p.grad is None else p.grad for p, w in zip(kept, wholes, strict=False)}
    owned = [p for p in kept if p in owners]
    found = {p: layouts[p].part(own, made[p]) for p in kept if p not in owners}
    if ranks is not None and owned:
        whole = [made[p] for p in owned]
        shards = _scattered(ranks, whole, [layouts[p] for p in owned], [owners[p] for p in owned])
        found |= dict(zip(owned, shards, strict=True))
    with torch.no_grad():
        for p, g in kept.items():
            target = given.get(p, g)
            local(target).copy_(found[p])
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
