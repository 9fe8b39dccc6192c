"""`fidelity_along`: the same measures at chosen steps of a training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from gradmaker.fidelity.instrument import fidelity
from gradmaker.fidelity.problem import Loss, kept_batches
from gradmaker.fidelity.references import ReferenceName
from gradmaker.fidelity.result import Fidelity

__all__ = ["FidelityAlong", "fidelity_along"]


class FidelityAlong:
    """Measures at chosen steps of any loop; call it with the number of each step.

        watch = fidelity_along(model, loss, batches, {"trained": maker, "fresh": "kfac"}, at=[1, 10, 100])
        for step in range(1, 101):
            ...
            watch(step)
        print(watch.result.table("cosine"))

    A maker among the approximations is measured with the statistics that it holds, which are as old as its intervals and its
    ``decay`` make them; a name or a config is measured afresh at every chosen step. Nothing of the training changes.
    """

    def __init__(self, at: Iterable[int] | None, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.at = None if at is None else frozenset(at)
        self.found: dict[int, Fidelity] = {}
        self._arguments, self._options = arguments, options

    def __call__(self, step: int) -> Fidelity | None:
        """Measure, if this is one of the chosen steps. Returns what was measured."""
        if self.at is not None and step not in self.at:
            return None
        self.found[step] = fidelity(*self._arguments, **self._options).at_step(step)
        return self.found[step]

    @property
    def result(self) -> Fidelity:
        """The values of all steps so far. RuntimeError before the first."""
        if not self.found:
            raise RuntimeError("fidelity_along: nothing was measured yet; call it with the number of each step")
        first, *others = [self.found[step] for step in sorted(self.found)]
        return first.joined(others)


def fidelity_along(
    model: nn.Module,
    loss: Loss | None,
    batches: Any,
    approximations: Any,
    reference: ReferenceName = "fisher_exact",
    *,
    at: Iterable[int] | None = None,
    **options: Any,
) -> FidelityAlong:
    """A measurement at chosen steps of a training, for staleness; see `FidelityAlong`.

    Args:
        model: the model that is trained.
        loss: as in `fidelity`.
        batches: as in `fidelity`: the same at all steps, so that differences are those of the training.
        approximations: as in `fidelity`; makers of the training with the statistics that they hold.
        reference: as in `fidelity`.
        at: the steps; None: every call.
        options: the other options of `fidelity`.
    """
    return FidelityAlong(
        at, (model, loss, kept_batches(batches, options.get("max_batches")), approximations, reference), options
    )
