"""The figures of costs after the poster of Osawa et al. 2023, arXiv:2305.04684: ratios of throughput and memory to SGD."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from gradmaker.step_costs.cell import Cell
from gradmaker.step_costs.study import Costs

__all__ = ["write_figures"]

COLORS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")  # Okabe & Ito 2008
MARKERS = "osD^vPX*"
SIZE = (2.9, 2.5)
TIMES = "\u00d7"


def write_figures(costs: Costs, out: Path) -> dict[str, str]:
    """Write the figures of a study as SVG; returns captions by file name."""
    if not any(cell.status == "measured" for cell in costs.cells):
        return {}
    throughput, memory, intervals = _throughput(costs), _memory(costs), _intervals(costs)
    captions = {
        "throughput.svg": (throughput, "Throughput as a ratio to SGD against batch size, by model and interval T"),
        "throughput_interval.svg": (intervals, "Throughput as a ratio to SGD against the interval T, by model and batch size"),
        "memory.svg": (memory, "Peak memory as a ratio to SGD against batch size, by model"),
    }
    for name, (figure, _) in captions.items():
        figure.savefig(out / name, bbox_inches="tight", metadata={"Date": None})
    return {name: caption for name, (_, caption) in captions.items()}


def _throughput(costs: Costs) -> Figure:
    figure, axes = _grid(len(costs.intervals), len(costs.subjects))
    for y, T in enumerate(costs.intervals):
        for x, subject in enumerate(costs.subjects):
            _lines(axes[y][x], costs, subject, lambda c: c.batch_size, partial(_throughput_of, T))
            axes[y][x].set_title(f"{subject}, T = {T}", fontsize=8)
    return _finished(figure, axes, "batch size", f"throughput, {TIMES} SGD")


def _throughput_of(interval: str, cell: Cell) -> float:
    return 1 / cell.ratio[interval]


def _memory(costs: Costs) -> Figure:
    figure, axes = _grid(1, len(costs.subjects))
    for x, subject in enumerate(costs.subjects):
        _lines(axes[0][x], costs, subject, lambda c: c.batch_size, lambda c: c.memory_ratio)
        axes[0][x].set_title(subject, fontsize=8)
    return _finished(figure, axes, "batch size", f"peak memory, {TIMES} SGD")


def _intervals(costs: Costs) -> Figure:
    """Against T at the smallest and the largest batch size."""
    sizes = sorted({cell.batch_size for cell in costs.cells})
    chosen = list(dict.fromkeys((sizes[0], sizes[-1])))
    figure, axes = _grid(len(chosen), len(costs.subjects))
    for y, size in enumerate(chosen):
        for x, subject in enumerate(costs.subjects):
            for number, row in enumerate(costs.rows):
                for cell in costs.of(subject, row):
                    if cell.batch_size == size:
                        Ts = [int(T) for T in cell.ratio]
                        _draw(axes[y][x], number, row, Ts, [1 / ratio for ratio in cell.ratio.values()])
            axes[y][x].set_title(f"{subject}, batch {size}", fontsize=8)
    return _finished(figure, axes, "interval T", f"throughput, {TIMES} SGD")


def _grid(rows: int, columns: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(SIZE[0] * columns + 1.2, SIZE[1] * rows))
    return figure, figure.subplots(rows, columns, squeeze=False, sharex=True, sharey="row")


def _lines(axis: Any, costs: Costs, subject: str, x: Callable[[Cell], float], y: Callable[[Cell], float | None]) -> None:
    for number, row in enumerate(costs.rows):
        points = [(x(cell), y(cell)) for cell in costs.of(subject, row) if y(cell) is not None]
        if points:
            _draw(axis, number, row, *zip(*points, strict=True))


def _draw(axis: Any, number: int, row: str, xs: Sequence[float], ys: Sequence[Any]) -> None:
    marker = MARKERS[number % len(MARKERS)]
    axis.plot(xs, ys, label=row, color=COLORS[number % len(COLORS)], marker=marker, markersize=4, linewidth=1.2)


def _finished(figure: Figure, axes: Any, x: str, y: str) -> Figure:
    for axis in axes.flat:
        axis.set_xscale("log", base=2 if x == "batch size" else 10)
        axis.set_yscale("log")
        for each in (axis.xaxis, axis.yaxis):
            each.set_major_formatter(ScalarFormatter())
            each.set_minor_formatter("")
        axis.axhline(1, color="0.7", linewidth=0.8, zorder=0)
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.tick_params(labelsize=7)
    for axis in axes[-1]:
        axis.set_xlabel(x, fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel(y, fontsize=8)
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(0.92, 0.5), fontsize=8, frameon=False)
    return figure
