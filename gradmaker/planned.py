"""A maker with a plan: the methods that are due, the tape that they need, and the `Step` of each curvature."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Set
from typing import ClassVar

import torch
from torch import nn

from gradmaker.blocks import Block
from gradmaker.capture.arrangement import Arrangement
from gradmaker.capture.row_calls import RowLayer
from gradmaker.capture.tape import OutputGradients, Tape
from gradmaker.config import GradientConfig
from gradmaker.curvature import Curvature
from gradmaker.curvature.evidence import Evidence
from gradmaker.curvature.roles import OfSecants, Watching
from gradmaker.curvature.step import NOTHING, Extra, Previous, Step
from gradmaker.loss.head import Head
from gradmaker.loss.terms import Terms
from gradmaker.maker import GradientMaker
from gradmaker.options.registry import METHODS
from gradmaker.plan import Plan, make_plan
from gradmaker.scale.evidence import sum_secants
from gradmaker.scale.owners import deal
from gradmaker.scale.ranks import Ranks, RefusedError, refuse_ranks
from gradmaker.scale.replicas import agree_on_gradients
from gradmaker.self_checks import SelfChecks
from gradmaker.self_checks.whole import Whole
from gradmaker.stacking import carry
from gradmaker.step.clocks import PlanClocks
from gradmaker.step.row_plan import row_layers
from gradmaker.step.secants import incomplete
from gradmaker.step.state import Facts, Phase, StepState

__all__ = ["PlannedMaker"]


class PlannedMaker(GradientMaker):
    """A maker with a plan, which says which curvature of which parameters is measured."""

    Config: ClassVar[type[GradientConfig]]
    config: GradientConfig

    def __init__(self, model: nn.Module, config: GradientConfig | None = None) -> None:
        super().__init__(model, config)
        self.plan = make_plan(model, self.config, METHODS)
        self._unseen: frozenset[str] = frozenset()  # parameters with uses outside of the calls of their layers
        self._row_layers: dict[frozenset[str], list[RowLayer]] = {}  # of the plan, by methods that are due
        self.checks = SelfChecks(model, self.config.self_check, self.config.seed)
        self.whole = Whole(self.checks, self.config.loss_reduction)
        self.served: frozenset[nn.Parameter] | None = None  # parameters of the attached optimizer; None: all
        self.trust_region = self.config.trust_region(model)
        region = None if self.trust_region is None else self.trust_region.start()
        self.step_state = StepState(PlanClocks(self.plan.methods), region)
        self._damp_plan()
        self._owners = False

    @property
    def owners(self) -> bool:
        """Whether each block is held, refreshed and solved by one rank. To be set on all ranks, before the first step."""
        return self._owners

    @owners.setter
    def owners(self, value: bool) -> None:
        if value == self._owners:
            return
        if not value or self.step_state.now.index or self.step_state.now.phase is not Phase.BETWEEN:
            raise RuntimeError("owners: to be set to True before the first step, and before a state is loaded")
        self._owners = True
        self._deal(self.plan)

    def _deal(self, plan: Plan) -> None:
        """Let each block of a plan be held by its owner."""
        if self._owners and (ranks := self.ranks) is not None:
            _ = plan.averages  # of what all blocks hold, while they do
            deal(plan.blocks, ranks)

    def serve(self, parameters: frozenset[nn.Parameter] | None) -> None:
        """Measure and precondition only these parameters, those of an attached optimizer; None: all."""
        self.served = parameters

    @property
    def unseen(self) -> frozenset[str]:
        """Parameters with uses outside of the calls of their layers, which the plan assigns elsewhere."""
        return self._unseen

    @property
    def arrangement(self) -> Arrangement:
        """Where the passes have their examples, as found by the self-checks."""
        return self.checks.arrangement

    def purposes(self) -> frozenset[str]:
        return self.plan.purposes()

    def _refuse_ranks(self) -> None:
        """RefusedError for what several processes would compute differently."""
        self.plan.refuse_ranks()
        if self.trust_region is not None and self.trust_region.repeats:
            refuse_ranks("adaptive_damping and rescale repeat the loss of each rank alone")

    # ---------------------------------------------------------------- passes
    def begin_pass(self) -> bool:
        """Whether the coming pass is to be recorded. After an exception at the end of a step, begins the step again."""
        self._begin_again()
        return self._asks_passes(self.step_state.ask(self.plan.blocks))

    def passes_are_due(self) -> bool:
        """Whether this step measures its passes; changes nothing."""
        return self._asks_passes(self.step_state.would_ask(self.plan.blocks))

    def _asks_passes(self, due: frozenset[str]) -> bool:
        return any(self.plan.sites(c, due, self.served) for c in self.plan.curvatures(of_passes=True, due=due))

    @property
    def _due(self) -> frozenset[str]:
        """Methods of the plan that measure their curvature in this step."""
        return self.step_state.now.due or frozenset()

    def _curvatures(self) -> list[Curvature]:
        """The curvatures that are measured on the passes of this step."""
        return self.plan.curvatures(of_passes=True, due=self._due)

    def row_layers(self) -> list[RowLayer]:
        """The layers whose gradients are to be held by rows in this step."""
        reduced = torch.distributed.is_available() and torch.distributed.is_initialized()
        read = self.trust_region is not None and self.trust_region.reads_gradients(self.step)
        if reduced or read or self.step < self.config.first_step:
            return []
        if self._due not in self._row_layers:
            self._row_layers[self._due] = row_layers(self.plan.blocks, self._due)
        return self._row_layers[self._due]

    def new_tape(self, everything: bool = False) -> Tape:
        """A tape of the modules that the curvatures of this step need; of all modules if ``everything``."""
        due = None if everything else self._due
        recorded = [c for c in self.plan.curvatures(of_passes=True, due=due) if "calls" in c.needs]
        own = (m for c in recorded for s in self.plan.sites(c, due, self.served) for m in s.modules)
        modules = dict.fromkeys((*own, *(m for c in recorded if isinstance(c, Watching) for m in c.watches(self.model))))
        tape = Tape(self.model, modules, self.checks.arrangement, self.config.batch_axis)
        tape.assume(self._declared[""].counted(self.config.batch_axis) if self._declared else None)
        return tape

    # ---------------------------------------------------------------- another plan
    def plan_again(self, unseen: frozenset[str]) -> None:
        """Make a new plan, in which other rules measure the layers of these parameters; all other sites keep their tensors."""
        plan = make_plan(self.model, self.config, METHODS, unseen)
        if self._owners and self.step_state.now.ever:
            raise RefusedError(
                f"the self-checks find other uses of {', '.join(sorted(unseen - self._unseen))}, when owners hold statistics "
                "already: leave these parameters out by ignore=, or train without owners"
            )
        carry([(b, b.held) for b in self.plan.blocks], [(b, b.held) for b in plan.blocks])
        self.adopt(plan, unseen)

    def follow(self) -> None:
        """Plan again after the model was moved to another device, before anything was measured, as trainers move it."""
        now = self.step_state.now
        if now.index == 0 and now.phase is Phase.BETWEEN and not now.ever and self.plan.own.moved():
            self.adopt(make_plan(self.model, self.config, METHODS, self._unseen), self._unseen)

    def adopt(self, plan: Plan, unseen: frozenset[str]) -> None:
        """Replace the plan by one whose blocks hold what those of the old plan held."""
        self._deal(plan)
        self.plan, self._unseen, self._row_layers = plan, unseen, {}
        self.checks.arrangement.direct |= unseen
        self.step_state.move(plan.blocks, plan.methods)
        self._damp_plan()

    def _findings(self) -> float:
        return float(zlib.crc32("/".join(sorted(self._unseen)).encode()))

    def _share_findings(self, ranks: Ranks) -> None:
        told = ranks.objects((sorted(self._unseen), bool(self.step_state.now.work.parts)))
        found = frozenset(name for unseen, _ in told for name in unseen)
        if any(measured and set(unseen) != found for unseen, measured in told):
            raise RefusedError(
                "self-checks find parameters with uses outside of the calls of their layers, and not the same on all ranks: "
                f"{[unseen for unseen, _ in told]}. Let all ranks make the same calls, or leave these out by ignore="
            )
        if found != self._unseen:
            self.plan_again(found)

    def _agree_on_step(self) -> None:
        """Agree with the other ranks on a step whose gradients another loop has reduced: whether it is finite."""
        ranks, now = self.ranks, self.step_state.now
        if ranks is None or now.gradients is not None:
            return
        parameters = [p for p in self.plan.own.all if self.served is None or p in self.served]
        finite, findings = agree_on_gradients(ranks, parameters, now.finite, [float(now.part), self._findings()])
        if now.finite and not finite:
            self.step_state.note(False)
        if findings:
            self._share_findings(ranks)

    def _undo(self, before: Facts) -> None:
        """Restore an earlier state of the step; a newer plan is kept, as the findings of the self-checks are."""
        self.step_state.undo(before)
        if not all(block in self.plan.blocks for block in before.work.held):
            self.step_state.move(self.plan.blocks, self.plan.methods)
        self._damp()

    def _damp_plan(self) -> None:
        """Damp the blocks of a new plan."""
        region = self.step_state.now.region
        if self.trust_region is not None and region is not None:
            self.trust_region.serve(self.plan.blocks, region)

    def _damp(self) -> None:
        """Damp the blocks with the present damping."""
        region = self.step_state.now.region
        if self.trust_region is not None and region is not None:
            self.trust_region.damp(region)

    # ---------------------------------------------------------------- the step of a curvature
    def _whole(self, curvature: Curvature) -> bool:
        return any(b.full for b in self.plan.blocks if b.triple.curvature == curvature)

    def _step(
        self,
        curvature: Curvature,
        part: int,
        due: frozenset[str] | None = None,
        tape: Tape | None = None,
        terms: Iterable[Terms] = (),
        masked: bool = False,
        output_gradients: OutputGradients | None = None,
        head: Head | None = None,
        extra: Extra = NOTHING,
        done: Set[Block] = frozenset(),
    ) -> Step:
        """The `Step` of a curvature; without a tape after the passes.

        due: methods whose sites it measures; done: blocks that it leaves out
        """
        c, out = self.config, frozenset[str]().union(*(block.names for block in done))
        return Step(
            index=self.step,
            seed=c.seed,
            sites=[s for s in self.plan.sites(curvature, due, self.served) if not s.frozen and s.name not in out],
            dtype=c.statistics_dtype(),
            tape=Tape(self.model, ()) if tape is None else tape,
            terms=list(terms),
            head=head,
            whole=self._whole(curvature),
            output_gradients=output_gradients,
            reduction=c.loss_reduction,
            masked=masked,
            part=part,
            graph=extra.graph,
            batches=extra.batches,
            previous=extra.previous,
            notes=extra.notes,
            own=extra.own,
            rows=self.step_state.now.rows,
            share=extra.share,
        )

    # ---------------------------------------------------------------- secants
    def _complete(self) -> None:
        """Evaluate the last measured step once at the present weights, and release its batch."""
        now = self.step_state.now
        previous = incomplete(now, self.plan.asks("previous", self._due))
        if previous is not None:
            self.step_state.complete({**previous.older, **self.secants(previous)})

    def secants(self, previous: Previous) -> dict[str, Evidence]:
        """The secants of a step after which the weights have moved, by site."""
        found: dict[str, Evidence] = {}
        for curvature in self.plan.curvatures(of_passes=True):
            if isinstance(curvature, OfSecants):
                step = self._step(curvature, 0, extra=Extra(previous=previous))
                with torch.enable_grad():
                    found |= curvature.secants(step)
        ranks = self.ranks
        return found if ranks is None else sum_secants(ranks, self.plan, found)
