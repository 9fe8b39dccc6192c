"""The trust region of K-FAC's family: how far a step is trusted, by the divergence it predicts or by what it has brought."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradmaker.blocks import Block
from gradmaker.config import GradientConfig
from gradmaker.options.checks import check_choice, check_interval
from gradmaker.passes.batches import Batch
from gradmaker.preconditioner import Preconditioned, PreconditionedGradientMaker
from gradmaker.solvers import AdaptiveDamping
from gradmaker.trust_region.damping_state import DampingState
from gradmaker.trust_region.quadratic import QuadraticModel
from gradmaker.trust_region.rescaling import Rescaling

__all__ = ["TrustRegionGradientConfig", "TrustRegionGradientMaker", "clip_factor"]

T = TypeVar("T", bound="TrustRegionGradientConfig")


@dataclass(frozen=True, kw_only=True)
class TrustRegionGradientConfig(GradientConfig):
    """Options of the trust region.

    The KL clip is ``P g <- nu P g``, ``nu = min(1, sqrt(clip / (eta^2 sum g . P g)))`` with one sum for the model:
    ``eta^2 g . P g`` is twice the KL divergence between the model before and after a step of length ``eta``, to second order.
    Plain gradients neither enter the sum nor are scaled.

    Reference: Ba, Grosse, Martens, ICLR 2017 (distributed K-FAC); Pauloski et al., SC 2020, arXiv:2007.00784, whose code has
    ``clip = 1e-3``.
    """

    clip: float | None = None
    """kappa; None does not clip."""
    clip_learning_rate: float | None = None
    """eta, the learning rate that follows: needed with ``clip``. A schedule sets the maker's attribute of this name."""
    adaptive_damping: AdaptiveDamping | None = None
    """How ``damping``, the first ``lambda``, follows the loss: see `AdaptiveDamping`. A block takes it at its next refresh."""
    rescale: Literal["none", "length", "momentum"] = "none"
    """Whether the exact Fisher matrix of the batch, damped, chooses the length of the step, or that and the share of the last
    step: for SGD with a learning rate of 1. See `Rescaling`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clip", "clip_learning_rate"):
            value = getattr(self, name)
            if value is not None:
                check_interval(name, value, 0, math.inf, hint=", or None")
        if (self.clip is None) != (self.clip_learning_rate is None):
            raise ValueError(
                f"clip={self.clip!r}, clip_learning_rate={self.clip_learning_rate!r}: the clip bounds the length of a step, "
                "which is the learning rate times P g: give both, or neither"
            )
        check_choice("rescale", self.rescale, ["none", "length", "momentum"])
        if self.clip is not None and self.rescale != "none":
            raise ValueError(f"clip={self.clip!r}, rescale={self.rescale!r}: both choose the length of the step: give one")
        if self.adaptive_damping is not None and not self.damping:
            raise ValueError(f"damping={self.damping!r}: adaptive_damping multiplies it, so that it has to be positive")


class TrustRegionGradientMaker(Preconditioned[T]):
    """A gradient maker with a trust region; see `TrustRegionGradientConfig`."""

    clip_learning_rate: float | None = None
    """Replaces that of the config."""

    def __init__(self, model: nn.Module, config: T | None = None) -> None:
        super().__init__(model, config)
        rule = self.config.adaptive_damping
        self._damping = None if rule is None else DampingState(rule, float(self.config.damping or 0.0))
        how = self.config.rescale
        self._rescaling = None if how == "none" else Rescaling(model, momentum=how == "momentum")
        self._trial: QuadraticModel | None = None  # of the step that is under way
        self._with_adaptive_damping: list[Block] = []  # not those of the fallback, whose damping is their own
        self._planned()

    def _planned(self) -> None:
        if self._damping is not None:
            self._with_adaptive_damping = [b for b in self.plan.blocks if b.triple == self.config.triple(b.sites[0])]
            self._take_damping()

    @property
    def damping(self) -> float | None:
        """``lambda`` as it is now."""
        return self.config.damping if self._damping is None else self._damping.value

    @property
    def damping_ratio(self) -> float | None:
        """``rho`` of the last step that `damping` was judged by."""
        return None if self._damping is None else self._damping.ratio

    # ---------------------------------------------------------------- damping that follows the loss
    def _run(self, weight: float) -> tuple[Any, Tensor]:
        if self._damping is not None and self._damping.judge(self.step):
            self._take_damping()
        batch = Batch(self.model, self._declared[""], self.config) if self._tries() else None
        result: tuple[Any, Tensor] = super()._run(weight)
        if batch is not None:
            self._note_trial(batch, weight)
        return result

    def _tries(self) -> bool:
        """Whether a quadratic model of this step will be asked for."""
        judged = self._damping is not None and self._damping.due(self.step)
        return (judged or self._rescaling is not None) and self.step >= self.config.start_step

    def _note_trial(self, batch: Batch, weight: float) -> None:
        if self._part == 0:
            self._trial = QuadraticModel.at(self.model)
        if self._trial is not None:  # else the step began before a checkpoint, which holds no batches
            self._trial.passes[self._part :] = [(batch, weight)]  # in the place of what an exception has ended

    def _take_damping(self) -> None:
        """Make the parts with the ``lambda`` of now."""
        config = replace(self.config, damping=self.damping)
        for block in self._with_adaptive_damping:
            block.triple = config.triple(block.sites[0]) or block.triple

    def _precondition(self) -> None:
        if self._tries() and self._trial is None:
            raise RuntimeError(
                "precondition: adaptive_damping or rescale goes by this step, and its forward passes were not recorded, or not "
                "all by this maker: declare the calls (setup_model_call, setup_loss_call, forward_and_backward), and save "
                "between steps"
            )
        skipped, judged = self.skipped, self._damping if self._damping and self._damping.due(self.step) else None
        super()._precondition()
        if judged is not None and self._trial is not None and self.skipped == skipped:
            judged.watch(self._trial, self.step)
        self._trial = None

    def attach(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> PreconditionedGradientMaker:
        """As of any maker; refused where the loss has to be repeated."""
        if self._damping is not None or self._rescaling is not None:
            raise ValueError(
                "attach: adaptive_damping and rescale have to repeat the loss, which is out of sight here: declare it with "
                "setup_model_call and setup_loss_call, or leave them out (adaptive_damping=None, rescale='none')"
            )
        return super().attach(optimizer, *args, **kwargs)

    # ---------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """As of any maker, with the damping that is adapted and the last step, where they are used."""
        return {**super().state_dict(), **self._own_state()}

    def _own_state(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self._damping is not None:
            found["damping"] = self._damping.dump(self.step)
        if self._rescaling is not None:
            found["last_step"] = self._rescaling.dump()
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on, bitwise, from a `state_dict`."""
        used = {"damping": self._damping, "last_step": self._rescaling}
        wanted = [key for key, part in used.items() if part is not None]
        if isinstance(state, dict) and (missing := [key for key in wanted if key not in state]):
            raise ValueError(f"load_state_dict: missing {missing}: it was saved without adaptive_damping, or without rescale")
        own = {key: state[key] for key in wanted} if isinstance(state, dict) else {}
        if self._rescaling is not None and own:
            self._rescaling.check(own["last_step"])
        super().load_state_dict({k: v for k, v in state.items() if k not in own} if own else state)
        self._trial = None
        if self._rescaling is not None:
            self._rescaling.load(own["last_step"])
        if self._damping is not None:
            self._damping.load(own["damping"])
            self._take_damping()

    # ---------------------------------------------------------------- length
    @torch.no_grad()
    def _solve(self) -> None:
        clip, rate = self.config.clip, self.clip_learning_rate or self.config.clip_learning_rate
        if self.step < self.config.start_step or (clip is None and self._rescaling is None):
            super()._solve()
            return
        covered = dict.fromkeys(p for block in self.plan.blocks for site in block.sites for p in site.parameters.values())
        before = [(p, p.grad, p.grad.clone()) for p in covered if p.grad is not None]
        try:
            super()._solve()
            after = {p: g for p, g, _ in before}
            if self._rescaling is not None and self._trial is not None:
                self._rescale(self._rescaling, self._trial, after)
            elif clip is not None and rate is not None:
                factor = clip_factor([g for *_, g in before], list(after.values()), clip, rate)
                for value in after.values():
                    value.mul_(factor)
        except BaseException:  # it may be called again
            for _, now, g in before:
                now.copy_(g)
            raise

    def _rescale(self, rescaling: Rescaling, trial: QuadraticModel, solved: dict[nn.Parameter, Tensor]) -> None:
        proposed = {p: -g for p, g in solved.items()}
        rescaling.rescale_(trial, proposed, self.damping or 0.0)
        for p, step in proposed.items():
            solved[p].copy_(-step)


def clip_factor(gradients: list[Tensor], solved: list[Tensor], clip: float, rate: float) -> Tensor:
    """``nu``, on the device; 1 where the sum is not positive, as momentum can make it.  # ()"""
    wide = [(g.to(torch.promote_types(g.dtype, torch.float32)), v) for g, v in zip(gradients, solved, strict=True)]
    if not wide:
        return torch.ones(())
    total = torch.stack([(g * v).sum() for g, v in wide]).sum()
    bound = (clip / (rate**2 * total)).sqrt().clamp(max=1.0)
    return torch.where(total > 0, bound, torch.ones_like(bound))
