"""Steps of element-wise methods of mini-batch gradients by one operator: average, statistic, division and ``.grad`` at once.

Blocks of ``BatchGradient x Diagonal x Division``, as those of Adam and AdaGrad, need nothing of a block at a time. Where torch
has the operator, and gradients are as it takes them, it reads and writes every number once; no cache is held then. On its own
in a plan, that of Adam is the last action of the step, and works in place; beside other blocks it works on copies.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import inf, isfinite, sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradmaker.blocks import Block
from gradmaker.capture.sites import Site
from gradmaker.config import GradientConfig
from gradmaker.curvature import BatchGradient
from gradmaker.linalg import fused
from gradmaker.linalg.state import State
from gradmaker.precision import Precision
from gradmaker.representations import Diagonal
from gradmaker.solvers import Division
from gradmaker.step.held import Held

__all__ = ["Elementwise", "Made", "elementwise"]

PARTS: tuple[type, ...] = (BatchGradient, Diagonal, Division)


class Made(NamedTuple):
    """What a step by one operator gives."""

    held: dict[Block, Held]  # of the blocks whose step it is, among them those without a gradient, which hold what they held
    gradients: dict[nn.Parameter, Tensor]  # to be written to ``.grad``
    write: Callable[[], None] | None = None  # writes statistics, averages and ``.grad`` in place, in their stead


@dataclass
class _Member:
    """A block, with what was seen of its tensors when they were new."""

    block: Block
    parameters: list[nn.Parameter]
    seen: tuple[Tensor, ...] = ()
    views: tuple[list[Tensor], ...] | None = None  # in the shapes of the parameters; None: the operator cannot have them

    def __getstate__(self) -> dict[str, object]:  # a copy's tensors are its own
        return {**vars(self), "seen": (), "views": None}

    def tensors(self, state: State, average: State) -> tuple[Tensor, ...]:
        return (state["diagonal"], average["average"]) if average else (state["diagonal"],)

    def look(self) -> tuple[list[Tensor], ...] | None:
        """Views of its tensors; reads the host where these are new. None unless all members have seen the same steps."""
        block = self.block
        now = self.tensors(block.state, block.average)
        if len(now) != len(self.seen) or any(a is not b for a, b in zip(now, self.seen, strict=True)):
            self.seen, regular = now, self._is_regular(now)
            self.views = tuple(self.in_shapes(t) for t in now) if regular else None
        return self.views

    def _is_regular(self, tensors: tuple[Tensor, ...]) -> bool:
        block = self.block
        if "failing" in block.cache and bool(block.cache["failing"].any()):
            return False
        masses = [part["mass"] for part in (block.state, block.average) if part]
        same = all(bool((mass == mass[0]).all()) for mass in masses)
        return same and all(t.is_contiguous() and bool(t.sum().isfinite()) for t in tensors)

    def in_shapes(self, stack: Tensor) -> list[Tensor]:
        """Views of the members of a stack in the shapes of their parameters."""
        return [stack[slot].view(p.shape) for slot, p in zip(self.block.slots, self.parameters, strict=True)]

    def gradients(self) -> list[Tensor] | None:
        """The gradients of all of its parameters; empty if there is none, None where the operator cannot have them."""
        found = [p.grad for p in self.parameters if p.requires_grad and p.grad is not None]
        if found and (len(found) < len(self.parameters) or not all(map(_is_plain, found))):
            return None
        return found


class _Due(NamedTuple):
    """A block whose step is by the operator, with its gradients, and the views of its statistic and average."""

    member: _Member
    g: list[Tensor]
    views: tuple[list[Tensor], ...]
    tensors: tuple[Tensor, ...]

    def copied(self, gradients: bool) -> _Due:
        """The same with copies of all that the operator writes."""
        tensors = tuple(t.clone() for t in self.tensors)
        g = [x.clone() for x in self.g] if gradients else self.g
        return _Due(self.member, g, tuple(map(self.member.in_shapes, tensors)), tensors)


class Elementwise:
    """Blocks of a plan with the same options, whose steps may be one operator."""

    def __init__(self, blocks: list[Block]) -> None:
        options, solver = blocks[0].options, blocks[0].triple.solver
        assert isinstance(solver, Division)
        self.beta1: float = options.beta1
        self.decay: float | None = options.decay
        self.damping: float = solver.damping
        self.corrected: bool = options.averaging == "corrected"
        self.members: list[_Member] = [_Member(b, [next(iter(s.parameters.values())) for s in b.sites]) for b in blocks]

    @property
    def blocks(self) -> list[Block]:
        return [member.block for member in self.members]

    def covers(self, blocks: Collection[Block]) -> bool:
        """Whether these are all of its blocks."""
        return len(blocks) == len(self.members)

    def step(self, sizes: Mapping[int, float], alone: bool) -> Made:
        """The step of the blocks that have it with the present ``.grad``; the others have to be formed.

        sizes: norms of gradients, by ``id``; alone: whether to write in place
        """
        due, held = list[_Due](), dict[Block, Held]()
        for member in self.members:
            g = member.gradients()
            if g == []:
                held[member.block] = member.block.held
            elif g is not None and self._are_small(g, sizes) and (views := member.look()) is not None:
                due.append(_Due(member, g, views, member.seen))
        if not due:
            return Made(held, {})
        return self._adam(due, held, alone) if self.beta1 else self._adagrad(due, held)

    def _are_small(self, g: list[Tensor], sizes: Mapping[int, float]) -> bool:
        """Whether no square overflows, nor the operator loses digits."""
        limit = fused.LARGEST if self.beta1 else inf
        return all(sizes.get(id(x), inf) <= limit and isfinite(sizes[id(x)]) for x in g)

    def _adam(self, due: list[_Due], held: dict[Block, Held], alone: bool) -> Made:
        assert self.decay is not None
        before = [each.member.block.held for each in due]
        counts = _moved([h.average["mass"] for h in before], self.beta1)
        masses = _moved([h.state["mass"] for h in before], self.decay)
        if not self.corrected:
            masses = [torch.ones_like(mass) for mass in masses]
        read = torch.stack([x[0] for x in (*masses, *counts)]).tolist()  # equal in all members of a block
        steps = list(zip(read[: len(due)], read[len(due) :], strict=True))
        alone = alone and len(set(steps)) == 1 and len(due) == len(self.members)
        if not alone:
            due = [each.copied(gradients=True) for each in due]
        for each, mass, count in zip(due, masses, counts, strict=True):
            (diagonal, average), block = each.tensors, each.member.block
            held[block] = _held(block, {"diagonal": diagonal, "mass": mass}, {"average": average, "mass": count})
        alike = {one: [each for each, own in zip(due, steps, strict=True) if own == one] for one in steps}
        calls = [self._call(group, *one) for one, group in alike.items()]
        if alone:
            return Made(held, {}, *calls)
        for call in calls:
            call()
        self._remember(held)
        return Made(held, {p: x for each in due for p, x in zip(each.member.parameters, each.g, strict=True)})

    def _call(self, due: list[_Due], mass: float, count: float) -> Callable[[], None]:
        """The operator on blocks of the same masses."""
        assert self.decay is not None
        g = [x for each in due for x in each.g]
        v, m = ([x for each in due for x in each.views[k]] for k in range(2))
        root = sqrt(mass)
        options = {"beta1": self.beta1, "beta2": self.decay, "factor": root / count, "damping": self.damping * root}
        return partial(fused.adam, g, m, v, **options)

    def _adagrad(self, due: list[_Due], held: dict[Block, Held]) -> Made:
        due = [each.copied(gradients=False) for each in due]
        for each in due:
            block, (diagonal,) = each.member.block, each.tensors
            state = {"diagonal": diagonal, "mass": torch.ones_like(block.state["mass"])}
            held[block] = _held(block, state, {})
        g, s = [x for each in due for x in each.g], [x for each in due for x in each.views[0]]
        steps = iter(fused.adagrad(g, s, self.damping))
        self._remember(held)
        return Made(held, {p: next(steps) for each in due for p in each.member.parameters})

    def _remember(self, held: Mapping[Block, Held]) -> None:
        """Take the new tensors for seen: they are as regular as those that they were made of."""
        for member in self.members:
            if (new := held.get(member.block, member.block.held)) is not member.block.held:
                member.seen = member.tensors(new.state, new.average)
                member.views = tuple(member.in_shapes(t) for t in member.seen)


def elementwise(blocks: Collection[Block], configs: Mapping[str, GradientConfig]) -> list[Elementwise]:
    """The blocks of a plan that may have such steps, those with equal options together.  configs: of the plan's methods"""
    groups: dict[object, list[Block]] = {}
    for b in blocks:
        config = configs[b.options.method]
        if config.curvature_interval == config.preconditioner_interval == 1 and _fits(b):
            groups.setdefault((b.triple, replace(b.options, method=""), b.frame.dtype), []).append(b)
    return [Elementwise(group) for group in groups.values()]


def _fits(block: Block) -> bool:
    """Whether a block is of these parts, with nothing beside them, and its parameters lie in it as they are."""
    t, o = block.triple, block.options
    parts: tuple[type, ...] = type(t.curvature), type(t.representation), type(t.solver)
    beside = o.grafting or o.nesterov_average or o.precision != Precision()
    if parts != PARTS or t.solver.exponent != -0.5 or beside or block.frame.device.type != "cpu":
        return False
    averages = o.decay is not None and o.averaging != "raw" and 0 < o.beta1 < 1 and fused.has_adam(block.frame.dtype)
    sums = o.decay is None and not o.beta1 and fused.has_adagrad(block.frame.dtype)
    return (averages or sums) and all(_is_whole(s, block) for s in block.sites)


def _is_whole(site: Site, block: Block) -> bool:
    (p, *more) = site.parameters.values()
    cut = more or site.rows or site.view is not None or site.rule is not None
    return not cut and site.shape == (1, *p.shape) and p.dtype == block.frame.dtype


def _is_plain(g: Tensor) -> bool:
    """Whether a gradient is a dense tensor of its own that the operator can write to."""
    return type(g) is Tensor and g.layout is torch.strided and g.is_contiguous() and not g.is_neg()


def _held(block: Block, state: State, average: State) -> Held:
    return Held(state, {}, average, block.grafting_state, block.names, implicit=True)


def _moved(masses: list[Tensor], decay: float) -> list[Tensor]:
    made = torch._foreach_mul(masses, decay)
    torch._foreach_add_(made, 1 - decay)
    return list(made)
