"""The figures of a comparison: metric against cost, curves over steps and time, searches, sensitivity."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Literal

from gradmaker.compare.result import Comparison
from gradmaker.compare.row_result import RowResult
from gradmaker.compare.trial import Record
from gradmaker.reporting import Axis, Figure, Rule, Series

SMOOTHING = 40  # a running mean of a loss curve spans 1 / SMOOTHING of its length
POINTS = 120  # of a curve on the page
COSTS = {
    "seconds": ("Against time", "steps × step time (s)", "Time of a training: steps × median time of an interleaved step."),
    "memory_ratio": ("Against memory", "peak memory / SGD", "Peak memory, as a ratio to plain SGD."),
}
Curve = list[tuple[float, float]]


def metric_axis(comparison: Comparison, part: str = "test") -> Axis:
    """The axis of the metric."""
    percent = comparison.metric == "accuracy"
    positive = comparison.metric == "loss"
    return Axis(f"{part} {comparison.metric}", "log" if positive else "linear", ".1%" if percent else "")


def front(comparison: Comparison, cost: str) -> Figure | None:
    """All rows as metric against cost, and the line of those that no other row dominates."""
    points = comparison.pareto(cost)
    if len(points) < 2:
        return None
    rows = {result.row.label: result for result in comparison.rows}
    series = []
    for point in points:
        ends = rows[point.label].ends()
        on = {"on the front": ["yes" if point.front else "no"]}
        series.append(Series(point.label, [point.cost], [point.metric], [min(ends)], [max(ends)], on, "points"))
    line = sorted((point.cost, point.metric) for point in points if point.front)
    series.append(Series("", *_columns(line), mark="step"))
    title, axis, caption = COSTS[cost]
    told = "Bars reach from the lowest to the highest seed. No row is better in both than those on the dashed line."
    return Figure(f"front_{cost}", title, Axis(axis, "log"), metric_axis(comparison), series, f"{caption} {told}")


def loss_curves(comparison: Comparison, over: Literal["steps", "seconds"]) -> Figure | None:
    """Loss of the mini-batches against steps, or steps x step time."""
    series = list(_series(comparison, over, _loss))
    axis = Axis("step") if over == "steps" else Axis(COSTS["seconds"][1], "log")
    caption = f"Running means over 1/{SMOOTHING} of the training; bands reach from the lowest to the highest seed."
    title = f"Training loss against {'steps' if over == 'steps' else 'time'}"
    return Figure(f"loss_{over}", title, axis, Axis("training loss", "log"), series, caption) if series else None


def metric_curves(comparison: Comparison, over: Literal["steps", "seconds"]) -> Figure | None:
    """The metric on the test part at every evaluation, with the target."""
    series = list(_series(comparison, over, lambda record: _tested(comparison, record)))
    if not series:
        return None
    axis = Axis("step") if over == "steps" else Axis(COSTS["seconds"][1], "log")
    values = replace(metric_axis(comparison), limits=_limits(comparison, series))
    rules = [Rule(reach.target, "target") for reach in comparison.reaches()[:1]]
    title = f"Test {comparison.metric} against {'steps' if over == 'steps' else 'time'}"
    caption = "On the test part at every evaluation; bands reach from the lowest to the highest seed."
    if values.limits:
        caption += " The axis leaves out the first quarter of the training."
    return Figure(f"metric_{over}", title, axis, values, series, caption, rules)


def search_figure(comparison: Comparison) -> Figure | None:
    """The metric on the validation part by learning rate, first seed."""
    series = []
    for result in comparison.rows:
        tried = [(r.learning_rate, r.end("validation", comparison.metric)) for r in result.search if r.status == "finished"]
        if tried:
            chosen = {"selected": ["yes" if rate == result.learning_rate else "no" for rate, _ in sorted(tried)]}
            series.append(Series(result.row.label, *_columns(sorted(tried)), details=chosen))
    if all(len(one.x) < 2 for one in series):
        return None
    axis = metric_axis(comparison, "validation")
    caption = "On the validation part at the end of the training, first seed; the selected rate is told under the pointer."
    return Figure("search", "Search of the learning rate", Axis("learning rate", "log"), axis, series, caption)


def sensitivity(comparison: Comparison) -> Iterable[Figure]:
    """The metric of each row with one setting changed."""
    for parameter in dict.fromkeys(line.parameter for line in comparison.sensitivity):
        by_row: dict[str, list[tuple[float, float | None]]] = {}
        for line in comparison.sensitivity:
            if line.parameter == parameter:
                by_row.setdefault(line.label, []).append((line.value, line.metric))
        series = [Series(label, *_columns(sorted(points, key=lambda point: point[0]))) for label, points in by_row.items()]
        name = parameter.replace("_", " ")
        if any(value is not None for one in series for value in one.y):
            axis, title = Axis(name, "log"), f"Sensitivity to {name}"
            yield Figure(f"sensitivity_{parameter}", title, axis, metric_axis(comparison), series, "All else as selected.")


def _limits(comparison: Comparison, series: Sequence[Series]) -> tuple[float, float] | None:
    """Of an accuracy, which begins far below the values that are compared: from the last three quarters of the curves."""
    if comparison.metric != "accuracy":
        return None
    lows = [y for one in series for y in (one.low or one.y)[len(one.y) // 4 :] if isinstance(y, float)]
    highs = [y for one in series for y in (one.high or one.y) if isinstance(y, float)]
    low, high = min(lows, default=0.0), max(highs, default=1.0)
    margin = 0.05 * (high - low) + 1e-3
    return max(0.0, low - margin), min(1.0, high + margin)


# --- curves ---------------------------------------------------------------------------------------------------------------
def _series(comparison: Comparison, over: str, curve_of: Callable[[Record], Curve]) -> Iterable[Series]:
    """A curve of every row, mean and ends over seeds at equal steps; on the axis of time by the median time of a step."""
    for result in comparison.rows:
        scale = _scale(result, over)
        curves = [curve for record in result.finished if (curve := curve_of(record))]
        if scale is not None and curves:
            points = list(zip(*curves, strict=False))  # a budget in seconds may end at other steps in each seed
            x = [_short(scale * seeds[0][0]) for seeds in points]
            values = [[_short(y) for _, y in seeds] for seeds in points]
            ends = (list(map(min, values)), list(map(max, values))) if len(curves) > 1 else (None, None)
            yield Series(result.row.label, x, [_short(fmean(seeds)) for seeds in values], *ends)


def _short(value: float) -> float:
    """The digits that the page can show."""
    return float(f"{value:.6g}")


def _scale(result: RowResult, over: str) -> float | None:
    if over == "steps":
        return 1.0
    return result.cost.step_seconds if result.cost else None


def _loss(record: Record) -> Curve:
    """Losses by step, each the mean over a window that ends at the step; at most `POINTS`, none that a log axis cannot hold."""
    known = [(step, loss) for step, loss in zip(record.curve_steps, record.curve_loss, strict=True) if loss is not None]
    width = max(1, len(known) // SMOOTHING)
    means = [(step, fmean(loss for _, loss in known[max(0, i + 1 - width) : i + 1])) for i, (step, _) in enumerate(known)]
    means = means[width - 1 :]
    every = max(1, len(means) // POINTS)
    return [(step, loss) for step, loss in means[::every] if step > 0 and loss > 0]


def _tested(comparison: Comparison, record: Record) -> Curve:
    log = metric_axis(comparison).scale == "log"
    values = zip(record.marks, record.test.get(comparison.metric, []), strict=False)
    return [(float(mark), value) for mark, value in values if value is not None and (value > 0 or not log)]


def _columns(points: Sequence[tuple[float, float | None]]) -> tuple[list[float], list[float | None]]:
    return [x for x, _ in points], [y for _, y in points]
