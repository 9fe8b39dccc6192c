"""The trust region of a maker: bounds on a step by its predicted divergence or by the reduction of the loss."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradmaker.blocks import Block
from gradmaker.capture.sites import Site
from gradmaker.groups import OWN
from gradmaker.solvers.levenberg_marquardt import AdaptiveDamping
from gradmaker.triple import Triple
from gradmaker.trust_region.damping_state import due, judged
from gradmaker.trust_region.quadratic import QuadraticModel
from gradmaker.trust_region.region import Region
from gradmaker.trust_region.rescaling import rescaled

__all__ = ["TrustRegion", "TrustRegionOptions", "clip_factor"]


class TrustRegionOptions(Protocol):
    """The options of a config that a trust region reads."""

    @property
    def damping(self) -> float | None: ...
    @property
    def start_step(self) -> int: ...
    @property
    def clip(self) -> float | None: ...
    @property
    def clip_learning_rate(self) -> float | None: ...
    @property
    def adaptive_damping(self) -> AdaptiveDamping | None: ...
    @property
    def rescale(self) -> str: ...
    def damped(self, damping: float) -> TrustRegionOptions: ...
    def triple(self, site: Site) -> Triple | None: ...


class TrustRegion:
    """Adaptive damping, KL clip and rescaling, for a maker whose config has these options; its state is a `Region`."""

    def __init__(self, model: nn.Module, options: TrustRegionOptions) -> None:
        self.model, self.options = model, options
        self.learning_rate: float | None = None
        """Learning rate of the clip, in place of the config's."""
        self._names = {p: name for name, p in model.named_parameters()}
        self._own: list[Block] = []  # not those of the fallback, which has its own damping

    def start(self) -> Region:
        """The state before the first step."""
        return Region(float(self.options.damping or 0.0))

    def damping(self, region: Region) -> float | None:
        """The present ``lambda``."""
        return self.options.damping if self.options.adaptive_damping is None else region.damping

    def refuse_loop(self) -> None:
        """ValueError for options that repeat the loss, which an attached loop does not declare."""
        if self.repeats:
            raise ValueError(
                "attach: adaptive_damping and rescale have to repeat the loss, which attach() does not see: declare it with "
                "setup_model_call and setup_loss_call, or leave them out (adaptive_damping=None, rescale='none')"
            )

    @property
    def repeats(self) -> bool:
        """Whether any of its options repeats the loss."""
        return self.options.adaptive_damping is not None or self._rescales

    @property
    def _rescales(self) -> bool:
        return self.options.rescale != "none"

    # ---------------------------------------------------------------- damping that follows the loss
    def serve(self, blocks: Iterable[Block], region: Region) -> None:
        """Damp the blocks of a new plan."""
        if self.options.adaptive_damping is not None:
            self._own = [b for b in blocks if b.options.method == OWN and b.triple == self.options.triple(b.sites[0])]
            self.damp(region)

    def damp(self, region: Region) -> None:
        """Rebuild the triples of the blocks with the present ``lambda``."""
        if self._own:
            options = self.options.damped(region.damping)
            for block in self._own:
                block.triple = options.triple(block.sites[0]) or block.triple

    def judged(self, region: Region, step: int) -> Region:
        """The region at the beginning of a pass, with ``lambda`` adapted by a pending step."""
        rule = self.options.adaptive_damping
        return region if rule is None else judged(rule, region, step)

    def tries(self, step: int) -> bool:
        """Whether the end of this step needs its quadratic model."""
        rule = self.options.adaptive_damping
        return ((rule is not None and due(rule, step)) or self._rescales) and step >= self.options.start_step

    def reads_gradients(self, step: int) -> bool:
        """Whether the end of this step reads ``.grad`` beside ``P g``."""
        return self.tries(step) or self.options.clip is not None

    def check(self, step: int, trial: QuadraticModel | None) -> None:
        """RuntimeError at the end of a step that needs its quadratic model and has none."""
        if trial is None and self.tries(step):
            raise RuntimeError(
                "precondition: adaptive_damping or rescale needs this step, and its forward passes were not recorded, or not "
                "all by this maker: declare the calls (setup_model_call, setup_loss_call, forward_and_backward), and save "
                "between steps"
            )

    def ended(self, region: Region, trial: QuadraticModel | None, step: int) -> Region:
        """The region at the end of a finite step, which is pending until another step begins."""
        rule = self.options.adaptive_damping
        if rule is None or trial is None or not due(rule, step):
            return region
        return replace(region, waiting=trial, index=step)

    # ---------------------------------------------------------------- length
    def limited(
        self,
        region: Region,
        trial: QuadraticModel | None,
        step: int,
        covered: Collection[nn.Parameter],
        found: dict[nn.Parameter, Tensor],
    ) -> tuple[dict[nn.Parameter, Tensor], Region]:
        """Preconditioned gradients of the length that the clip or the rescaling gives, and the region after this.

        covered: parameters of the plan; found: their next ``.grad``, where it changes
        """
        clip, rate = self.options.clip, self.learning_rate or self.options.clip_learning_rate
        if step < self.options.start_step or (clip is None and not self._rescales):
            return found, region
        before = {p: p.grad for p in covered if p.grad is not None}
        after = {p: found.get(p, g) for p, g in before.items()}
        if self._rescales and trial is not None:
            return self._rescaled(region, trial, after)
        if clip is not None and rate is not None:
            factor = clip_factor(list(before.values()), list(after.values()), clip, rate)
            after = {p: (value * factor).to(value.dtype) for p, value in after.items()}
        return after, region

    def _rescaled(
        self, region: Region, trial: QuadraticModel, after: dict[nn.Parameter, Tensor]
    ) -> tuple[dict[nn.Parameter, Tensor], Region]:
        momentum = self.options.rescale == "momentum"
        last = {p: region.last[name] for p, name in self._names.items() if name in region.last}
        steps = rescaled(trial, {p: -g for p, g in after.items()}, last, self.damping(region) or 0.0)
        kept = {self._names[p]: step for p, step in steps.items()} if momentum else {}
        return {p: -step for p, step in steps.items()}, replace(region, last={**region.last, **kept})

    # ---------------------------------------------------------------- state
    def dump(self, region: Region, step: int) -> dict[str, Any]:
        """The adapted damping, and the last step, with an entry for every parameter that may have one.

        A batch cannot be saved: a pending step adapts the saved damping, if the weights have moved.
        """
        found: dict[str, Any] = {}
        if self.options.adaptive_damping is not None:
            found["damping"] = self.judged(region, step).damping
        if self._rescales:
            momentum, last = self.options.rescale == "momentum", region.last
            places = {name: p for p, name in self._names.items() if p.requires_grad} if momentum else {}
            steps = {k: last[k].clone() if k in last else torch.zeros_like(p) for k, p in places.items()}
            found["last_step"] = {"known": sorted(last), "step": steps}
        return found

    def load(self, saved: Mapping[str, Any]) -> Region:
        """The region that `dump` has saved. ValueError for names or shapes that the model does not have."""
        wanted = self.dump(self.start(), 0)
        if missing := [key for key in wanted if key not in saved]:
            raise ValueError(f"load_state_dict: missing {missing}: it was saved without adaptive_damping, or without rescale")
        region = self.start()
        if "damping" in wanted:
            region = replace(region, damping=float(saved["damping"]))
        return replace(region, last=self._last(saved["last_step"])) if "last_step" in wanted else region

    def _last(self, saved: Mapping[str, Any]) -> dict[str, Tensor]:
        own = {name: p for p, name in self._names.items()}
        if wrong := [name for name, d in saved["step"].items() if name not in own or own[name].shape != d.shape]:
            raise ValueError(f"load_state_dict: last_step: {wrong} are no parameters of this model, or of another shape there")
        if lost := sorted(set(saved["known"]) - set(saved["step"])):
            raise ValueError(f"load_state_dict: last_step: {lost} were saved and are not in this state")
        return {name: saved["step"][name].to(own[name].device, own[name].dtype, copy=True) for name in saved["known"]}


def clip_factor(gradients: list[Tensor], solved: list[Tensor], clip: float, rate: float) -> Tensor:
    """``nu``, on the device; 1 where the sum is not positive, which momentum can cause.  # ()"""
    wide = [(g.to(torch.promote_types(g.dtype, torch.float32)), v) for g, v in zip(gradients, solved, strict=True)]
    if not wide:
        return torch.ones(())
    total = torch.stack([(g * v).sum() for g, v in wide]).sum()
    bound = (clip / (rate**2 * total)).sqrt().clamp(max=1.0)
    return torch.where(total > 0, bound, torch.ones_like(bound))
