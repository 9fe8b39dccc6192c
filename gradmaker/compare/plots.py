"""The figures: loss against steps and time, metric against steps, learning-rate search, and an overview."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy
import pandas
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from gradmaker.compare.result import Comparison
from gradmaker.compare.row_result import RowResult
from gradmaker.compare.trial import Record

# Okabe & Ito, Color Universal Design, 2008: distinguishable with colour blindness; without the yellow, too pale for lines.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
REFERENCE_COLOUR = "#6E6E6E"
DASHES = ("-", "--", ":", "-.")
SMOOTHING = 40  # a running mean of a loss curve spans 1 / SMOOTHING of its length
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "lines.linewidth": 1.9,
    "lines.solid_capstyle": "round",
}
Look = dict[str, Any]
Panel = Callable[[Axes, Comparison, dict[str, Look]], None]


def write_plots(comparison: Comparison) -> dict[str, Path]:
    """Write a PNG for each panel, and an overview of the first three; returns paths by name."""
    looks = _looks(comparison)
    files = {name: comparison.out / f"{name}.png" for name in ("overview", *PANELS)}
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        for name, panel in PANELS.items():
            _write([panel], comparison, looks, files[name], (6.4, 4.2))
        _write(list(PANELS.values())[:3], comparison, looks, files["overview"], (13.2, 4.3))
    return files


def _looks(comparison: Comparison) -> dict[str, Look]:
    """Colour and line style of every row: grey for optimizers without a maker, the palette for methods."""
    looks: dict[str, Look] = {}
    plain = made = 0
    for result in comparison.measured:
        if result.row.maker is None:
            looks[result.row.label] = {"color": REFERENCE_COLOUR, "linestyle": DASHES[(1 + plain) % 4], "zorder": 2}
            plain += 1
        else:
            looks[result.row.label] = {"color": PALETTE[made % 7], "linestyle": DASHES[made // 7 % 4], "zorder": 3}
            made += 1
    return looks


def _write(
    panels: Sequence[Panel], comparison: Comparison, looks: dict[str, Look], path: Path, size: tuple[float, float]
) -> None:
    """Write a figure with a row of panels and one legend below."""
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(wspace=0.05)  # type: ignore[union-attr, call-arg]
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        panel(axis, comparison, looks)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        columns = min(len(labels), 6 if len(panels) > 1 else 4)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    figure.savefig(path, dpi=160, metadata={"Software": None})


def _loss_steps(axis: Axes, comparison: Comparison, looks: dict[str, Look]) -> None:
    for result in comparison.measured:
        _band(axis, [(numpy.asarray(r.curve_steps, float), _loss(r)) for r in result.finished], looks[result.row.label], result)
    _decorate(axis, "Training loss against steps", "step", "training loss", log=True)


def _loss_time(axis: Axes, comparison: Comparison, looks: dict[str, Look]) -> None:
    starts: list[float] = []
    for result in comparison.measured:
        if result.finished:
            # seeds are averaged at equal steps, drawn at their mean time: a pause of one run does not shift its curve
            clock = numpy.mean([_clock(record) for record in result.finished], axis=0)
            _band(axis, [(clock, _loss(r)) for r in result.finished], looks[result.row.label], result)
            starts.append(clock[len(clock) // SMOOTHING])
    axis.set_xscale("log")
    if starts:
        axis.set_xlim(left=min(starts))
    _plain_ticks(axis.xaxis)
    _decorate(axis, "Training loss against time", "training time (s, log scale)", "training loss", log=True)


def _accuracy(axis: Axes, comparison: Comparison, looks: dict[str, Look]) -> None:
    name, percent = comparison.metric, comparison.metric == "accuracy"
    scale = 100.0 if percent else 1.0
    ends: list[float] = []
    for result in comparison.measured:
        curves = [(numpy.asarray(r.marks, float), scale * numpy.asarray(r.test[name], float)) for r in result.finished]
        _band(axis, curves, looks[result.row.label], result, marker="o" if len(curves) and len(curves[0][0]) <= 10 else None)
        ends += [float(y[len(y) // 4 :].min()) for _, y in curves if len(y)]
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if percent and ends:
        # the limit ignores the first quarter of the training, which may be far below the ends of the curves
        low = min(ends)
        axis.set_ylim(bottom=max(0.0, low - 0.35 * (100.2 - low) - 0.2))
    _decorate(axis, f"Test {name} against steps", "step", f"test {name}{' (%)' if percent else ''}", log=name == "loss")


def _search(axis: Axes, comparison: Comparison, looks: dict[str, Look]) -> None:
    name, percent = comparison.metric, comparison.metric == "accuracy"
    scale = 100.0 if percent else 1.0
    for result in comparison.measured:
        points = sorted((r.learning_rate, scale * r.end("validation", name)) for r in result.search if r.status == "finished")
        if points:
            rates, scores = zip(*points, strict=True)
            axis.plot(rates, scores, marker="o", markersize=4, label=result.row.label, **looks[result.row.label])
            chosen = [point for point in points if point[0] == result.learning_rate]
            colour = looks[result.row.label]["color"]
            axis.plot(*zip(*chosen, strict=True), marker="o", markersize=9, mfc="none", mec=colour, mew=1.6, zorder=4)
    axis.set_xscale("log")
    _plain_ticks(axis.xaxis)
    label = f"validation {name}{' (%)' if percent else ''}"
    _decorate(axis, "Learning-rate search (ring: selected)", "learning rate", label, log=name == "loss")


PANELS: dict[str, Panel] = {
    "loss_steps": _loss_steps,
    "loss_time": _loss_time,
    "test_steps": _accuracy,
    "learning_rates": _search,
}


def _band(axis: Axes, curves: list[tuple[Any, Any]], look: Look, result: RowResult, marker: str | None = None) -> None:
    """Draw the mean of the seeds' curves, which have common abscissae, and the band from lowest to highest."""
    if not curves:
        return
    x, values = curves[0][0], numpy.stack([y for _, y in curves])
    axis.plot(x, values.mean(0), label=result.row.label, marker=marker, markersize=4, **look)
    if len(curves) > 1:
        axis.fill_between(x, values.min(0), values.max(0), color=look["color"], alpha=0.15, linewidth=0, zorder=1)


def _loss(record: Record) -> Any:
    """Losses by step, each the mean over a window that ends at the step."""
    curve = pandas.Series(record.curve_loss, dtype=float)
    return curve.rolling(max(1, len(curve) // SMOOTHING), min_periods=1).mean().to_numpy()


def _clock(record: Record) -> Any:
    """Training seconds at the steps of the curve, interpolated between the evaluations."""
    return numpy.interp(record.curve_steps, [0, *record.marks], [0.0, *record.seconds])


def _decorate(axis: Axes, title: str, x: str, y: str, log: bool) -> None:
    axis.set_title(title)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    if log:
        axis.set_yscale("log")
        _plain_ticks(axis.yaxis)


def _plain_ticks(axis: Any) -> None:
    """Label ticks as 0.1 and 0.01 rather than powers; minor labels only for a range of few decades."""
    axis.set_major_locator(LogLocator(base=10))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
