"""The base class of representations, and how evidence enters a statistic."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from gradmaker.curvature.evidence import Evidence
from gradmaker.curvature.evidence_kinds import Kind, check_kinds
from gradmaker.linalg.state import State
from gradmaker.linalg.writes import Writer, at_once

__all__ = ["NEWEST_ALONE", "NO_LIMIT", "NO_REFRESH", "Fold", "Frame", "Grain", "Representation", "average", "settle"]

NEWEST_ALONE = {"decay": "the newest step alone is held, as with decay=0; larger batches or accumulate() average more"}
_AT_ONCE = "P itself is held, and every step applies it as it is; curvature_interval says how often it is updated"
NO_REFRESH = {"preconditioner_interval": _AT_ONCE, "stagger": _AT_ONCE}
NO_LIMIT = {"max_dim": "no matrix is held for a long axis, so that none is too large; leave layers out with ignore="}

Grain: TypeAlias = Literal["full", "layer", "unit", "tensor"]
"""Granularity of a block: all layers as one vector (P,); the matrix of a layer (o, i); a row of it (i,); a parameter tensor."""


@dataclass(frozen=True)
class Frame:
    """The shape, dtype and device that a statistic is allocated for: ``B`` blocks of one shape."""

    stack: int  # B
    shape: tuple[int, ...]  # of one block
    diagonal: frozenset[int]  # axes whose factor is a diagonal (one-hot inputs, axes over ``max_dim``)
    dtype: torch.dtype
    device: torch.device
    longest: int | None = None  # largest side of a dense matrix, for representations that tile longer axes; None: no limit
    tied: bool = False  # whether the block is a table with two uses, whose evidence is `Tied`

    def zeros(self, *shape: int) -> Tensor:
        """A statistic of zeros.  # (B, *shape)"""
        return torch.zeros(self.stack, *shape, dtype=self.dtype, device=self.device)

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised tensor, to be overwritten.  # (B, *shape)"""
        return torch.empty(self.stack, *shape, dtype=self.dtype, device=self.device)

    def unit(self, side: int, value: float = 1.0) -> Tensor:
        """``value I``, without a temporary matrix.  # (B, side, side)"""
        out = self.zeros(side, side)
        out.diagonal(dim1=-2, dim2=-1).fill_(value)
        return out


@dataclass(frozen=True)
class Fold:
    """The weights with which a piece of evidence enters a running statistic: ``S <- beta S + alpha E``; ``mass`` likewise.

    With an exponential average (decay ``d``) the first evidence of a step has ``beta = d, alpha = mass = 1 - d``; a further
    micro-batch of the same step has ``beta = 1, mass = 0``. ``S / mass`` is the bias-corrected average. A plain sum
    (``decay = None``) keeps its mass at one.

    ``alpha`` includes the weight of the micro-batch in the loss, as a sum over examples needs it. A mean over positions is
    weighed by the number of counted positions instead, independently of the loss: ``S <- beta S + share sum_r a_r a_r^T`` and
    ``mass <- beta mass + share c`` for ``c`` positions.
    """

    beta: float
    alpha: float
    mass: float
    summed: bool = False
    of_step: float | None = None
    """``alpha`` without the weight of the micro-batch; None where that is 1."""
    refresh: bool = False
    """Whether the refresh of the statistic is due, at this first evidence of the step."""
    first: bool = False
    """Whether these members of the stack had no evidence before this step."""
    index: int = 0
    """Number of measured steps before this one."""
    solved: bool = False
    """Whether the evidence is the gradient that the step solves for, of all members: `Projects` keeps its coordinates."""
    postponed: bool = False
    """Whether `FoldsLast.fold` gets the evidence at the end of the step, so that `update` leaves that part out."""

    def of(self, again: bool, first: bool) -> Fold:
        """The fold of some members.  again: whether they had evidence earlier in this step; first: see the field"""
        if again:
            return replace(self, beta=1.0, mass=0.0, refresh=False, first=first)
        return replace(self, refresh=True, first=True) if first else self

    @property
    def begins(self) -> bool:
        """Whether this is the first evidence of the step."""
        return self.mass > 0

    @property
    def share(self) -> float:
        """The weight of a counted position in a mean."""
        return self.alpha if self.of_step is None else self.of_step

    def weigh_(self, mass: Tensor, write: Writer = at_once) -> None:
        """Update the mass of a statistic that is a sum over examples.  # (B,)"""
        if self.summed:
            write(mass.fill_, 1.0)
        else:
            write(mass.mul_, self.beta)
            write(mass.add_, self.mass)

    def weigh_mean_(self, mass: Tensor, counted: float | Tensor, write: Writer = at_once) -> None:
        """Update the mass of a statistic that is a mean over ``counted`` positions.  # (B,), ()"""
        write(mass.mul_, self.beta)
        write(mass.add_, self.share * counted)


def average(total: Tensor, mass: Tensor) -> Tensor:
    """``S / mass``, the bias-corrected statistic; zero where there was no evidence.  # (B, ...), (B,) -> (B, ...)"""
    if mass.device.type == "cpu" and bool((mass == 1).all()):
        return total  # the statistic itself, which nothing writes to
    return total / torch.where(mass > 0, mass, 1.0).view(-1, *[1] * (total.ndim - 1))


def settle(total: Tensor, mass: Tensor) -> None:
    """Make a sum its own `average`, in place: what nobody adds evidence to any more needs no second copy."""
    total.div_(torch.where(mass > 0, mass, 1.0).view(-1, *[1] * (total.ndim - 1)))
    mass.copy_(mass > 0)


class Representation(ABC):
    """A form in which ``C`` is held for a stack of equal blocks. `init`, `update` and `to_dense` make it correct."""

    takes: ClassVar[frozenset[Kind]]
    """The evidence that `update` accepts: classes and kinds, made by `kinds`."""

    inapplicable: ClassVar[dict[str, str]] = {}
    """Options of a config without effect on this representation, with the reason and an alternative: configs refuse them."""

    def __init_subclass__(cls) -> None:
        check_kinds(cls, "takes")

    @property
    @abstractmethod
    def grain(self) -> Grain:
        """The granularity of the blocks."""

    @abstractmethod
    def init(self, frame: Frame) -> State:
        """The statistic before any evidence."""

    @abstractmethod
    def update(self, state: State, evidence: Evidence, fold: Fold) -> None:
        """Fold evidence into ``state`` in place; ``state`` is the part of the stack that has this evidence.

        One call is for all members whose operands have one shape, stacked along the axis ``G`` of the evidence.
        """

    def refresh(self, state: State) -> None:  # noqa: B027
        """Recompute bases and roots in the statistic, in place. The maker calls it every ``preconditioner_interval`` steps.

        The call comes after the evidence of the step, or from within `update`: see `OwnOrder`.
        """

    @abstractmethod
    def to_dense(self, state: State) -> Tensor:
        """The matrix that is represented, bias-corrected: the contract and the oracle.  # (B, P, P)"""

    def matvec(self, state: State, v: Tensor) -> Tensor:
        """``C v``, through `to_dense` unless overridden.  # (B, *shape)"""
        return (self.to_dense(state) @ v.reshape(v.shape[0], -1, 1)).reshape(v.shape)
