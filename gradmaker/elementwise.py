"""Steps of element-wise methods of mini-batch gradients by one operator: average, statistic, division and ``.grad`` at once.

A plan all of whose blocks are ``BatchGradient x Diagonal x Division``, as that of Adam or AdaGrad, needs nothing of a block at
a time. Where torch has the operator, and gradients are as it takes them, it reads and writes every number once. That of Adam
is the last action of a step, so that its statistics are changed in place. It holds no cache: a step that is formed block by
block prepares one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from math import inf, isfinite, sqrt

import torch
from torch import Tensor, nn

from gradmaker.blocks import Block
from gradmaker.capture.sites import Site
from gradmaker.config import GradientConfig
from gradmaker.curvature import BatchGradient
from gradmaker.linalg import fused
from gradmaker.precision import Precision
from gradmaker.representations import Diagonal
from gradmaker.solvers import Division
from gradmaker.step.draft import Work
from gradmaker.step.held import Held

__all__ = ["Elementwise", "Written"]

PARTS: tuple[type, ...] = (BatchGradient, Diagonal, Division)


@dataclass(frozen=True)
class Written:
    """What a step by one operator gives: the blocks' new contents, and gradients to be written or what writes them itself."""

    work: Work
    gradients: dict[nn.Parameter, Tensor]
    write: Callable[[], None] | None  # writes statistics and gradients, in place


class Elementwise:
    """The blocks of a plan whose steps may be one operator, with views of their tensors in the shapes of the parameters."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        options, solver = blocks[0].options, blocks[0].triple.solver
        assert isinstance(solver, Division)
        self.beta1: float = options.beta1
        self.decay: float | None = options.decay
        self.damping: float = solver.damping
        self.corrected: bool = options.averaging == "corrected"
        self.parameters: list[nn.Parameter] = [next(iter(site.parameters.values())) for block in blocks for site in block.sites]
        self._names: frozenset[str] = frozenset(site.name for block in blocks for site in block.sites)
        self._seen: list[Tensor] = []  # the tensors that were looked at
        self._views: list[list[Tensor]] | None = (
            None  # of the statistics and the averages; None: as the operator cannot have them
        )

    def __getstate__(self) -> dict[str, object]:  # a copy's tensors are its own
        return {**vars(self), "_seen": [], "_views": None}

    @classmethod
    def of(cls, blocks: list[Block], configs: Iterable[GradientConfig]) -> Elementwise | None:
        """None where any block is of other parts, or is not measured and refreshed at every step, or options differ.

        configs: of the methods of the plan
        """
        if not blocks or not all(map(_every_step, configs)) or not all(map(_fits, blocks)):
            return None
        kinds = {(b.triple, replace(b.options, method=""), b.frame.dtype) for b in blocks}
        known = fused.has_adam if blocks[0].options.beta1 else fused.has_adagrad
        return cls(blocks) if len(kinds) == 1 and known(blocks[0].frame.dtype) else None

    def step(self, size: float) -> Written | None:
        """The step with the present ``.grad``; None where it has to be formed.  size: bound of the gradients' entries"""
        if not size <= (fused.LARGEST if self.beta1 else inf) or not isfinite(size) or not self._look():
            return None
        found = [p.grad for p in self.parameters]
        g = [x for x in found if x is not None and _is_plain(x)]
        if len(g) < len(found) or not all(p.requires_grad for p in self.parameters):
            return None
        return self._adam(g) if self.beta1 else self._adagrad(g)

    def _adam(self, g: list[Tensor]) -> Written:
        assert self._views is not None and self.decay is not None
        held = [block.held for block in self.blocks]
        masses = [h.state["mass"] for h in held]
        counts = _moved([h.average["mass"] for h in held], self.beta1)
        masses = _moved(masses, self.decay) if self.corrected else [torch.ones_like(mass) for mass in masses]
        root, count = sqrt(float(masses[0][0])), float(counts[0][0])  # equal in all members
        v, m = self._views
        options = {"beta1": self.beta1, "beta2": self.decay, "factor": root / count, "damping": self.damping * root}
        made = {
            b: Held({**h.state, "mass": mass}, {}, {**h.average, "mass": n}, h.grafting_state)
            for b, h, mass, n in zip(self.blocks, held, masses, counts, strict=True)
        }
        return Written(Work(made, self._names), {}, partial(torch.no_grad()(fused.adam), g, m, v, **options))

    def _adagrad(self, g: list[Tensor]) -> Written:
        held = [block.held for block in self.blocks]
        states = [{k: x.clone() for k, x in h.state.items()} for h in held]
        self._seen = [state["diagonal"] for state in states]
        s = [x for b, state in zip(self.blocks, states, strict=True) for x in _in_shapes(b, state["diagonal"])]
        found = fused.adagrad(g, s, self.damping)
        for state in states:
            state["mass"].fill_(1.0)
        made = {b: Held(state, {}, {}, h.grafting_state) for b, h, state in zip(self.blocks, held, states, strict=True)}
        return Written(Work(made, self._names), dict(zip(self.parameters, found, strict=True)), None)

    def _look(self) -> bool:
        """Whether the operator can have what the blocks hold: reads the host where their tensors are new ones."""
        now = [t for b in self.blocks for t in (b.state["diagonal"], *([b.average["average"]] if self.beta1 else ()))]
        if len(now) != len(self._seen) or any(a is not b for a, b in zip(now, self._seen, strict=True)):
            self._seen = now
            self._views = self._viewed() if self._is_regular(now) else None
        return self._views is not None

    def _is_regular(self, tensors: list[Tensor]) -> bool:
        """Whether tensors lie as they are named, all members have seen the same steps, and no refresh has failed."""
        if any(not t.is_contiguous() or not bool(t.sum().isfinite()) for t in tensors):
            return False
        if any(bool(b.cache["failing"].any()) for b in self.blocks if "failing" in b.cache):
            return False
        masses = [
            torch.cat([part["mass"] for part in parts])
            for parts in zip(*([b.state, b.average] for b in self.blocks), strict=True)
            if all(parts)
        ]
        return all(bool((mass == mass[0]).all()) for mass in masses)

    def _viewed(self) -> list[list[Tensor]]:
        parts = [[b.state["diagonal"] for b in self.blocks]]
        if self.beta1:
            parts.append([b.average["average"] for b in self.blocks])
        return [[x for b, t in zip(self.blocks, part, strict=True) for x in _in_shapes(b, t)] for part in parts]


def _every_step(config: GradientConfig) -> bool:
    return config.curvature_interval == config.preconditioner_interval == 1


def _fits(block: Block) -> bool:
    """Whether a block is of these parts, with nothing beside them, and its parameters lie in it as they are."""
    t, o = block.triple, block.options
    parts: tuple[type, ...] = type(t.curvature), type(t.representation), type(t.solver)
    if parts != PARTS or t.solver.exponent != -0.5 or o.grafting or o.nesterov_average or o.precision != Precision():
        return False
    averages = o.decay is not None and o.averaging != "raw" and 0 < o.beta1 < 1
    sums = o.decay is None and not o.beta1
    return (averages or sums) and block.frame.device.type == "cpu" and all(_is_whole(s, block) for s in block.sites)


def _is_whole(site: Site, block: Block) -> bool:
    (p, *more) = site.parameters.values()
    cut = more or site.rows or site.view is not None or site.rule is not None
    return not cut and site.shape == (1, *p.shape) and p.dtype == block.frame.dtype


def _is_plain(g: Tensor) -> bool:
    """Whether a gradient is a dense tensor of its own that the operator can write to."""
    return type(g) is Tensor and g.layout is torch.strided and g.is_contiguous() and not g.is_neg()


def _moved(masses: list[Tensor], decay: float) -> list[Tensor]:
    made = torch._foreach_mul(masses, decay)
    torch._foreach_add_(made, 1 - decay)
    return list(made)


def _in_shapes(block: Block, stack: Tensor) -> list[Tensor]:
    """Views of the members of a stack in the shapes of their parameters."""
    shapes = [next(iter(site.parameters.values())).shape for site in block.sites]
    return [stack[slot].view(shape) for slot, shape in zip(block.slots, shapes, strict=True)]
