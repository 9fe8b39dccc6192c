"""Declared batches: evaluated again, differentiated twice, or restricted to some of their examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradmaker.loss.likelihood import Likelihood, read_terms
from gradmaker.loss.recorder import LossRecorder
from gradmaker.loss.terms import Terms
from gradmaker.passes.deferred import Deferred, arguments, exchange, resolve
from gradmaker.passes.graph import Graph
from gradmaker.passes.replay import Replay
from gradmaker.trees import tensors

__all__ = ["Batch", "Batches", "Declared", "Reading", "terms_of"]


class Reading(Protocol):
    """Options of a config that say how a batch is read."""

    @property
    def batch_axis(self) -> int:
        """The axis of the examples in the first tensor argument of the call."""

    @property
    def likelihood(self) -> Likelihood | None:
        """The distribution that the outputs parametrise, where the loss does not show it."""

    @property
    def loss_reduction(self) -> str:
        """Reduction of a loss that is not recognised: ``mean`` or ``sum``."""


@dataclass
class Declared:
    """A declared forward pass with its loss, and with the logits where the loss does not show them."""

    call: Deferred
    loss: Deferred | None = None
    logits: Deferred | None = None

    def counted(self, axis: int) -> int | None:
        """Size of an axis of the first tensor argument of the call; None if there is no such axis."""
        first = next((v for v in tensors(*arguments(self.call)) if v.ndim > 0), None)
        return None if first is None or first.ndim <= axis else first.shape[axis]

    def tensors(self) -> list[Tensor]:
        """All tensor arguments of the calls that have a version counter; inference tensors have none."""
        found: list[Any] = []
        known = dict[int, Deferred]()
        for part in (self.call, self.loss, self.logits):
            exchange(part, found.append, known)
        return [v for v in found if isinstance(v, Tensor) and not v.is_inference()]

    def cut(self, rows: Tensor, axis: int, n: int) -> Declared:
        """The same calls on some of ``n`` examples: rows of every tensor with ``n`` entries on ``axis``, or else on axis 0."""
        known = dict[int, Deferred]()

        def pick(value: Any) -> Any:
            if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
                return value
            own = next((a for a in dict.fromkeys((axis, 0)) if value.ndim > a and value.shape[a] == n), None)
            return value if own is None else value.index_select(own, rows.to(value.device))

        call, loss, logits = (exchange(part, pick, known) for part in (self.call, self.loss, self.logits))
        return Declared(call, loss, logits)

    def part(self, rows: Tensor, axis: int, n: int) -> Declared:
        """`cut`, with a check. ValueError where the call then has another number of examples."""
        made = self.cut(rows, axis, n)
        first = next((v for v in tensors(*arguments(made.call)) if v.ndim > 0), None)
        if first is None or first.ndim <= axis or first.shape[axis] != len(rows):
            raise ValueError(f"{self.call!r} cannot be cut to {len(rows)} of {n} examples: pass the data as its arguments")
        return made


def terms_of(
    recorder: LossRecorder, loss: Tensor, logits: Tensor | None, likelihood: Likelihood | None, factor: float = 1.0
) -> list[Terms]:
    """The terms of a loss: those of its recognised calls, else those of the declared likelihood, times a factor."""
    terms = read_terms(recorder, loss)
    return terms if terms or likelihood is None or logits is None else [likelihood.terms(logits, factor)]


def mass_of(terms: list[Terms]) -> Tensor | None:
    """The sum of the weights of the loss terms; None for a loss that is not recognised.  # ()"""
    return torch.stack([t.omega.sum().double() for t in terms]).sum() if terms else None


class Batch:
    """A declared batch, evaluated with the random state at its construction."""

    def __init__(self, model: nn.Module, declared: Declared, reading: Reading, whole: Batch | None = None) -> None:
        """whole: the batch of which this is a subset"""
        self.model, self.declared, self.reading, self.whole = model, declared, reading, whole
        self.replay = Replay(model, _evaluation(model, declared), declared.counted(reading.batch_axis))
        self.mass: Tensor | None = None  # the weight of its loss terms, once these are known
        self.known = False  # whether its loss terms are known

    @property
    def examples(self) -> int:
        """Number of examples in the call; 0 without a tensor argument."""
        return self.declared.counted(self.reading.batch_axis) or 0

    def note(self, terms: list[Terms]) -> None:
        """Store the weight of the loss terms."""
        self.mass, self.known = mass_of(terms), True

    @torch.enable_grad()
    def graph(self) -> Graph:
        """The autograd graph of a new evaluation, which changes no state. ValueError where the calls fail on a subset."""
        try:
            logits, loss, terms = self._run()
        except (RuntimeError, ValueError, IndexError) as error:
            if self.whole is None:
                raise
            n, k = self.whole.examples, self.examples
            raise ValueError(
                f"the declared calls failed on {k} of the {n} examples: {error}. Every tensor among their arguments with {n} "
                "entries on the axis of examples is cut; a function that holds its data itself cannot be cut. "
                "Pass the data as arguments, or declare a batch for the products by setup_curvature_call"
            ) from error
        return Graph(self.model, loss, terms, logits)

    @torch.enable_grad()
    def _run(self) -> tuple[Tensor | None, Tensor, list[Terms]]:
        with LossRecorder() as recorder:
            logits, loss = self.replay.run()
        terms = terms_of(recorder, loss, logits, self.reading.likelihood)
        self.note(terms)
        return logits, loss, terms

    def sample(self, size: int, generator: torch.Generator) -> Batch:
        """A subset drawn without replacement; the batch itself if it has no more examples. ValueError if it has none."""
        n = self.examples
        if not n:
            raise ValueError(
                f"no examples can be drawn from {self.declared.call!r}: it has no tensor among its arguments; pass the data as "
                "arguments of the declared calls"
            )
        if size >= n:
            return self
        rows = torch.randperm(n, generator=generator)[:size]
        return Batch(self.model, self.declared.cut(rows, self.reading.batch_axis, n), self.reading, self)

    def part(self, rows: Tensor, n: int) -> Batch:
        """A subset of the ``n`` examples. ValueError where the declared call cannot be restricted to it."""
        return Batch(self.model, self.declared.part(rows, self.reading.batch_axis, n), self.reading, self)

    @torch.enable_grad()
    def evaluate(self) -> tuple[Tensor, list[Terms]]:
        """The loss and its terms, by a new evaluation."""
        _, loss, terms = self._run()
        return loss, terms

    def scale(self) -> Tensor | float:
        """Factor that makes the loss of a subset an unbiased estimate of the whole batch's: 1 for means, ``n / k`` for sums.

        It is the ratio of the weights of the loss terms; for a loss that is not recognised, ``loss_reduction`` decides.
        """
        if self.whole is None:
            return 1.0
        if not self.whole.known:
            self.whole._run()
        ratio: Tensor | float = 1.0
        if self.mass is not None and self.whole.mass is not None:
            ratio = self.whole.mass / self.mass
        elif self.reading.loss_reduction == "sum":
            ratio = self.whole.examples / self.examples
        return ratio * self.whole.scale()


def _evaluation(model: nn.Module, declared: Declared) -> Callable[[], tuple[Tensor | None, Tensor]]:
    """A function that returns the logits, if declared, and the loss; RuntimeError if an argument was changed since."""
    own = {*model.parameters(), *model.buffers()}  # which a step may change
    versions = [(v, v._version) for v in declared.tensors() if v not in own]

    def evaluate() -> tuple[Tensor | None, Tensor]:
        if any(v._version != version for v, version in versions):
            raise RuntimeError(
                f"a tensor among the arguments of {declared.loss!r} was changed in place, by its pass or since, and this "
                "method evaluates that batch again: declare a copy of it, by clone()"
            )
        known: dict[int, Any] = {}
        resolve(declared.call, known)
        loss = resolve(declared.loss, known)
        return (None if declared.logits is None else resolve(declared.logits, known)), loss

    return evaluate


@dataclass(frozen=True)
class Batches:
    """The batches that a pass is measured on: its own, and others if they were declared."""

    own: Batch
    curvature: Batch  # for products with the curvature
    search: Batch  # for losses and gradients at displaced weights

    @property
    def shared(self) -> bool:
        """Whether products with the curvature use the batch of the pass itself."""
        return self.curvature is self.own

    @classmethod
    def of(cls, model: nn.Module, declared: dict[str, Declared], reading: Reading) -> Batches:
        """declared: by purpose; that of the pass is ``""``"""
        made = {purpose: Batch(model, each, reading) for purpose, each in declared.items()}
        return cls(made[""], made.get("curvature", made[""]), made.get("search", made[""]))
