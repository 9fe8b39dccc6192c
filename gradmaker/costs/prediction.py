"""Predicted seconds and bytes of a step, and a warning where a default costs several times as much as Adam."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from math import ceil, inf, isfinite
from typing import Any

import torch
from torch import nn

from gradmaker.config import GradientConfig
from gradmaker.costs.counting import Work
from gradmaker.costs.rates import rates
from gradmaker.costs.trial import Loss, Optimizing, PredictedMaker, Steps, build_like, run, trying
from gradmaker.errors import CostError, CostlyMethodWarning
from gradmaker.options.registry import METHODS
from gradmaker.schedule import as_schedule

__all__ = ["StepCost", "cost", "cost_of_gradient", "explained", "warn_if_costly"]

COSTLY = 3.0
"""Steps of Adam from which a default is called costly."""
WITHIN = 1.0
"""Seconds that `warn_if_costly` may take for a trial; it is silent where they do not suffice."""
INTERVALS = ("curvature_interval", "preconditioner_interval")


@dataclass(frozen=True)
class Part:
    """Seconds of the steps of one method of a plan: those that measure, and those that refresh, too; and the intervals."""

    measured: float
    refreshed: float
    curvature_interval: int
    preconditioner_interval: int

    def over(self, idle: float, preconditioner_interval: int | None = None) -> float:
        """Seconds that it adds to an idle step, averaged over the intervals."""
        every = self.preconditioner_interval if preconditioner_interval is None else preconditioner_interval
        return (self.measured - idle) / self.curvature_interval + (self.refreshed - self.measured) / every


@dataclass(frozen=True)
class StepCost:
    """Predicted seconds and bytes of a step with its passes.

    idle: seconds of a step that neither measures nor refreshes, if there are such steps
    parts: what each method of the plan adds, see `Part`
    held: bytes of statistics, caches and averages; peak: bytes of gradients and temporary tensors beside these
    flops: of an idle step
    """

    idle: float
    held: int
    peak: int
    flops: float
    parts: Mapping[str, Part] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Seconds of a step, averaged over the intervals after the warm-up."""
        return self.idle + sum(part.over(self.idle) for part in self.parts.values())

    def at(self, preconditioner_interval: int) -> float:
        """The same, with another interval of refreshes of the method."""
        others = [part.over(self.idle) for name, part in self.parts.items() if name != "method"]
        return self.idle + sum(others) + self.parts["method"].over(self.idle, preconditioner_interval)

    def __str__(self) -> str:
        text = f"{_duration(self.seconds)} a step, {self.held:,} bytes held, {self.peak:,} bytes in a step"
        for name, p in self.parts.items():
            idle = {"idle": self.idle} if p.curvature_interval > 1 else {}
            kinds = {**idle, "measures": p.measured, "measures and refreshes": p.refreshed}
            text += f"; {name}: " + ", ".join(f"{kind} {_duration(s)}" for kind, s in kinds.items())
        return text


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def cost(maker: PredictedMaker, batch: Any, loss: Loss | None = None, optimizer: Optimizing | None = None) -> StepCost:
    """Predict seconds and bytes of a step from shapes alone; may be called before the first step, and changes nothing.

    Steps of each kind are made on tensors without data, so that every operator of the method is counted; each is priced by
    rates that are measured on this machine when they are first needed. See docs/using.md.

    batch: the input of the model: a tensor, a tuple of arguments, or a mapping of named ones; only shapes matter.
    loss: of what the model returns; None: the mean cross-entropy of its logits.
    optimizer: called with the parameters; None: without the step of an optimizer.
    CostError, with the reason, for a model or a method whose steps need data.
    """
    return _cost(maker, batch, loss, optimizer, inf)


def cost_of_gradient(
    model: nn.Module,
    batch: Any,
    loss: Loss | None = None,
    optimizer: Optimizing | None = None,
) -> StepCost:
    """The same for a step of a `torch.optim.Optimizer` on the plain gradient."""
    return _priced(model, None, batch, loss, optimizer, inf, {})


def _cost(maker: PredictedMaker, batch: Any, loss: Loss | None, optimizer: Optimizing | None, deadline: float) -> StepCost:
    methods = getattr(getattr(maker, "plan", None), "methods", {})
    at = {name: max(maker.step_state.now.index, config.warmup_steps) for name, config in methods.items()}
    intervals = {
        name: tuple(as_schedule("", getattr(config, each)).interval(at[name]) for each in INTERVALS)
        for name, config in methods.items()
    }
    return _priced(maker.model, build_like(maker), batch, loss, optimizer, deadline, intervals)


def _priced(
    model: nn.Module,
    build: Callable[[nn.Module], Any] | None,
    batch: Any,
    loss: Loss | None,
    optimizer: Optimizing | None,
    deadline: float,
    intervals: Mapping[str, tuple[int, ...]],
) -> StepCost:
    steps = _steps(model, build, batch, loss, optimizer, deadline)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def seconds(work: Work) -> float:
        return rates(device).seconds(work)

    parts = {
        name: Part(seconds(steps.measured[name]), seconds(steps.refreshed[name]), *intervals.get(name, (1, 1)))
        for name in steps.measured
    }
    return StepCost(seconds(steps.idle), steps.held, steps.peak, steps.idle.total_flops, parts)


def _steps(
    model: nn.Module,
    build: Callable[[nn.Module], Any] | None,
    batch: Any,
    loss: Loss | None,
    optimizer: Optimizing | None,
    deadline: float,
) -> Steps:
    with explained(), trying(model, build, batch, loss, optimizer, deadline) as (loop, recorder):
        return run(loop, recorder)


@contextmanager
def explained() -> Iterator[None]:
    """Raises a CostError for any exception of a trial."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CostError(f"cost: steps on tensors without data failed: {type(error).__name__}: {reason}") from error


def warn_if_costly(maker: PredictedMaker, batch: Any, loss: Loss | None = None, within: float = WITHIN) -> None:
    """Warn where a step with the default intervals is predicted to take more than three steps of Adam.

    Silent for intervals that were chosen, and where the cost cannot be predicted in time.

    within: seconds for each of two trials
    """
    config = maker.config
    if not isinstance(config, GradientConfig) or not _default_intervals(config):
        return
    try:
        own = _cost(maker, batch, loss, None, within)
        adam = _priced(maker.model, None, batch, loss, torch.optim.Adam, within, {})
    except CostError:
        return
    if own.seconds > COSTLY * adam.seconds:
        warnings.warn(_advice(maker, own, adam.seconds), CostlyMethodWarning, stacklevel=2)


def _default_intervals(config: GradientConfig) -> bool:
    defaults = {f.name: f.default for f in fields(config)}
    return all(getattr(config, name) == defaults[name] for name in INTERVALS)


def _advice(maker: PredictedMaker, own: StepCost, adam: float) -> str:
    made: Any = type(maker)
    name = next((n for n in METHODS if METHODS[n] is made), made.__name__)
    text = f"{name} at these shapes: about {_duration(own.seconds)} a step, {own.seconds / adam:.1f} x Adam's"
    part = own.parts.get("method")
    longer = None if part is None else _interval(own, part, adam)
    if longer is None:
        return f"{text}; a longer interval of refreshes would not change that much"
    return f"{text}; preconditioner_interval={longer} would make it {_duration(own.at(longer))}, {own.at(longer) / adam:.1f} x"


def _interval(own: StepCost, part: Part, adam: float) -> int | None:
    """An interval of refreshes with which a step is not costly, or at most a tenth above what no refresh would reach."""
    least, each = own.at(2**40), part.refreshed - part.measured
    if each / part.preconditioner_interval < 0.1 * own.seconds:
        return None
    wanted = max(COSTLY * adam - least, 0.1 * least)
    return _rounded(max(ceil(each / wanted), part.preconditioner_interval + 1)) if isfinite(wanted) else None


def _rounded(interval: int) -> int:
    """The next of 2, 5, 10, 20, 50, ..."""
    scale = 1
    while True:
        for step in (1, 2, 5):
            if step * scale >= interval:
                return step * scale
        scale *= 10
