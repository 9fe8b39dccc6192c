"""The maker of preconditioned gradients: record, measure, refresh, solve."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar, get_args, get_origin

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmaker.blocks import Block
from gradmaker.by_rows import Value
from gradmaker.capture.borrowing import borrowing
from gradmaker.checkpoint import dump, load
from gradmaker.config import GradientConfig
from gradmaker.costs.prediction import cost
from gradmaker.curvature import Likelihood
from gradmaker.elementwise import Elementwise, elementwise
from gradmaker.failures import Failures, Report
from gradmaker.linalg.arithmetic import plain_arithmetic
from gradmaker.loops.attachment import Attachment
from gradmaker.loops.hook import refuse_again, refuse_attached, remove_all
from gradmaker.measuring import MeasuringMaker
from gradmaker.passes.batches import Batch
from gradmaker.plan import Plan
from gradmaker.reports.summary import Summary, summarise
from gradmaker.reports.verification import Verification, verify
from gradmaker.scale.owners import share
from gradmaker.step.clocks import PlanClocks
from gradmaker.step.draft import Draft
from gradmaker.step.held import Held
from gradmaker.step.refreshing import refresh, release
from gradmaker.step.secants import dump_secants, load_secants
from gradmaker.step.state import End
from gradmaker.trust_region.policy import TrustRegion
from gradmaker.trust_region.quadratic import QuadraticModel
from gradmaker.trust_region.region import Region

__all__ = ["Preconditioned", "PreconditionedGradientMaker"]

C = TypeVar("C", bound=GradientConfig)


class PreconditionedGradientMaker(MeasuringMaker):
    """A maker that writes ``P g`` into ``.grad``; methods differ only in their configs."""

    def __init__(self, model: nn.Module, config: GradientConfig | None = None) -> None:
        super().__init__(model, config)
        self._attachments: list[Attachment] = []
        self._failures = Failures(self.config.failures_allowed)
        self._groups: tuple[Plan, list[Elementwise]] | None = None  # of this plan

    @property
    def skipped(self) -> int:
        """Number of steps whose loss or gradients were not finite: they changed no statistic, and left ``.grad`` as it was."""
        return self.step_state.now.skipped

    @property
    def unread(self) -> int:
        """Number of passes of an attached loop that were not measured: the gradient had rounded away, or proved nothing."""
        return self.step_state.now.unread

    # ---------------------------------------------------------------- the step
    def _check_parameters(self) -> None:
        self.plan.own.check()

    def _blocks(self) -> list[Block]:
        return self.plan.blocks

    def _restore(self) -> None:
        for block in self.plan.blocks:
            block.restore()

    def _end(self) -> End:
        state = self.step_state
        if self.trust_region is not None:
            self.trust_region.check(self.step, state.now.trial)
        if state.now.due is None:  # the user ran the passes; only gradients can be measured now
            self._check_passes()
            state.ask(self.plan.blocks)
        if self._elementwise():
            self._check_again()
        elif not state.now.checked:
            self._note_finite([], [])
        self._agree_on_step()
        return self._solve() if state.now.finite else End(gradients=self._of_rows({}), reports=state.now.reports)

    def _check_passes(self) -> None:
        if self.passes_are_due() and any(p.grad is not None for p in self.model.parameters()):
            raise RuntimeError(
                "precondition: a measurement of the curvature is due and no forward pass was recorded in this step: "
                "declare the calls (setup_model_call, setup_loss_call, forward_and_backward), or attach(optimizer) before it"
            )

    @torch.no_grad()
    def _solve(self) -> End:
        draft = self.step_state.draft()
        self._put_together(draft)  # the evidence of other ranks with that of this one
        done, found, write = self._at_once(draft)
        self._measure_gradient(draft, done)
        rest = [block for block in self.plan.blocks if block not in done and block.owned]
        with self._agreeing(), plain_arithmetic(self.model):
            clocks, reports = self._refresh(draft, rest)
            for block, value in [r for r in (self._solved(draft, b) for b in rest) if r is not None]:
                if self._started or ((rule := block.options.grafting) and rule.leads):
                    block.assign(draft.look(block), value, self.step_state.now.rows, found)
        found, region = self._limited(self._of_rows(self._of_owners(found)))
        return End(draft.work(), found, write, clocks, reports, region, draft.writes())

    def _agreeing(self) -> AbstractContextManager[None]:
        """Context in which owners compute: an exception on one rank is one on all."""
        return self.meeting() if self.owners else nullcontext()

    def _of_owners(self, found: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """The preconditioned gradients of all owners."""
        ranks = self.ranks if self.owners else None
        return found if ranks is None else share(ranks, self.plan.blocks, found)

    @torch.no_grad()
    def _of_rows(self, found: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """Add the plain gradients that are held by rows alone, where no other is found."""
        rows = self.step_state.now.rows
        for block in self.plan.blocks if rows else ():
            for layer in block.row_layers:
                if layer.site.name in rows and layer.weight.grad is None and layer.weight not in found:
                    layer.assign(rows[layer.site.name], found)
        return found

    def _at_once(self, draft: Draft) -> tuple[Set[Block], dict[nn.Parameter, Tensor], Callable[[], None] | None]:
        """The steps by one operator: their blocks, and gradients to be written, or what writes all that the step changes."""
        groups, now = self._elementwise(), self.step_state.now
        done, found, write = set[Block](), dict[nn.Parameter, Tensor](), None
        if not groups or not self._started:
            return done, found, write
        sizes = {id(g): size for g, _, size in now.norms}
        fresh = all(g is None for _, g in now.gradients or ())  # .grad holds this step alone
        alone = fresh and self.trust_region is None and groups[0].covers(self.plan.blocks)
        for group in groups:
            made = group.step(sizes, alone)
            for block, held in made.held.items():
                draft.put(block, held, block.names if held is not block.held else frozenset())
            done, found, write = done | made.held.keys(), found | made.gradients, made.write
            for block in (b for b in group.blocks if b not in done):
                draft.put(block, block.explicit(draft.look(block)))
        return done, found, write

    def _elementwise(self) -> list[Elementwise]:
        """The blocks of the plan that may have their step by one operator."""
        if self._groups is None or self._groups[0] is not self.plan:
            self._groups = self.plan, elementwise([b for b in self.plan.blocks if b.owned], self.plan.methods)
        return self._groups[1]

    def _measure_gradient(self, draft: Draft, done: Set[Block]) -> None:
        """Fold in what is measured once a step: evidence of its gradient, and evidence pooled over its micro-batches.

        done: blocks that have had their step
        """
        now, own = self.step_state.now, self.plan.curvatures(of_passes=False, due=self._due)
        pooled_pairs = self._pooled()
        if not pooled_pairs and all(b in done for b in self.plan.measured(self._due) if b.triple.curvature in own):
            return
        with plain_arithmetic(self.model), borrowing():
            for curvature in own:
                step = self._step(curvature, 0, self._due, done=done)
                self._take(draft, curvature, curvature.measure(step), 1.0, done=done, last=True)
            for curvature, pooled in pooled_pairs.items():
                chunks = curvature.complete(self._step(curvature, now.part - 1, self._due), pooled)
                self._take(draft, curvature, chunks, 1.0, pooled=False)

    @property
    def _started(self) -> bool:
        return self.step >= self.config.first_step

    def _refresh(self, draft: Draft, blocks: list[Block]) -> tuple[PlanClocks, tuple[Report, ...]]:
        """Refresh those of these blocks that are due. Returns the clocks after this, and the reports of failures."""
        now = self.step_state.now
        reports = self._failures.check(now.reports)  # reports of earlier steps, copied to the host since
        clocks, turns = self.step_state.refreshes(blocks)
        measured, refreshed = now.ever | draft.reached, list[tuple[Block, Held]]()
        release(draft, turns)
        for block, due in turns:
            if refresh(draft, block, measured, due):
                refreshed.append((block, draft.look(block)))
        return clocks, self._failures.check(reports + self._failures.count(refreshed, self.step))

    def _solved(self, draft: Draft, block: Block) -> tuple[Block, Value] | None:
        found = block.solved(draft.look(block), self.step_state.now.rows, draft.reached, self._started)
        if found is None:
            return None
        value, solved = found
        draft.put(block, solved)
        return block, value

    # ---------------------------------------------------------------- the trust region
    def _run(self, weight: float, alone: bool = False) -> tuple[Any, Tensor]:
        refuse_attached(self._attachments)
        trust, state = self.trust_region, self.step_state
        if trust is None or state.now.region is None:
            return super()._run(weight, alone)
        region = trust.judged(state.now.region, self.step)
        if region is not state.now.region:
            state.judge(region)
            self._damp()
        batch = Batch(self.model, self._declared[""], self.config) if trust.tries(self.step) else None
        result = super()._run(weight, alone)
        if batch is not None:
            trial = QuadraticModel.at(self.model) if state.now.part == 1 else state.now.trial
            if trial is not None:  # otherwise the step began before a checkpoint, which holds no batches
                state.attempt(trial.plus(batch, weight))
        return result

    def _limited(self, found: dict[nn.Parameter, Tensor]) -> tuple[dict[nn.Parameter, Tensor], Region | None]:
        """Preconditioned gradients of the length that the trust region allows, and its state after this."""
        trust, now = self.trust_region, self.step_state.now
        if trust is None or now.region is None:
            return found, None
        covered = dict.fromkeys(p for block in self.plan.blocks for site in block.sites for p in site.parameters.values())
        found, region = trust.limited(now.region, now.trial, self.step, covered, found)
        return found, trust.ended(region, now.trial, self.step)

    def _trusting(self, name: str) -> tuple[TrustRegion, Region]:
        """The trust region and its state. AttributeError for a method without these options."""
        region = self.step_state.now.region
        if self.trust_region is None or region is None:
            raise AttributeError(f"{type(self).__name__} has no {name}: {type(self.config).__name__} has no trust region")
        return self.trust_region, region

    @property
    def damping(self) -> float | None:
        """The present ``lambda``, for methods with `adaptive_damping`."""
        trust, region = self._trusting("damping")
        return trust.damping(region)

    @property
    def damping_ratio(self) -> float | None:
        """The reduction ratio ``rho`` of the last step that adapted `damping`."""
        return self._trusting("damping_ratio")[1].ratio

    @property
    def clip_learning_rate(self) -> float | None:
        """The learning rate of the `clip`, in place of the config's; to be set from a schedule."""
        return self._trusting("clip_learning_rate")[0].learning_rate

    @clip_learning_rate.setter
    def clip_learning_rate(self, value: float | None) -> None:
        self._trusting("clip_learning_rate")[0].learning_rate = value

    # ---------------------------------------------------------------- attached to a loop
    def attach(
        self,
        optimizer: Optimizer,
        likelihood: str | Likelihood | None = None,
        accumulation: int | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> PreconditionedGradientMaker:
        """Precondition inside ``optimizer.step()`` of another training loop. Returns the maker; its hooks are removed with it.

        likelihood: that of the model's output, for methods that need more than the gradient; None: it is read from the
        gradient, with the weights of all terms, where the loss is a cross entropy with hard labels, categorical or binary.
        accumulation: with a likelihood, backward passes for each step of the optimizer, each of ``1 / accumulation`` of the
        loss; None: 1.
        scaler: the loop's gradient scaler, if any; what is recorded in its backward pass is unscaled.
        ValueError for an optimizer or a method that cannot be attached.
        """
        self.attachment(optimizer, likelihood, accumulation, scaler, hooked=True)
        return self

    def attachment(
        self,
        optimizer: Optimizer,
        likelihood: str | Likelihood | None = None,
        accumulation: int | None = None,
        scaler: torch.amp.GradScaler | None = None,
        *,
        hooked: bool = False,
    ) -> Attachment:
        """Attach as `attach` does, for a caller that ends each step by `Attachment.end` before the optimizer steps.

        hooked: whether ``optimizer.step()`` does
        """
        if self.trust_region is not None:
            self.trust_region.refuse_loop()
        refuse_again(self._attachments)
        likelihood = likelihood or self.config.likelihood
        made = Attachment(self, optimizer, likelihood, accumulation, scaler, hooked)
        self._attachments.append(made)
        weakref.finalize(self, remove_all, self._attachments)
        return made

    def remove(self) -> None:
        """Remove all hooks from the model and the optimizer."""
        remove_all(self._attachments)
        self.serve(None)
        self.checks.arrangement.likelihood = None  # another loop may have another loss

    def __getstate__(self) -> dict[str, Any]:
        """The attributes of a copy, which is not attached.

        It does not refer to the last batch, whose calls are those of the original's model: the secants of the last measured
        step are computed first, as for a saved state.
        """
        state, now = self.step_state, self.step_state.now
        if now.previous is not None and now.previous.passes:
            saved = dump_secants(now, self.plan.blocks, self.secants)
            state = state.copied(load_secants(saved, self.plan.blocks))
        return {**vars(self), "_attachments": [], "served": None, "step_state": state}

    # ---------------------------------------------------------------- looking inside
    def summary(self, batch: Any = None) -> Summary:
        """A table: parameters, block, curvature, representation, solver, bytes.

        batch: the input of the model, with which it also predicts seconds and bytes of a step, as `cost` does
        """
        step = None if batch is None else cost(self, batch)
        return summarise(self.plan, self.step_state.now.measured, self.checks, step)

    def verify(self) -> Verification:
        """Check every block against a dense oracle, on the model and batch that were declared last."""
        self.plan.own.check()
        if self.owners and self.ranks is not None:
            raise RuntimeError("verify: this rank holds its own blocks alone: load state_dict() into one process, verify there")
        return verify(self)

    def silent(self) -> list[str]:
        """Names of the sites without evidence so far."""
        return [s.name for b in self.plan.blocks for s in b.sites if s.name not in self.step_state.now.measured]

    # ---------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """The state to resume from, by site name, unstacked: tensors, numbers and names only."""
        return dump(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`, bitwise. ValueError that names what is missing, unknown or of another shape."""
        load(self, state)
        self._damp()
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
