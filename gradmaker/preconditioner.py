"""The step of every preconditioned gradient: capture, curvature, preconditioner, gradient."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar, get_args, get_origin

import torch
from torch import nn
from torch.optim import Optimizer

from gradmaker.blocks import Block, Solved
from gradmaker.checkpoint import dump, load
from gradmaker.config import GradientConfig
from gradmaker.curvature import Likelihood
from gradmaker.failures import Failures
from gradmaker.linalg.arithmetic import plain_arithmetic
from gradmaker.loops.attachment import Attachment, refuse_again, refuse_attached, remove_all
from gradmaker.measuring import MeasuringMaker
from gradmaker.reports.summary import Summary, summarise
from gradmaker.reports.verification import Verification, verify
from gradmaker.representations.roles import release
from gradmaker.step.ledger import WHOLE_STEP, Ledger
from gradmaker.step.pool import Pool

__all__ = ["Preconditioned", "PreconditionedGradientMaker"]

C = TypeVar("C", bound=GradientConfig)


class PreconditionedGradientMaker(MeasuringMaker):
    """A gradient maker that writes ``P g`` into ``.grad``; methods differ by their config alone."""

    def __init__(self, model: nn.Module, config: GradientConfig | None = None) -> None:
        super().__init__(model, config)
        self.skipped = 0
        """Steps whose loss or gradients were not finite: no statistic took them in, ``.grad`` was left as it was."""
        self._attachments: list[Attachment] = []
        self._failures = Failures(self.config.failures_allowed)

    # ---------------------------------------------------------------- the step
    def _run(self, weight: float) -> Any:
        refuse_attached(self._attachments)
        return super()._run(weight)

    def _check_parameters(self) -> None:
        self.plan.own.check()

    def _precondition(self) -> None:
        if self._asked != self.step:  # the user ran the passes; only gradients can be measured now
            self._check_passes()
        if not self._noted:
            self._note_finite([], [])
        if self._finite:
            self._solve()
        self._end_step()

    def _end_step(self) -> None:
        """Keep what the step has brought; what came to nothing is due again at the next."""
        self.skipped += int(not self._finite)
        for block, solved in self._ledger.solved or []:
            block.keep(solved)
        self._ever |= self._ledger.further
        self._clocks.retry(self._due, self._ledger.further if self._finite else (), self.step + 1)
        self._due, self._finite, self._noted, self._ledger, self._part = frozenset(), True, False, Ledger(), -1
        self._pool = Pool()
        for block in self.plan.blocks:
            release(block.triple.representation, block.state)

    def _abandon(self) -> None:
        self._part, self._pool = -1, Pool()
        self._ledger.begin_again(self.plan.blocks)

    def passes_are_due(self) -> bool:
        """Whether this step is to measure its passes; changes nothing."""
        undo, due = self._bookmark(), self.begin_pass()
        undo()
        return due

    def _check_passes(self) -> None:
        if self.passes_are_due() and any(p.grad is not None for p in self.model.parameters()):
            raise RuntimeError(
                "precondition: a measurement of the curvature is due and no forward pass was recorded in this step: "
                "declare the calls (setup_model_call, setup_loss_call, forward_and_backward), or attach(optimizer) before it"
            )
        self.begin_pass()

    def _bookmark(self) -> Callable[[], None]:
        rewind = super()._bookmark()
        counters = {k: getattr(self, k) for k in ("_asked", "_due", "_finite", "_noted", "_part")}
        if self._part >= 0:  # of this step: of the one before, pairs are made once and its batch is let go
            counters["_previous"] = self._previous
        clocks, pool = self._clocks.dump(), self._pool.copy()

        def undo() -> None:
            rewind()
            self._clocks.load(clocks)
            vars(self).update(counters)
            self._pool = pool
            self._ledger.solved = None

        return undo

    @torch.no_grad()
    def _solve(self) -> None:
        ledger = self._ledger
        if ledger.solved is None:
            ledger.check_parts(self._part)
            for curvature in self.plan.curvatures(of_passes=False, due=self._due):
                step = self._step(curvature, due=self._due)
                step.part = 0  # it is that of all micro-batches together
                ledger.note(WHOLE_STEP, 1.0, step.examples)
                self._fold(curvature, curvature.measure(step))
            for curvature, chunks in self._pool.held.items():
                self._fold(curvature, curvature.complete(self._step(curvature, due=self._due), chunks))
            with plain_arithmetic(self.model):
                self._refresh()
                ledger.solved = [r for r in map(self._result, self.plan.blocks) if r is not None]
        for block, solved in ledger.solved:
            if self._started or ((rule := block.options.grafting) and rule.leads):
                block.write(solved.value)

    @property
    def _started(self) -> bool:
        return self.step >= self.config.first_step

    def _refresh(self) -> None:
        self._failures.check()  # what was on its way from a device
        done = self._ledger.prepared
        for block, due in self._clocks.refreshes(self.step):
            if block not in done:
                done[block] = block.prepare(self.measured, due, self._ledger.further)
        self._failures.note([block for block, refreshed in done.items() if refreshed], self.step)
        self._failures.check()

    def _result(self, block: Block) -> tuple[Block, Solved] | None:
        raw = block.read()
        return None if raw is None or not block.cache else (block, block.solve(raw, self._started))

    # ---------------------------------------------------------------- attached to a loop
    def attach(
        self,
        optimizer: Optimizer,
        likelihood: str | Likelihood | None = None,
        accumulation: int = 1,
        scaler: torch.amp.GradScaler | None = None,
    ) -> PreconditionedGradientMaker:
        """Precondition inside ``optimizer.step()`` of a loop that is not ours. Returns the maker: its hooks go with it.

        likelihood: what the model's output parametrises, for methods that need more than the gradient.
        accumulation: backward passes for each step of the optimizer, each with ``1 / accumulation`` of the loss.
        scaler: the loop's gradient scaler, if it has one; what is captured during its backward pass is unscaled.
        """
        refuse_again(self._attachments)
        likelihood = likelihood or self.config.likelihood
        self._attachments.append(Attachment(self, optimizer, likelihood, accumulation, scaler))
        weakref.finalize(self, remove_all, self._attachments)
        return self

    def remove(self) -> None:
        """Take every hook off the model and the optimizer."""
        remove_all(self._attachments)
        self.served = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not attached."""
        return {**vars(self), "_attachments": [], "served": None}

    # ---------------------------------------------------------------- looking inside
    def summary(self) -> Summary:
        """A table: parameters, block, curvature, representation, solver, bytes."""
        return summarise(self.plan, self.measured, self.checks)

    def verify(self) -> Verification:
        """Check every block against a dense oracle on the model and batch that were last set up."""
        self.plan.own.check()
        return verify(self)

    def silent(self) -> list[str]:
        """Names of the sites that no pass has reached so far."""
        return [s.name for b in self.plan.blocks for s in b.sites if s.name not in self.measured]

    # ---------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on, by site name, unstacked: tensors, numbers and names only."""
        return dump(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on, bitwise, from a `state_dict`. ValueError that names what is missing, unknown or of another shape."""
        load(self, state)
        for attachment in self._attachments:
            attachment.forget()


class Preconditioned(PreconditionedGradientMaker, Generic[C]):
    """A preconditioned maker of one method, whose config class a type checker sees.

    class MineGradientMaker(Preconditioned[MineGradientConfig]):
        Config = MineGradientConfig
    """

    config: C

    def __init__(self, model: nn.Module, config: C | None = None) -> None:
        super().__init__(model, config)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for base in vars(cls).get("__orig_bases__", ()):
            wanted = get_args(base)[0] if issubclass(get_origin(base) or object, Preconditioned) else None
            if isinstance(wanted, type) and wanted is not cls.Config:
                raise TypeError(
                    f"{cls.__name__} is a maker for {wanted.__name__}: its body has to say Config = {wanted.__name__}"
                )
