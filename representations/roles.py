"""What some representations are or do besides holding ``C``; the library asks for it by these classes and functions."""

from __future__ import annotations

from abc import abstractmethod
from math import prod
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from gradmaker.linalg.mode_products import kronecker_product
from gradmaker.linalg.state import State
from gradmaker.representations.base import Representation
from gradmaker.representations.capabilities import Elementwise, Multiplies

__all__ = [
    "ByExample",
    "Compact",
    "FactoredAxes",
    "OwnOrder",
    "PerStep",
    "Renewal",
    "Renewed",
    "SlowTensors",
    "Snapshots",
    "Unstacked",
    "WholeLayers",
    "diagonal_axes",
    "duplicate",
    "groups_rows",
    "has_refresh",
    "release",
    "renewal",
    "skips_first",
    "slow",
    "snapshot",
    "widen",
]

Renewal: TypeAlias = Literal["refresh", "measurement", "step"]
"""When a solver prepares its cache anew: at a refresh, after every measurement as well, or at every step."""


# ------------------------------------------------------------------ the blocks and their size
class FactoredAxes(Representation):
    """Every axis of a block has a factor of its own, which may be a diagonal."""

    def long_axes(self, shape: tuple[int, ...], max_dim: int) -> frozenset[int]:
        """Axes whose factor is held as a diagonal because they are long."""
        return frozenset(axis for axis, d in enumerate(shape) if d > max_dim)

    def unfactored(self, state: State) -> int:
        """Entries along the last axes, where these have the identity and no factor."""
        return 1


class Compact(Representation):
    """It holds less than a matrix of a whole block."""

    def largest_side(self, shape: tuple[int, ...]) -> int:
        """Of the largest matrix that is held for a block of this shape; zero where there is none."""
        return 0


class WholeLayers(Representation):
    """At granularity ``layer`` all groups of a layer (channels of a norm layer, groups of a convolution) make one block."""


class ByExample(Representation):
    """Its statistic may depend on which rows of a pass are one example's, beyond the sum of their products."""

    @property
    @abstractmethod
    def groups(self) -> bool:
        """Whether it does."""


def groups_rows(representation: Representation) -> bool:
    """Whether the statistic depends on which rows are one example's."""
    return isinstance(representation, ByExample) and representation.groups


def diagonal_axes(representation: Representation, shape: tuple[int, ...], max_dim: int) -> frozenset[int]:
    """Axes of a block that are held as a diagonal. ValueError where a matrix would be too large and that is no way out."""
    if isinstance(representation, FactoredAxes):
        return representation.long_axes(shape, max_dim)
    if isinstance(representation, Elementwise):
        return frozenset()
    side = representation.largest_side(shape) if isinstance(representation, Compact) else prod(shape)
    if side > max_dim:
        raise ValueError(
            f"{type(representation).__name__}({representation.grain}) would hold a {side} x {side} matrix for a block of shape "
            f"{shape}: raise max_dim (now {max_dim}), leave the layer out with ignore=, or choose a leaner representation"
        )
    return frozenset()


def widen(representation: Multiplies, state: State, P: Tensor) -> Tensor:
    """An operator on the axes that have factors as one on the whole block, ``P (x) I``.  # (B, d, d) -> (B, d n, d n)"""
    n = representation.unfactored(state) if isinstance(representation, FactoredAxes) else 1
    return P if n == 1 else kronecker_product([P, torch.eye(n, dtype=P.dtype, device=P.device).expand(len(P), n, n)])


# ------------------------------------------------------------------ the state
class Unstacked(Representation):
    """Its state is the latest evidence itself, of other shapes or names at every update: members are never stacked."""

    def duplicate(self, state: State) -> State:
        """A copy that `update` may write into, also of the plain dict that a checkpoint has."""
        return _cloned(state)


class Snapshots(Representation):
    """Its state is not what a solver's cache takes over as it is."""

    @abstractmethod
    def snapshot(self, state: State) -> State:
        """What is taken over of a state, or once more of a cache: tensors to be replaced, not written to."""


class SlowTensors(Representation):
    """Tensors of its state, bases as a rule, are written to by refreshes alone, the first evidence of a member among them."""

    @abstractmethod
    def slow(self, state: State) -> frozenset[str]:
        """Their names."""


def duplicate(representation: Representation, state: State, refresh: bool = True) -> State:
    """A copy that `update` may write into.  refresh: whether refreshes may, too; else what is slow is shared"""
    if isinstance(representation, Unstacked):
        return representation.duplicate(state)
    shared = frozenset[str]() if refresh else slow(representation, state)
    return {k: v if k in shared else v.clone() for k, v in state.items()}


def slow(representation: Representation, state: State) -> frozenset[str]:
    """Names of the tensors that only a refresh writes to."""
    return representation.slow(state) if isinstance(representation, SlowTensors) else frozenset()


def snapshot(representation: Multiplies, state: State) -> State:
    """What the cache of a solver that multiplies, or applies, takes over of a statistic: tensors that are not written to."""
    return representation.snapshot(state) if isinstance(representation, Snapshots) else dict(state)


def _cloned(state: State) -> State:
    return {k: v.clone() for k, v in state.items()}


# ------------------------------------------------------------------ the times
class Renewed(Representation):
    """A solver's cache may be prepared anew more often than the statistic is refreshed."""

    @property
    @abstractmethod
    def renewal(self) -> Renewal:
        """How often."""


class PerStep(Renewed):
    """Its state is valid for one step only: it is measured at every one, whatever the intervals."""

    @property
    def renewal(self) -> Renewal:
        return "step"

    def release(self, state: State) -> None:
        """Let go of what ends with the step; called at the end of every one."""


class OwnOrder(Representation):
    """The order within a step is its own: `update` calls `refresh`, where `Fold.refresh` says that it is due."""

    @property
    def skips_first(self) -> bool:
        """Whether the step of a block's first evidence is left out: it gets zero, and its average of gradients stands still."""
        return False


def renewal(representation: Multiplies) -> Renewal:
    """When a solver prepares its cache anew."""
    return representation.renewal if isinstance(representation, Renewed) else "refresh"


def release(representation: Representation, state: State) -> None:
    """Let go of what ends with a step."""
    if isinstance(representation, PerStep):
        representation.release(state)


def skips_first(representation: Representation) -> bool:
    """Whether the step of a block's first evidence is left out."""
    return isinstance(representation, OwnOrder) and representation.skips_first


def has_refresh(representation: Representation) -> bool:
    """Whether the statistic has a part that `refresh` renews."""
    return type(representation).refresh is not Representation.refresh
