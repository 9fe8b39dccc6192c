"""The part of a maker that knows of other processes: passes and gradients of all ranks as those of one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gradmaker.capture.borrowing import borrowing
from gradmaker.capture.sharded import fsdp_modules, gathered, is_sharded, loss_of_nothing, reshard
from gradmaker.loss.recorder import LossRecorder
from gradmaker.loss.share import Share
from gradmaker.loss.terms import Terms
from gradmaker.scale.counts import count, share_of, share_of_replica
from gradmaker.scale.ranks import Processes, Ranks
from gradmaker.scale.replicas import local_gradients, sum_gradients
from gradmaker.scale.shards import reduced_by_mean, whole_gradients
from gradmaker.step.state import Gradients, StepState

__all__ = ["OnRanks", "scaled_loss"]


class OnRanks:
    """What several processes agree on in each pass. With one process none of it runs."""

    model: nn.Module
    step_state: StepState

    def __init__(self) -> None:
        self._processes = Processes()

    @property
    def process_group(self) -> Any:
        """The group of the processes that train this model together; None: all, by a group that the maker makes."""
        return self._processes.given

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self._processes.give(group)

    @property
    def ranks(self) -> Ranks | None:
        """The processes that train this model together; None if there is one. To be read first on all of them together."""
        like = next(self.model.parameters(), None)
        return self._processes.ranks(torch.device("cpu") if like is None else like.device)

    def meeting(self) -> AbstractContextManager[None]:
        """Context before a meeting: where an exception leaves it on one rank, all others raise at the meeting."""
        ranks = self.ranks
        return nullcontext() if ranks is None else ranks.together()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Context of a pass whose gradients the maker reduces: an exception on one rank is one on all."""
        ranks = self.ranks
        if ranks is None:
            with gathered(self.model):
                yield
            return
        with ranks.together(), local_gradients(), gathered(self.model):
            yield

    @property
    def _trained(self) -> list[nn.Parameter]:
        """The trainable parameters, as they are outside of the passes."""
        reshard(self.model)
        return [p for p in self.model.parameters() if p.requires_grad]

    def _whole_gradients(self, before: Gradients) -> AbstractContextManager[Gradients]:
        """Context in which gradients of sharded parameters are whole.  before: those from before the step"""
        parameters = self._trained
        return whole_gradients(self.ranks, parameters, before) if any(map(is_sharded, parameters)) else nullcontext(before)

    def _meet_in_backward(self, output: Any) -> None:
        """The backward pass of a rank without examples, which those of the others wait for where parameters are sharded."""
        if fsdp_modules(self.model) and (loss := loss_of_nothing(output)) is not None:
            with borrowing():
                loss.backward()

    def _noting_losses(self) -> AbstractContextManager[LossRecorder | None]:
        """Context of a forward pass that no curvature needs, in which the losses are recorded for `_share`."""
        return nullcontext() if self.ranks is None else LossRecorder()

    def _share(
        self, recorder: LossRecorder | None, loss: Tensor, examples: int | None, weight: float, reduction: str
    ) -> Share | None:
        """The share of this rank's loss in that of all ranks; None for one process. All ranks meet here before the backward.

        examples: of this rank, if known; reduction: of a loss that is not recognised
        """
        ranks = self.ranks
        return (
            None if ranks is None or recorder is None else share_of(ranks, examples, count(recorder, loss), weight, reduction)
        )

    def share_of_replica(self, terms: Sequence[Terms], examples: int, trouble: float) -> tuple[Share | None, float]:
        """The share of a pass of a loop that averages gradients itself, and the worst trouble of a rank: see `scale.counts`."""
        ranks = self.ranks
        return (None, trouble) if ranks is None else share_of_replica(ranks, terms, examples, trouble)

    def _reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients of a pass over the ranks, where they agree on whether it is finite."""
        ranks = self.ranks
        if ranks is None:
            return
        finite = self.step_state.now.finite
        found = ranks.meet([float(finite), self._findings()])
        if not all(row[0] for row in found):
            self.step_state.note_elsewhere()
        if len({row[1] for row in found}) > 1:
            self._share_findings(ranks)
        sum_gradients(ranks, reduced_by_mean(ranks, self.model, parameters))

    def _findings(self) -> float:
        """A number that is equal where the self-checks have found the same on all ranks."""
        return 0.0

    def _share_findings(self, ranks: Ranks) -> None:
        """Adopt what the self-checks of other ranks have found. RefusedError where this comes too late for a measurement."""


def scaled_loss(loss: Tensor, share: Share | None) -> Tensor:
    """This rank's part of the loss of all ranks."""
    return loss if share is None else loss * share.factor
