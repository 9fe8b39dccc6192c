"""What a method costs each rank of several: memory, bytes communicated, FLOPs and their balance, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradmaker.costs.block_sizes import BlockSizes, Member, sizes_of
from gradmaker.costs.layers import module_flops
from gradmaker.costs.traffic import Every, Scheme, Traffic, intervals, returns_roots, traffic
from gradmaker.costs.trial import PredictedMaker
from gradmaker.scale.assignment import Assignment, BlockWork, assign

__all__ = ["Passes", "RankCost", "cost_of_ranks", "passes_of"]


@dataclass(frozen=True)
class Passes:
    """FLOPs of the forward and backward pass of one rank's batch, and its positions: entries of the batch's leading axes."""

    flops: float
    positions: int


@dataclass(frozen=True)
class RankCost:
    """What a rank holds, computes and communicates in an average step after the warm-up.

    memory: bytes by what they are for, of the rank that holds most; without activations.
    flops: by what they are for, of the rank that computes most, beside the passes.
    traffic: bytes of collectives.
    assignment: the owners, where there are any; why: what keeps them from balance.
    largest: bytes of the largest matrix, or of a member's statistic where it is none, and its name.
    """

    scheme: Scheme
    memory: Mapping[str, int]
    flops: Mapping[str, float]
    passes: Passes
    traffic: Traffic
    assignment: Assignment | None = None
    largest: tuple[int, str] = (0, "nothing")
    blocks: Sequence[BlockSizes] = field(default=(), repr=False)

    @property
    def bytes(self) -> int:
        """Bytes of the rank that holds most."""
        return sum(self.memory.values())

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in an average step."""
        return float(sum(self.traffic.wire.values()))

    @property
    def balance(self) -> float:
        """The largest share of a rank in what owners compute, over the mean."""
        return self.assignment.balance if self.assignment else 1.0

    @property
    def why(self) -> str:
        return self.assignment.why() if self.assignment else ""

    def seconds(self, flops: float, bandwidth: float) -> float:
        """Seconds of a step in which nothing overlaps.  flops: of a rank in a second; bandwidth: bytes that it sends in one"""
        return (self.passes.flops + sum(self.flops.values())) / flops + self.sent / bandwidth


def passes_of(model: nn.Module, batch: Any) -> Passes:
    """The passes of a model, which may be on the meta device, on the batch of one rank."""
    tensors = [t for t in tree_leaves(batch) if isinstance(t, Tensor)]
    first = tensors[0] if tensors else torch.empty(0)
    features = 1 if first.ndim > 1 and first.is_floating_point() else 0
    return Passes(module_flops(model, batch)[""], first.shape[: first.ndim - features].numel())


def cost_of_ranks(
    maker: PredictedMaker, passes: Passes, scheme: Scheme, known: dict[object, Member] | None = None, moments: int = 0
) -> RankCost:
    """The cost of a method under a scheme.

    CostError, with the reason, for a method whose blocks are known only after a step.

    moments: tensors like the parameters that the optimizer under the maker holds; known: as in `sizes_of`
    """
    maker_: Any = maker
    blocks, every = sizes_of(maker_.plan.blocks, known), intervals(maker_.plan.methods)
    made = traffic(maker.model, blocks, scheme, every, passes.positions)
    model = _of_model(maker.model, scheme, moments)
    shares = [_Share(b, scheme, every[b.block.options.method], passes) for b in blocks]
    if scheme.name == "replicated":
        held = {k: sum(s.held[k] * s.count for s in shares) for k in HELD} | {"evidence": _evidence(blocks, scheme, passes)}
        flops = {k: sum(s.flops[k] * s.count for s in shares) for k in WORK}
        workspace = max((b.one.workspace * len(b.members) for b in blocks), default=0)
        return RankCost(scheme, model | held | {"workspace": workspace}, flops, passes, made, None, _largest(blocks), blocks)
    return _of_owners(blocks, shares, scheme, model, passes, made)


def _evidence(blocks: Sequence[BlockSizes], scheme: Scheme, passes: Passes) -> int:
    """Bytes of a measured step before its end: sums of this rank, or its rows and those of all ranks for the largest block.

    Owners get sums block by block. One process folds evidence in as it comes.
    """
    if scheme.world == 1:
        return 0
    sums = [b.one.summed * len(b.members) for b in blocks if not b.gathered]
    rows = [b.one.rows * len(b.block.sites) * passes.positions for b in blocks if b.gathered]
    kept = sum(sums) if scheme.name == "replicated" else max(sums, default=0)
    return kept + sum(rows) + scheme.world * max(rows, default=0)


HELD = ("statistics", "roots", "averages")
WORK = ("measurement", "refresh", "application")


class _Share:
    """What one member of a block costs in an average step: on every rank, and on its owner besides."""

    def __init__(self, b: BlockSizes, scheme: Scheme, every: Every, passes: Passes) -> None:
        one, self.count, self.b = b.one, len(b.members), b
        positions = passes.positions * (scheme.world if b.gathered else 1)
        measured = (one.moment + one.positions * positions) / every.measurement
        self.held = {"statistics": one.state, "roots": one.cache, "averages": one.average}
        self.flops = {"measurement": measured, "refresh": one.refresh / every.refresh, "application": one.apply}
        roots, added = returns_roots(b, scheme, every), bool(one.summed) and not b.gathered
        common = {  # what every rank holds and computes
            "statistics": added and scheme.reduce_at == "refresh",
            "roots": roots,
            "averages": roots,
            "measurement": added,
            "refresh": False,
            "application": roots,
        }
        self.common = {k: v if common[k] else 0 for k, v in {**self.held, **self.flops}.items()}
        self.own = {k: 0 if common[k] else v for k, v in {**self.held, **self.flops}.items()}
        self.sharded = scheme.shards if one.elementwise and scheme.shards > 1 else 0
        self.roots = roots

    def work(self) -> BlockWork:
        """The block for `assign`: what applies ``P`` has all of it."""
        made = self.b.work(sum(self.own[k] for k in WORK), round(sum(self.own[k] for k in HELD)))
        return made if self.roots else BlockWork(made.name, made.members, made.cost, made.bytes, (), made.whole)


def _of_owners(
    blocks: Sequence[BlockSizes],
    shares: Sequence[_Share],
    scheme: Scheme,
    model: dict[str, int],
    passes: Passes,
    made: Traffic,
) -> RankCost:
    owned = [s for s in shares if not s.sharded]
    found = assign([s.work() for s in owned], scheme.world)
    everywhere = {k: sum(s.common[k] * s.count for s in owned) for k in (*HELD, *WORK)}
    for s in shares:
        for k in (*HELD, *WORK) if s.sharded else ():
            everywhere[k] += (s.common[k] + s.own[k]) * s.count / s.sharded
    held = {k: round(everywhere[k]) for k in HELD} | {"owned": max(found.bytes)}
    held["evidence"] = _evidence(blocks, scheme, passes)
    flops = {k: everywhere[k] for k in WORK} | {"owned": float(max(found.costs))}
    workspace = max((b.one.workspace for b in blocks), default=0)
    return RankCost(scheme, model | held | {"workspace": workspace}, flops, passes, made, found, _largest(blocks), blocks)


def _of_model(model: nn.Module, scheme: Scheme, moments: int) -> dict[str, int]:
    """Bytes of parameters, gradients and of the optimizer under the maker."""
    every = list(model.parameters())
    whole = sum(p.numel() * p.element_size() for p in every)
    trained = sum(p.numel() * p.element_size() for p in every if p.requires_grad)
    found = {"parameters": whole, "gradients": trained, "optimizer": moments * trained}
    return {k: ceil(v / scheme.shards) for k, v in found.items()}


def _largest(blocks: Sequence[BlockSizes]) -> tuple[int, str]:
    sizes = [(m.entries * b.one.width, f"{m.name} of {b.members[0]} (side {m.side})") for b in blocks for m in b.one.matrices]
    whole = [(b.one.state, b.members[0]) for b in blocks if not b.one.matrices]
    return max(sizes + whole, default=(0, "nothing"), key=lambda found: found[0])
