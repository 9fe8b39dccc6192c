"""Bytes that ranks exchange in a step, by collective. docs/scale.md has the schemes and the formulas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from torch import nn

from gradmaker.costs.block_sizes import BlockSizes, sizes_of
from gradmaker.options.checks import check_choice, check_count
from gradmaker.scale.ranks import NUMBERS
from gradmaker.scale.rows import LENGTH
from gradmaker.schedule import FAR, as_schedule

__all__ = ["Collective", "Every", "Scheme", "Traffic", "communicated", "intervals", "returns_roots", "wire"]

When: TypeAlias = Literal["step", "measurement", "refresh"]
"""A collective of every step, of every measurement of the curvature, or of every refresh of all blocks."""
Name: TypeAlias = Literal["replicated", "owners"]
Results: TypeAlias = Literal["smaller", "roots", "gradients"]

TABLE = 8 * NUMBERS  # bytes of what a rank brings to a meeting
PRESENT = 4  # bytes in which a rank says whether it has something
MEETINGS = 2  # of a pass: its share of the batch before the backward pass, whether it was finite after it


class Collective(NamedTuple):
    """A kind of collective: when it is called, what it carries, and the operation of torch.distributed."""

    when: When
    what: str
    operation: str


@dataclass(frozen=True)
class Scheme:
    """Who holds, refreshes and applies what.

    replicated: all ranks hold and refresh all blocks. owners: each block, or part of one, is refreshed by one rank.
    world: ranks; shards: ranks over which parameters and gradients are sharded, in ``world / shards`` replicas.
    reduce_at: when factors are reduced to their owners: at a refresh, from local averages on every rank, or at each
    measurement, so that owners alone hold them. results: what owners return: roots at a refresh, preconditioned gradients at
    each step, or the smaller of both over the interval.
    """

    name: Name = "replicated"
    world: int = 1
    shards: int = 1
    reduce_at: Literal["refresh", "measurement"] = "refresh"
    results: Results = "smaller"

    def __post_init__(self) -> None:
        check_choice("scheme", self.name, get_args(Name))
        check_choice("reduce_at", self.reduce_at, ("refresh", "measurement"))
        check_choice("results", self.results, get_args(Results))
        check_count("world", self.world, 1)
        check_count("shards", self.shards, 1)
        if self.world % self.shards:
            raise ValueError(f"shards={self.shards!r}: expected a divisor of world={self.world}")
        if self.name == "replicated" and self.shards > 1:
            raise ValueError("scheme='replicated' needs whole gradients on every rank: choose 'owners', or one shard")

    @property
    def replicas(self) -> int:
        return self.world // self.shards


@dataclass(frozen=True)
class Every:
    """Steps between measurements and between refreshes of a method."""

    measurement: int = 1
    refresh: int = 1

    def of(self, when: When) -> int:
        """Steps between two collectives of a kind."""
        return {"step": 1, "measurement": self.measurement, "refresh": self.refresh}[when]


def intervals(methods: Mapping[str, Any]) -> dict[str, Every]:
    """The intervals of the methods of a plan, after their warm-up and any schedule."""

    def far(config: Any, name: str) -> int:
        return as_schedule(name, getattr(config, name)).interval(FAR)

    return {k: Every(far(c, "curvature_interval"), far(c, "preconditioner_interval")) for k, c in methods.items()}


@dataclass
class Traffic:
    """Bytes by kind of collective: those that a call carries, and those of an average step on the wire."""

    bytes: Counter[Collective] = field(default_factory=Counter)
    wire: Counter[Collective] = field(default_factory=Counter)

    def add(self, kind: Collective, size: int, ranks: int, every: Every) -> None:
        """Add a collective of some ranks; one rank communicates nothing."""
        if ranks > 1 and size:
            self.bytes[kind] += size
            self.wire[kind] += wire(kind.operation, size, ranks) / every.of(kind.when)  # type: ignore[assignment]


WIRE: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda W: 2 * (W - 1) / W,
    "reduce_scatter": lambda W: (W - 1) / W,
    "all_gather": lambda W: (W - 1) / W,
    "all_to_all": lambda W: (W - 1) / W,
    "reduce": lambda W: 1.0,
    "broadcast": lambda W: 1.0,
}
"""Bytes that a rank sends, over those that the collective carries, in the ring algorithms.

Reference: Thakur, Rabenseifner, Gropp, Int. J. High Perf. Comput. Appl. 19 (2005), section 4.
"""


def wire(operation: str, size: int, ranks: int) -> float:
    """Bytes that a rank sends in a collective that carries ``size`` bytes."""
    return size * WIRE[operation](ranks)


def returns_roots(b: BlockSizes, scheme: Scheme, every: Every) -> bool:
    """Whether owners return the roots of a block, which all ranks then apply, and not ``P g``."""
    if scheme.shards > 1 or not b.one.steady or not b.one.refresh:
        return False
    if scheme.results != "smaller":
        return scheme.results == "roots"
    return b.one.cache <= every.refresh * b.one.entries * b.one.width


def communicated(
    maker: Any, world: int, scheme: Name = "replicated", positions: int = 0, **options: Any
) -> dict[Collective, int]:
    """Bytes that the collectives of each kind carry in a step of one declared pass; of one process nothing.

    The bytes of an all_reduce, reduce or broadcast are those of the tensor, of an all_gather those of the result, of a
    reduce_scatter those of the input, of an all_to_all those of the input of a rank, averaged over the ranks.

    maker: with a plan and a model, which may be on the meta device; positions: of the batch of a rank, where rows are gathered;
    options: of `Scheme`
    """
    made = Scheme(scheme, world, **options)
    sizes = sizes_of(maker.plan.blocks)
    return dict(traffic(maker.model, sizes, made, intervals(maker.plan.methods), positions).bytes)


def traffic(
    model: nn.Module, blocks: Sequence[BlockSizes], scheme: Scheme, every: Mapping[str, Every], positions: int = 0
) -> Traffic:
    """The traffic of a model whose gradients are reduced, and of the blocks of its plan."""
    made = Traffic()
    _of_model(model, scheme, made)
    of_passes = [b for b in blocks if b.one.summed]
    if blocks:
        trained = sum(p.requires_grad for p in model.parameters())
        made.add(Collective("step", "meetings", "all_reduce"), MEETINGS * TABLE * scheme.world, scheme.world, Every())
        made.add(Collective("step", "presence", "all_reduce"), PRESENT * trained * scheme.world, scheme.world, Every())
    for b in of_passes:
        _evidence(b, scheme, every[b.block.options.method], positions, made)
    for curvature in dict.fromkeys(b.block.triple.curvature for b in of_passes if b.gathered and not b.one.rows):
        often = min((every[b.block.options.method] for b in of_passes if b.block.triple.curvature == curvature), key=_often)
        made.add(Collective("measurement", "meetings", "all_reduce"), TABLE * scheme.world, scheme.world, often)
    for b in blocks if scheme.name == "owners" else ():
        _returned(b, scheme, every[b.block.options.method], made)
    return made


def _often(every: Every) -> int:
    return every.measurement


def _evidence(b: BlockSizes, scheme: Scheme, every: Every, positions: int, made: Traffic) -> None:
    """Sums of evidence are reduced, to all ranks or to owners; what is no sum of theirs is gathered by all, in rows."""
    world, sites, size = scheme.world, len(b.block.sites), b.one.summed * len(b.members)
    if not b.gathered:
        made.add(Collective("measurement", "presence", "all_reduce"), PRESENT * sites * world, world, every)
        if scheme.name == "replicated":
            made.add(Collective("measurement", "factors", "all_reduce"), size, world, every)
        else:
            made.add(Collective(scheme.reduce_at, "factors", "reduce"), size, world, every)
        return
    made.add(Collective("measurement", "shapes", "all_reduce"), 8 * LENGTH * sites * world, world, every)
    if b.one.rows:
        made.add(Collective("measurement", "rows", "all_gather"), b.one.rows * sites * positions * world, world, every)
    else:
        made.add(Collective("measurement", "presence", "all_reduce"), PRESENT * sites * world, world, every)
        made.add(Collective("measurement", "vectors", "all_reduce"), size, world, every)


def _of_model(model: nn.Module, scheme: Scheme, made: Traffic) -> None:
    """DDP's reduction of gradients; of sharded parameters FSDP's, and its two gathers of the weights."""
    reduced, once = Collective("step", "gradients", "all_reduce"), Every()
    trained = _size(p for p in model.parameters() if p.requires_grad)
    if scheme.shards == 1:
        made.add(reduced, trained, scheme.world, once)
        return
    made.add(Collective("step", "weights", "all_gather"), 2 * _size(model.parameters()), scheme.shards, once)
    made.add(Collective("step", "gradients", "reduce_scatter"), trained, scheme.shards, once)
    made.add(reduced, ceil(trained / scheme.shards), scheme.replicas, once)


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _returned(b: BlockSizes, scheme: Scheme, every: Every, made: Traffic) -> None:
    """What owners return: roots, or preconditioned gradients."""
    count, world, one = len(b.members), scheme.world, b.one
    result = one.entries * one.width * count
    if returns_roots(b, scheme, every):
        made.add(Collective("refresh", "roots", "broadcast"), one.cache * count, world, every)
    elif scheme.shards > 1 and one.elementwise:
        return  # every rank computes its own shard
    elif scheme.shards == 1:
        made.add(Collective("step", "preconditioned", "all_gather"), result, world, every)
    else:  # each replica has all shards: it serves the owners that it contains, and the others get what these return
        here = ceil(result / scheme.shards / scheme.replicas)
        made.add(Collective("step", "shards", "all_to_all"), 2 * here, scheme.shards, every)
        made.add(Collective("step", "preconditioned", "all_gather"), here * scheme.replicas, scheme.replicas, every)
