"""Protocols: what attachments, reports and checkpoints use of a maker."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from gradmaker.capture.arrangement import Arrangement
from gradmaker.capture.row_calls import RowLayer
from gradmaker.capture.tape import OutputGradients, Tape
from gradmaker.config import GradientConfig
from gradmaker.curvature.evidence import Evidence
from gradmaker.curvature.step import NOTHING, Extra, Previous
from gradmaker.loss.head import Head
from gradmaker.loss.share import Share
from gradmaker.loss.terms import Terms
from gradmaker.plan import Plan
from gradmaker.scale.ranks import Ranks
from gradmaker.step.draft import Draft
from gradmaker.step.state import StepState
from gradmaker.trust_region.policy import TrustRegion

__all__ = ["CheckedMaker", "MakerOfSteps", "RecordingMaker", "SavedMaker"]


class MakerOfSteps(Protocol):
    """A maker with a plan for a model."""

    plan: Plan

    @property
    def model(self) -> nn.Module: ...
    @property
    def config(self) -> GradientConfig: ...
    @property
    def step_state(self) -> StepState: ...
    @property
    def unseen(self) -> frozenset[str]: ...


class RecordingMaker(MakerOfSteps, Protocol):
    """A maker whose passes another loop runs."""

    @property
    def arrangement(self) -> Arrangement: ...
    def serve(self, parameters: frozenset[nn.Parameter] | None) -> None: ...
    def follow(self) -> None: ...
    def begin_pass(self) -> bool: ...
    def passes_are_due(self) -> bool: ...
    def row_layers(self) -> list[RowLayer]: ...
    def new_tape(self, everything: bool = False) -> Tape: ...
    def is_to_be_checked(self, tape: Tape, head: Head) -> bool: ...
    def check(self, tape: Tape, head: Head, output_gradients: OutputGradients | None, weight: float = 0.0) -> None: ...
    def measure_pass(
        self,
        draft: Draft,
        tape: Tape,
        terms: list[Terms],
        weight: float,
        check: list[Tensor],
        output_gradients: OutputGradients | None = None,
        head: Head | None = None,
        extra: Extra = NOTHING,
        scale: float = 1.0,
    ) -> None: ...
    def precondition(self) -> None: ...
    def meeting(self) -> AbstractContextManager[None]: ...
    def share_of_replica(self, terms: Sequence[Terms], examples: int, trouble: float) -> tuple[Share | None, float]: ...


class CheckedMaker(MakerOfSteps, Protocol):
    """A maker whose declared pass a report repeats."""

    @property
    def arrangement(self) -> Arrangement: ...
    @property
    def declared(self) -> bool: ...
    def new_tape(self, everything: bool = False) -> Tape: ...
    def evaluate(self) -> tuple[Any, Tensor, Tensor | None]: ...


class SavedMaker(MakerOfSteps, Protocol):
    """A maker with a state to save."""

    @property
    def trust_region(self) -> TrustRegion | None: ...
    @property
    def ranks(self) -> Ranks | None: ...
    @property
    def arrangement(self) -> Arrangement: ...
    def secants(self, previous: Previous) -> dict[str, Evidence]: ...
    def plan_again(self, unseen: frozenset[str]) -> None: ...
    def adopt(self, plan: Plan, unseen: frozenset[str]) -> None: ...
