"""Damping that follows the loss: the rule of Levenberg and Marquardt on steps that the optimizer has taken."""

from __future__ import annotations

import torch

from gradmaker.solvers.levenberg_marquardt import AdaptiveDamping
from gradmaker.trust_region.quadratic import QuadraticModel, inner

__all__ = ["DampingState"]


class DampingState:
    """``lambda``, and the step by which it will be judged once the weights have moved.

    One host read for each time that ``lambda`` is judged, and none else.
    """

    def __init__(self, rule: AdaptiveDamping, damping: float) -> None:
        self.rule = rule
        self.value = damping
        self.ratio: float | None = None
        """``rho`` of the last time; minus infinity where the model predicted no decrease, or the loss was not finite."""
        self._trial: QuadraticModel | None = None
        self._index = -1  # of the step that is to be judged

    def due(self, step: int) -> bool:
        """Whether a step is the last of an interval, by which the rule goes."""
        return (step + 1) % self.rule.interval == 0

    def watch(self, trial: QuadraticModel, step: int) -> None:
        """Judge by this step, as soon as another begins."""
        self._trial, self._index = trial, step

    def judge(self, step: int) -> bool:
        """At the beginning of a step: judge the one that is waiting. Whether ``lambda`` has changed."""
        if self._trial is None or self._index == step:
            return False
        before = self.value
        self.value, self.ratio = self._judged(self._trial)
        self._trial = None
        return self.value != before

    def _judged(self, trial: QuadraticModel) -> tuple[float, float | None]:
        """The next ``lambda``, with ``rho``; as they are if the weights have not moved."""
        d = trial.displacement()
        loss, derivatives, F = trial.expand([d])
        size = inner(d, d)
        damping = torch.full_like(size, self.value)
        predicted = derivatives[0] + F[0, 0] / 2
        if self.rule.penalised:
            predicted = predicted + damping * size / 2
        change = trial.loss_now() - loss
        rule = self.rule.rule()
        found = torch.stack([rule.adapt(damping, change, predicted), rule.ratio(change, predicted), size]).tolist()
        return (found[0], found[1]) if found[2] != 0 else (self.value, self.ratio)

    # ---------------------------------------------------------------- state
    def dump(self, step: int) -> float:
        """``lambda``. A batch cannot be saved: a step that is waiting is judged for it, if the weights have moved."""
        waiting = self._trial is not None and self._index != step
        return self._judged(self._trial)[0] if waiting and self._trial is not None else self.value

    def load(self, value: float) -> None:
        """Go on from `dump`."""
        self.value, self.ratio, self._trial = float(value), None, None
