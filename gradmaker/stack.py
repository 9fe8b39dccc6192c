"""A stack of equal sites: their places in it, and the tensors that it holds."""

from __future__ import annotations

from math import prod
from typing import Any

from gradmaker import by_rows
from gradmaker.averages import basis_of, empty_average
from gradmaker.gathering import Members
from gradmaker.linalg.state import State
from gradmaker.placement import Placement, joined_frame, slots_of
from gradmaker.representations.roles import FactoredAxes
from gradmaker.solvers.roles import AveragesInBasis
from gradmaker.step.held import Held

__all__ = ["Stack"]


class Stack:
    """The members of a block, and what they hold."""

    def __init__(self, placements: list[Placement]) -> None:
        first = placements[0]
        self.sites = [p.site for p in placements]
        self.triple, self.options = first.triple, first.options
        self.full = self.triple.representation.grain == "full"
        self.frame = joined_frame(placements, self.full)
        self.slots = slots_of(placements, self.full)
        self.layout = Members(self.sites, self.slots, self.frame, self.full, first.joins_groups)
        whole = "full" if self.options.method == "method" else f"full, {self.options.method}"
        self.name = whole if self.full else self.sites[0].name
        self.row_layers = by_rows.layers_of(self.sites, self.frame, self.full)
        self.names = frozenset(site.name for site in self.sites)
        self.held = self.empty()
        self.versions: tuple[int, ...] = ()  # of its statistic at the end of the last step that changed the block
        self.released = False  # whether the cache is to be made again from the statistic
        self.owner: int | None = None  # the rank that holds it; None: all do
        self.owned = True  # whether this rank holds it
        self.share = 0.0  # offset of its refresh, as a share of the interval

    def give_to(self, owner: int, rank: int) -> None:
        """Let one rank hold what the block holds, and the others nothing."""
        self.owner, self.owned = owner, owner == rank
        if not self.owned:
            self.held = Held({}, {}, {}, {})

    def empty(self) -> Held:
        """What the block holds before any evidence."""
        grafting, average = self.options.grafting, empty_average(self.frame, self.basis, self.options)
        grafting_state = grafting.init(self.frame) if grafting else {}
        return Held(self.triple.representation.init(self.frame), {}, average, grafting_state)

    @property
    def state(self) -> State:
        """The statistic of the curvature."""
        return self.held.state

    @property
    def cache(self) -> State:
        """The cache of the last refresh; empty before the first."""
        return self.held.cache

    @property
    def average(self) -> State:
        """The running average of gradients, with its mass; empty where beta1 is 0."""
        return self.held.average

    @property
    def grafting_state(self) -> State:
        """The state of the grafting rule."""
        return self.held.grafting_state

    @property
    def ready(self) -> frozenset[str]:
        """Sites for which the cache was computed from a statistic that is not empty."""
        return self.held.ready

    @property
    def cost(self) -> float:
        """Relative cost of a refresh: the cubes of its matrices."""
        sides = [s for j, s in enumerate(self.frame.shape) if j not in self.frame.diagonal]
        if not isinstance(self.triple.representation, FactoredAxes):
            sides = [prod(self.frame.shape)]
        longest = self.frame.longest or max(sides, default=1)
        return float(self.frame.stack * sum(s * min(s, longest) ** 2 for s in sides) + 1)

    @property
    def bytes(self) -> int:
        """Bytes of what it holds; a cache may be the state itself."""
        parts = (self.state, self.cache, self.average, self.grafting_state)
        held = {id(t): t for part in parts for t in part.values()}
        return sum(t.numel() * t.element_size() for t in held.values())

    def holds_like(self, other: Stack) -> bool:
        """Whether a member of this block has a statistic of the same form as one of another block."""
        own, given = self.triple, other.triple
        same = (own.curvature, own.representation) == (given.curvature, given.representation)
        return same and self.frame.shape == other.frame.shape

    def members(self) -> list[str]:
        """Names of the members of the stack: that of the site, with an index where it has several."""
        if self.full:
            return [self.name]
        counts = [slot.stop - slot.start for slot in self.slots]
        named = zip(self.sites, counts, strict=True)
        return [s.name if count == 1 else f"{s.name}[{j}]" for s, count in named for j in range(count)]

    @property
    def basis(self) -> AveragesInBasis[Any] | None:
        """The solver, where gradients are averaged in its basis."""
        return basis_of(self.triple, self.options, len(self.frame.shape))
