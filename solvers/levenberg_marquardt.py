"""The Levenberg-Marquardt rule: damping adapted by how well the quadratic model predicts the change of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from gradmaker.options.checks import check_count, check_interval, check_kind

__all__ = ["AdaptiveDamping", "LevenbergMarquardt"]


@dataclass(frozen=True, kw_only=True)
class LevenbergMarquardt:
    """``rho = (L(theta + delta) - L(theta)) / (m(delta) - m(0))``: damping shrinks above ``high`` and grows below ``low``.

    Both losses are of the batch of the step; ``delta`` is the full step, whatever the learning rate is.

    Reference: Moré 1978; Martens, ICML 2010, section 4.1, for the default constants.
    """

    low: float = 0.25
    high: float = 0.75
    grow: float = 1.5
    shrink: float = 2 / 3
    least: float = 1e-8
    most: float = 1e8

    def __post_init__(self) -> None:
        check_interval("low", self.low, -inf, inf)
        check_interval("high", self.high, self.low, inf, closed=True)
        check_interval("grow", self.grow, 1, inf, closed=True)
        check_interval("shrink", self.shrink, 0, 1 + 1e-12)
        check_interval("least", self.least, 0, inf)
        check_interval("most", self.most, self.least, inf)

    def adapt(self, damping: Tensor, change: Tensor, predicted: Tensor) -> Tensor:
        """The next damping. It grows where the loss is not finite or the model predicts no decrease.  # (1,)"""
        rho = self.ratio(change, predicted)
        one = torch.ones_like(damping)  # its dtype: `where` would round a number to float32
        factor = torch.where(rho < self.low, one * self.grow, torch.where(rho > self.high, one * self.shrink, one))
        return (damping * factor).clamp(self.least, self.most)

    def ratio(self, change: Tensor, predicted: Tensor) -> Tensor:
        """``rho``; minus infinity where the loss is not finite or no decrease is predicted."""
        usable = torch.isfinite(change) & (predicted < 0)
        return torch.where(usable, change / torch.where(usable, predicted, -1.0), -inf)


@dataclass(frozen=True, kw_only=True)
class AdaptiveDamping:
    """Every ``interval`` steps ``lambda`` is multiplied by ``omega^interval`` if ``rho > high``, divided if ``rho < low``.

    ``rho = (L(theta + d) - L(theta)) / (g^T d + d^T F d / 2)`` for the step ``d`` that the optimizer took, on the batch of
    that step, with its exact Fisher matrix ``F``. ``penalised`` adds ``lambda |d|^2 / 2`` to the model.

    Reference: Martens & Grosse, ICML 2015, arXiv:1503.05671, section 6.5, for rule and constants; no penalty by default, as in
    kfac-jax.
    """

    interval: int = 5
    omega: float = 19 / 20
    low: float = 0.25
    high: float = 0.75
    least: float = 1e-8
    most: float = 1e8
    penalised: bool = False

    def __post_init__(self) -> None:
        check_count("interval", self.interval, 1)
        check_interval("omega", self.omega, 0, 1)
        check_kind("penalised", self.penalised, bool)
        self.rule()

    def rule(self) -> LevenbergMarquardt:
        """The Levenberg-Marquardt rule that is applied every ``interval`` steps."""
        factor = self.omega**self.interval
        return LevenbergMarquardt(
            low=self.low, high=self.high, grow=1 / factor, shrink=factor, least=self.least, most=self.most
        )
