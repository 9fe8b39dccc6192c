"""The terms of a loop's loss, from a declared likelihood, or read from the gradient that arrives at the logits."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from gradmaker.capture.arrangement import Arrangement
from gradmaker.loops import checks
from gradmaker.loss.likelihood import LIKELIHOODS, Categorical, Likelihood, terms_from_gradient
from gradmaker.loss.reading import Fit, candidates, fit
from gradmaker.loss.recorder import log_axis
from gradmaker.loss.terms import Terms

__all__ = ["TRIES", "LossReader", "UndeclaredError"]

SUMS_TO_ZERO = 1e-2
"""Largest relative sum of a gradient over the axis of a softmax; in bfloat16 it is about 4e-3."""
TRIES = 32
"""Passes that may leave open what the loss is, as at the equal logits of a head that begins at zero."""


class UndeclaredError(RuntimeError):
    """The loss is none that can be read: it has to be declared, if the pass is part of a step."""


class LossReader:
    """Reads the terms of losses that are called outside of the model.

    Which likelihood it is, is proven once and kept in the arrangement of the maker, as the findings of self-checks are. A pass
    whose gradient has rounded away shows no weights, and is not measured.
    """

    def __init__(self, declared: Likelihood | None, accumulation: int) -> None:
        """accumulation: as declared; it is needed where a likelihood is declared"""
        self.declared, self.accumulation = declared, accumulation
        self._undecided = 0
        self._axis_is_open = isinstance(declared, Categorical)

    @property
    def weight(self) -> float:
        """The weight of a pass in the step: that of its loss where a likelihood is declared, 1 where weights are read."""
        return 1.0 if self.declared is None else 1.0 / self.accumulation

    def terms(self, known: Arrangement, z: Tensor, gradient: Tensor, scale: float | None) -> list[Terms] | None:
        """The terms of a pass, none where the gradient is not finite; None where it does not show them.

        gradient: dL/dz, as it arrived. scale: of a scaler; None without one. UndeclaredError for what cannot be read
        """
        if self.declared is not None:
            self._check_axis(z, gradient)
            return [terms_from_gradient(self.declared, z, gradient)]
        if not bool(torch.isfinite(gradient).all()):
            return []
        found = self._read(known, z, gradient)
        if found is None:
            return None
        factor = checks.scale_of(found.weighting.weight, self.accumulation, found.tolerance) if scale is None else None
        if factor is not None:
            raise UndeclaredError(checks.SCALED.format(factor))
        w = replace(found.weighting, weight=found.weighting.weight / (scale or 1.0))
        return [LIKELIHOODS[w.likelihood]().read(w)]

    def _check_axis(self, z: Tensor, gradient: Tensor) -> None:
        """RuntimeError where the gradient sums to zero over another axis than the declared one, as over that of a softmax.

        Checked once, at the first gradient that is not zero.
        """
        if not self._axis_is_open or z.ndim < 3 or log_axis(z, range(z.ndim)) is not None:
            return
        g = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        sums = torch.stack([g.sum(axis).norm() for axis in range(z.ndim)])
        whole, *found = torch.cat([g.norm().reshape(1), sums]).tolist()
        if not 0 < whole < math.inf:
            return
        assert isinstance(self.declared, Categorical)
        zero = [axis for axis, x in enumerate(found) if x <= SUMS_TO_ZERO * whole]
        if zero and self.declared.axis_of(z) not in zero:
            raise UndeclaredError(checks.wrong_axis(z.shape, self.declared.axis, zero))
        self._axis_is_open = False

    def _read(self, known: Arrangement, z: Tensor, gradient: Tensor) -> Fit | None:
        """The fit of the likelihood that was proven, or of another that this pass proves; None where nothing is shown."""
        if known.likelihood is None:
            return self._prove(known, z, gradient, False)
        found = fit(known.likelihood, z, gradient, known=True)
        if not found.clear:
            return None
        return found if found.fits else self._prove(known, z, gradient, True)

    def _prove(self, known: Arrangement, z: Tensor, gradient: Tensor, before: bool) -> Fit | None:
        """Prove which likelihood the loss has; None while that is open.  before: whether earlier passes proved another"""
        found: list[Fit] = []
        for likelihood in candidates(z):
            found.append(fit(likelihood, z, gradient))
            if found[-1].proves:
                if found[-1].ordered:
                    raise UndeclaredError(checks.FOCAL)
                known.likelihood = likelihood
                return found[-1]
        if before or all(f.clear and not f.fits for f in found):
            raise UndeclaredError(checks.unread(z.shape, {_name(f): f.residual for f in found}, before))
        self._undecided += bool(gradient.any())
        if self._undecided > TRIES:
            raise UndeclaredError(checks.OPEN.format(TRIES, tuple(z.shape)))
        return None


def _name(f: Fit) -> str:
    axis = getattr(f.likelihood, "axis", None)
    return f.weighting.likelihood if axis is None else f"{f.weighting.likelihood} with the classes on axis {axis}"
