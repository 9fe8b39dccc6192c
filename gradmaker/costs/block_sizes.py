"""What a block amounts to: bytes that it holds, FLOPs of its update, refresh and application, from shapes alone.

One member of each kind of block works on tensors without data, so that a model of many equal layers takes no longer than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gradmaker.blocks import Block
from gradmaker.costs.counting import Recorder
from gradmaker.costs.trial import quiet
from gradmaker.curvature.evidence import Gradient, Outer
from gradmaker.curvature.evidence_kinds import kinds
from gradmaker.curvature.products import Product
from gradmaker.errors import CostError
from gradmaker.linalg.factors import tile_width
from gradmaker.linalg.state import State
from gradmaker.representations.base import Fold, Frame
from gradmaker.representations.capabilities import Elementwise
from gradmaker.representations.roles import FactoredAxes, has_refresh, renewal, slow
from gradmaker.scale.assignment import BlockWork, Matrix
from gradmaker.scale.parts import adds

__all__ = ["BlockSizes", "Member", "sizes_of"]

FOLD = Fold(0.9, 0.1, 0.1)


@dataclass(frozen=True)
class Member:
    """One member of a block, in bytes and FLOPs.

    entries: of its gradient; width: bytes of one of them as it is preconditioned.
    state, cache, average: bytes held of the statistic, of the last refresh, of running averages; what is in two counts once.
    summed: bytes of the statistic to which the passes of every rank add; zero if it is made of the reduced gradient.
    rows: bytes of the rows of one position, where it is no sum of what ranks have, so that rows are gathered.
    moment: FLOPs of one measurement by the reduced gradient; positions: FLOPs of one by each position of the passes.
    refresh, apply: FLOPs; workspace: bytes of temporary tensors in a refresh.
    steady: whether the cache is as old as the last refresh, and no younger; elementwise: whether ``P`` is a diagonal.
    """

    entries: int
    width: int
    matrices: tuple[Matrix, ...]
    state: int
    cache: int
    average: int
    summed: int
    rows: int
    moment: float
    positions: float
    refresh: float
    apply: float
    workspace: int
    steady: bool
    elementwise: bool


@dataclass(frozen=True)
class BlockSizes:
    """A block: the names of its members, and one of them."""

    block: Block
    members: tuple[str, ...]
    one: Member

    @property
    def name(self) -> str:
        return self.block.name

    @property
    def gathered(self) -> bool:
        """Whether the evidence of ranks is put together before it is folded in, since the statistic is no sum of theirs."""
        return bool(self.one.summed) and not adds(self.block)

    def work(self, cost: float, size: int) -> BlockWork:
        """The block for `assign`.  cost: FLOPs of a member's owner; size: bytes that it holds"""
        own = replace(self.one, matrices=()) if self.block.frame.tied else self.one  # the factors of a tie are made of both
        return BlockWork(self.name, self.members, round(cost), size, own.matrices, self.block.full)


def sizes_of(blocks: Sequence[Block], known: dict[object, Member] | None = None) -> list[BlockSizes]:
    """The sizes of blocks. CostError for one whose statistic depends on the step.

    known: members by kind, as of an earlier call; extended here
    """
    found = {} if known is None else known
    made = []
    for block in blocks:
        if reason := _unknown(block):
            raise CostError(f"{block.name}: {type(block.triple.representation).__name__} {reason}")
        key = (block.triple, replace(block.frame, stack=0), block.options)
        if key not in found:
            found[key] = _member(block)
        made.append(BlockSizes(block, tuple(block.members()), found[key]))
    return made


def _unknown(block: Block) -> str:
    """Why the sizes of a block are not known before a step; empty if they are."""
    if block.late:
        return "is held by rows of the batch, whose number only a step tells"
    products = kinds(Product) & block.triple.curvature.gives
    return "is applied by products with further passes, whose number only a step tells" if products and block.per_step else ""


def _member(block: Block) -> Member:
    """One member, on tensors without data. CostError, with the reason, where a step needs its data."""
    recorder = Recorder()
    try:
        with quiet(), FakeTensorMode(), recorder, torch.no_grad():
            return _tried(block, recorder)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CostError(f"{block.name}: {type(block.triple.representation).__name__}: {reason}") from error


def _tried(block: Block, recorder: Recorder) -> Member:
    frame = replace(block.frame, stack=1, device=torch.device("cpu"))
    representation, g = block.triple.representation, frame.zeros(*frame.shape)
    state = representation.init(frame)
    moment, positions = _measured(block, frame, state, recorder)

    def refreshed(previous: State | None) -> State:
        if has_refresh(representation):
            representation.refresh(state)
        return block.refreshed(state, previous)

    cache = refreshed(None)
    recorder.start()
    before = recorder.live
    cache = refreshed(cache)
    refresh, workspace = recorder.work.total_flops, recorder.peak - before
    recorder.start()
    block.applied(cache, g)
    own = [t for t in cache.values() if all(t is not s for s in state.values())]
    of_passes = block.triple.curvature.of_passes
    return Member(
        entries=prod(frame.shape),
        width=torch.empty(0, dtype=frame.dtype).element_size(),
        matrices=_matrices(frame, block, state),
        state=_bytes(state.values()),
        cache=_bytes(own),
        average=_per_member(block, block.average) + _per_member(block, block.grafting_state),
        summed=_summed(block, frame, state) if of_passes else 0,
        rows=_rows(block, frame) if of_passes else 0,
        moment=moment,
        positions=positions,
        refresh=refresh,
        apply=recorder.work.total_flops,
        workspace=workspace,
        steady=renewal(representation) == "refresh" and not block.follows_measurements,
        elementwise=isinstance(representation, Elementwise),
    )


def _measured(block: Block, frame: Frame, state: State, recorder: Recorder) -> tuple[float, float]:
    """FLOPs of an update by a gradient, or those by each position of passes: ``2 d w`` for a factor of side d and width w."""
    representation, curvature = block.triple.representation, block.triple.curvature
    if kinds(Gradient) <= representation.takes & curvature.gives:
        recorder.start()
        representation.update({k: v.clone() for k, v in state.items()}, Gradient(frame.zeros(*frame.shape)), FOLD)
        return recorder.work.total_flops, 0.0
    if not curvature.layerwise:
        return 0.0, 0.0
    sides = frame.shape if isinstance(representation, FactoredAxes) else (prod(frame.shape),)
    return 0.0, float(sum(2 * d * w for d, w in zip(sides, _widths(frame, sides), strict=True)))


def _widths(frame: Frame, sides: Sequence[int]) -> list[int]:
    return [1 if k in frame.diagonal else tile_width(d, frame.longest) for k, d in enumerate(sides)]


def _matrices(frame: Frame, block: Block, state: State) -> tuple[Matrix, ...]:
    """The matrices that a refresh works on apart, one for each axis with a factor; none where it takes all at once."""
    representation = block.triple.representation
    if not isinstance(representation, FactoredAxes):
        return ()
    sides, rest = list(frame.shape), representation.unfactored(state)
    while rest > 1 and sides:
        rest //= sides.pop()
    return tuple(Matrix(f"factor {k}", d, w) for k, (d, w) in enumerate(zip(sides, _widths(frame, sides), strict=True)))


def _summed(block: Block, frame: Frame, state: State) -> int:
    """Bytes of what the passes of the ranks add up to: a vector for each gradient or product, else the statistic's tensors."""
    representation = block.triple.representation
    if not block.triple.curvature.layerwise or kinds(Gradient) <= block.triple.curvature.gives:
        return _bytes([frame.zeros(*frame.shape)])
    kept = slow(representation, state)
    return _bytes(v for k, v in state.items() if k not in kept and (v.ndim > 1 or adds(block)))


def _rows(block: Block, frame: Frame) -> int:
    """Bytes of the inputs and output gradients of one position that are gathered; zero where sums are."""
    curvature = block.triple.curvature
    if adds(block) or not any(kind.evidence is Outer for kind in curvature.gives):
        return 0
    site = block.sites[0]
    G, o, i = site.shape
    samples = int(getattr(curvature, "samples", 1))
    return G * (i - site.bias + samples * o) * torch.empty(0, dtype=frame.dtype).element_size()


def _per_member(block: Block, state: State) -> int:
    return _bytes(state.values()) // block.frame.stack


def _bytes(tensors: object) -> int:
    found: dict[int, Tensor] = {id(t): t for t in tensors}  # type: ignore[attr-defined]
    return sum(t.numel() * t.element_size() for t in found.values())
