"""The cost model for rows: seconds and bytes of a step from shapes alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradmaker.compare.batches.reading import Call
from gradmaker.compare.rows import Row
from gradmaker.costs.prediction import StepCost, cost as predict, cost_of_gradient
from gradmaker.errors import CostError
from gradmaker.step_costs.steps import INTERVALS, clocks_of, make, with_intervals
from gradmaker.step_costs.subjects import Subject

__all__ = ["Predicted", "predicted"]


@dataclass(frozen=True)
class Predicted:
    """Predicted milliseconds of a step by interval, bytes held, and bytes of a step; or why there are none.

    own: milliseconds with the intervals of the row itself
    """

    own: float | None = None
    ms: dict[int, float] | None = None
    held: int = 0
    peak: int = 0
    reason: str = ""


def predicted(row: Row, subject: Subject, size: int, intervals: Sequence[int], device: str) -> Predicted:
    """The predictions for a row; without any where the cost model refuses the method or the model."""
    try:
        own = _cost(row, subject, size, device)
        clocks = clocks_of(row, subject, device) if intervals else ()
        if not set(INTERVALS) & set(clocks):
            return Predicted(1e3 * own.seconds, {T: 1e3 * own.seconds for T in intervals}, own.held, own.peak)
        found = {T: _cost(with_intervals(row, clocks, T, T), subject, size, device) for T in intervals}  # each holds its own
    except (CostError, ValueError) as error:
        return Predicted(reason=" ".join(str(error).split()))
    return Predicted(1e3 * own.seconds, {T: 1e3 * each.seconds for T, each in found.items()}, own.held, own.peak)


def _cost(row: Row, subject: Subject, size: int, device: str) -> StepCost:
    made = make(row, subject, size, device)
    kind = row.optimizer_class()

    def optimizer(parameters: object) -> Any:
        return kind(parameters, lr=1e-4, **row.options)

    try:
        if made.maker is None:
            return cost_of_gradient(made.model, _inputs(made.batch), optimizer=optimizer)
        return predict(made.maker, _inputs(made.batch), optimizer=optimizer)
    finally:
        made.close()


def _inputs(call: Call) -> Any:
    """The arguments of a call as the cost model takes them."""
    return dict(call.kwargs) if call.kwargs else (call.args[0] if len(call.args) == 1 else call.args)
