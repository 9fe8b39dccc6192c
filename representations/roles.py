"""Base classes of representations that need more than `init`, `update` and `to_dense`; the library recognises them by these."""

from __future__ import annotations

from abc import abstractmethod
from math import prod
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Evidence
from gradmaker.linalg.factored_gradient import FactoredGradient
from gradmaker.linalg.mode_products import kronecker_product
from gradmaker.linalg.state import State
from gradmaker.linalg.writes import Writer
from gradmaker.representations.base import Fold, Representation
from gradmaker.representations.capabilities import Elementwise, Multiplies

__all__ = [
    "PROJECTED",
    "Additive",
    "ByExample",
    "Compact",
    "FactoredAxes",
    "FoldsLast",
    "FoldsMoments",
    "FoldsRows",
    "OwnOrder",
    "PerStep",
    "PreconditionsRows",
    "Projects",
    "Renewal",
    "Renewed",
    "SlowTensors",
    "Snapshots",
    "SpansGradient",
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
"""When a solver prepares its cache: at a refresh, also after every measurement, or at every step."""


# ------------------------------------------------------------------ the blocks and their size
class FactoredAxes(Representation):
    """A representation with one factor for each axis of a block, which may be a diagonal."""

    def long_axes(self, shape: tuple[int, ...], max_dim: int) -> frozenset[int]:
        """Axes whose factor is a diagonal because they are long."""
        return frozenset(axis for axis, d in enumerate(shape) if d > max_dim)

    def unfactored(self, state: State) -> int:
        """Number of entries along the last axes, where these have the identity and no factor."""
        return 1


class Compact(Representation):
    """A representation smaller than a matrix of a whole block."""

    def largest_side(self, shape: tuple[int, ...]) -> int:
        """Side of the largest matrix that is held for a block of this shape; zero for none."""
        return 0


class WholeLayers(Representation):
    """At granularity ``layer`` one block holds all groups of a layer (channels of a norm layer, groups of a convolution)."""


class ByExample(Representation):
    """A representation whose statistic may depend on which rows belong to one example, not only on the sum of products."""

    @property
    @abstractmethod
    def groups(self) -> bool:
        """Whether it does depend on them."""


def groups_rows(representation: Representation) -> bool:
    """Whether the statistic depends on which rows belong to one example."""
    return isinstance(representation, ByExample) and representation.groups


def diagonal_axes(representation: Representation, shape: tuple[int, ...], max_dim: int) -> frozenset[int]:
    """Axes of a block that have a diagonal. ValueError where a matrix is too large and a diagonal does not replace it."""
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
    """An operator on the axes with factors, as one on the whole block: ``P (x) I``.  # (B, d, d) -> (B, d n, d n)"""
    n = representation.unfactored(state) if isinstance(representation, FactoredAxes) else 1
    return P if n == 1 else kronecker_product([P, torch.eye(n, dtype=P.dtype, device=P.device).expand(len(P), n, n)])


# ------------------------------------------------------------------ the state
class Additive(Representation):
    """The statistic of rows is a sum over them, zero at the beginning: those of the parts of a batch add up to the batch's."""


class Unstacked(Representation):
    """A representation whose state has other shapes or names after every update: its members are never stacked."""

    def duplicate(self, state: State) -> State:
        """A copy that `update` may change, also of the plain dict of a checkpoint."""
        return _cloned(state)


class Snapshots(Representation):
    """A representation whose state needs a conversion before a solver's cache takes it over."""

    @abstractmethod
    def snapshot(self, state: State) -> State:
        """The state, or a cache, in the form of a cache: its tensors are replaced, not written to."""


class SlowTensors(Representation):
    """Tensors of its state, bases as a rule, are written to by refreshes alone, the first evidence of a member among them."""

    @abstractmethod
    def slow(self, state: State) -> frozenset[str]:
        """Their names."""


def duplicate(representation: Representation, state: State, refresh: bool = True, last: frozenset[str] = frozenset()) -> State:
    """A copy that `update` may write into.

    refresh: whether refreshes may, too; else what is slow is shared.  last: names of what is written at the end alone
    """
    if isinstance(representation, Unstacked):
        return representation.duplicate(state)
    shared = last if refresh else last | slow(representation, state)
    return {k: v if k in shared else v.clone() for k, v in state.items()}


def slow(representation: Representation, state: State) -> frozenset[str]:
    """Names of the tensors that only a refresh writes to."""
    return representation.slow(state) if isinstance(representation, SlowTensors) else frozenset()


def snapshot(representation: Multiplies, state: State) -> State:
    """What the cache of a solver that calls `matvec` or `apply` takes over of a statistic: tensors that are not written to."""
    return representation.snapshot(state) if isinstance(representation, Snapshots) else dict(state)


def _cloned(state: State) -> State:
    return {k: v.clone() for k, v in state.items()}


# ------------------------------------------------------------------ the evidence
class FoldsRows(Representation):
    """A representation of matrices whose statistic of a mini-batch gradient has a short form in the rows of the gradient."""

    @abstractmethod
    def update_rows(self, state: State, rows: FactoredGradient, fold: Fold) -> None:
        """Fold the gradient in, in place; `update` with the formed gradient does the same."""


class SpansGradient(Representation):
    """A representation by rows ``J`` which the gradient of the step itself may be a combination of."""

    @abstractmethod
    def own(self, state: State) -> Tensor | None:
        """``y`` with ``J^T y`` the gradient of the step whose evidence is held; None where that is not known.  # (B, N)"""

    @abstractmethod
    def weighted(self, state: State, z: Tensor) -> Tensor | list[FactoredGradient | Tensor] | None:
        """``J^T z``, or that of each layer, by rows or formed; None where a layer is no single matrix.  # (B, N)"""

    @abstractmethod
    def project_rows(self, state: State, rows: FactoredGradient) -> Tensor | None:
        """``J G`` of a block of one layer, by rows; None where `form` takes less work, or the layer has none.  # (B, N)"""


class FoldsLast(Representation):
    """A representation whose `update` does not read what `fold` has written, so that these writes may come last in a step.

    A subclass with an `update` of its own folds at once, unless it has a `fold` of its own.
    """

    folds_last: ClassVar[bool] = False
    folds_twice: ClassVar[bool] = True
    """Whether a second fold takes little beside a refresh at every step, for which it is made in a copy first."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        own = vars(cls)
        if "fold" in own or own.keys() & {"update", "update_rows"}:
            cls.folds_last = "fold" in own

    @abstractmethod
    def fold(self, state: State, evidence: Evidence | FactoredGradient, fold: Fold, write: Writer) -> None:
        """`update`, or `update_rows`, by a writer; the part of it that `Fold.postponed` leaves out, where that is not all."""

    def last(self, state: State, evidence: Evidence | FactoredGradient, fold: Fold) -> frozenset[str]:
        """Names of the tensors that `fold` writes to; fewer than all where no solver reads them, none where `update` does."""
        return frozenset(state)

    def settle(self, state: State) -> None:
        """Divide sums by their masses, in place, for a copy of a statistic that a solver reads and that gets no evidence."""


class FoldsMoments(Representation):
    """A representation that folds moments of layer inputs and output gradients in at once, and holds no rows of them."""


class PreconditionsRows(Representation):
    """A representation of matrices that holds ``P``, of which a factor multiplies each side."""

    @abstractmethod
    def apply_rows(self, state: State, rows: FactoredGradient) -> FactoredGradient:
        """``P G`` by the rows of ``G``; `apply` of the formed gradient gives the same."""


PROJECTED = "projected"
"""What `Projects` keeps in a state until the step ends."""


class Projects(Representation):
    """A representation whose `update` projects gradients onto a basis; where `Fold.solved`, the result is kept in the state."""


# ------------------------------------------------------------------ the times
class Renewed(Representation):
    """A representation for which a solver may prepare its cache more often than the statistic is refreshed."""

    @property
    @abstractmethod
    def renewal(self) -> Renewal:
        """When the cache is prepared."""


class PerStep(Renewed):
    """A representation whose state is valid for one step: it is measured at every step, whatever the intervals."""

    @property
    def renewal(self) -> Renewal:
        return "step"

    def release(self, state: State) -> None:
        """Free what is valid until the end of the step; called then."""


class OwnOrder(Representation):
    """A representation whose `update` calls `refresh` itself, where `Fold.refresh` says that it is due."""

    @property
    def skips_first(self) -> bool:
        """Whether a block's first step is left out: it gets zero, and its gradient average is not updated."""
        return False


def renewal(representation: Multiplies) -> Renewal:
    """When a solver prepares its cache."""
    return representation.renewal if isinstance(representation, Renewed) else "refresh"


def release(representation: Representation, state: State) -> None:
    """Free what is valid until the end of a step."""
    if isinstance(representation, PerStep):
        representation.release(state)


def skips_first(representation: Representation) -> bool:
    """Whether a block's first step is left out."""
    return isinstance(representation, OwnOrder) and representation.skips_first


def has_refresh(representation: Representation) -> bool:
    """Whether `refresh` changes the statistic."""
    return type(representation).refresh is not Representation.refresh
