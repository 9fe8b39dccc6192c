"""The tables of a study: one line a cell in CSV, Markdown, and the terminal."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradmaker.step_costs.cell import Cell
from gradmaker.step_costs.study import Costs

__all__ = ["line", "markdown", "write_csv"]

NOTES = """Times are CPU time of one process on a CPU, else wall time of the device: medians over windows of steps that
stand between windows of plain SGD (momentum 0.9) in the same process. A step is taken apart by differences of
kinds of steps: the passes are a step of SGD; the application is what a step takes more that neither measures
nor refreshes, the statistics what one takes more that measures, the refresh what one takes more that does
both. A step at interval T is the step that neither measures nor refreshes, a T-th of what both add, and a
T-th of what is done once between two refreshes, which is that of periods of ten steps: where few steps use a
refresh, K-FAC holds triangular factors, with which these steps take longer, and inverses where many do. The
floor is that of products, convolutions and decompositions alone. Memory is the peak of all tensors from
building the model to the end of two steps that measure and refresh, without the data. Predictions are those
of the cost model, from shapes alone."""


def line(cell: Cell) -> dict[str, Any]:
    """The numbers of a cell by column."""
    found: dict[str, Any] = {"model": cell.subject, "batch": cell.batch_size, "method": cell.row, "SGD ms": cell.sgd_ms}
    found |= {f"{name} ms": part.ms for name, part in cell.parts.items()}
    found |= {f"T={T} ms": ms for T, ms in cell.ms.items()} | {f"T={T} x SGD": ratio for T, ratio in cell.ratio.items()}
    found |= {f"T={T} predicted ms": ms for T, ms in cell.predicted_ms.items()}
    found |= {"peak bytes": cell.peak_bytes, "memory x SGD": cell.memory_ratio, "state bytes": cell.state_bytes}
    found |= {"predicted held bytes": cell.predicted_held, "predicted step bytes": cell.predicted_peak}
    found |= {"FLOP": sum(part.flops for part in cell.parts.values()), "x floor": cell.floor_ratio}
    return found | {"note": cell.message or cell.unpredicted}


def write_csv(costs: Costs, path: Path) -> None:
    """All cells, with all columns that any of them has."""
    lines = [line(cell) for cell in costs.cells]
    columns = list(dict.fromkeys(name for each in lines for name in each if name != "note"))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*columns, "note"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def markdown(costs: Costs, figures: Mapping[str, str]) -> str:
    """The page: figures, and for every subject a table of steps, of parts, and of predictions."""
    facts = ", ".join(f"{key} {value}" for key, value in costs.machine.items())
    blocks = ["# Cost of a step", " ".join(NOTES.split()), f"On {facts}; gradmaker {costs.setting['gradmaker']}."]
    blocks += [f"![{caption}]({name})" for name, caption in figures.items()]
    for subject in costs.subjects:
        cells = [cell for cell in costs.cells if cell.subject == subject]
        good = [cell for cell in cells if cell.status == "measured"]
        blocks += [
            f"## {subject}",
            table(_steps(good, costs.intervals)),
            table(_parts(good)),
            table(_predicted(good, costs.intervals)),
        ]
        blocks += [f"- {cell.row}, batch {cell.batch_size}: {cell.message}" for cell in cells if cell.status != "measured"]
        reasons = dict.fromkeys((cell.row, cell.unpredicted) for cell in good if cell.unpredicted)
        blocks += [f"- {row} is not predicted: {reason}" for row, reason in reasons]
    return "\n\n".join(block for block in blocks if block) + "\n"


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown of rows with the same columns; empty without rows."""
    if not rows:
        return ""
    heads = list(rows[0])
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *([row[head] for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _steps(cells: Sequence[Cell], intervals: Sequence[str]) -> list[dict[str, str]]:
    return [
        {
            "method": cell.row,
            "batch": str(cell.batch_size),
            "SGD ms": f"{cell.sgd_ms:.2f}",
            **{f"T={T} ms": f"{cell.ms[T]:.2f}" for T in intervals},
            **{f"T={T} x SGD": f"{cell.ratio[T]:.2f}" for T in intervals},
            "peak MB": _megabytes(cell.peak_bytes),
            "memory x SGD": _number(cell.memory_ratio),
            "state MB": _megabytes(cell.state_bytes),
        }
        for cell in cells
    ]


def _parts(cells: Sequence[Cell]) -> list[dict[str, str]]:
    """Milliseconds of parts; a part that a row has together with another is in the column of the last."""
    names = ("passes", "application", "statistics", "refresh")
    return [
        {
            "method": cell.row,
            "batch": str(cell.batch_size),
            **{f"{name}, ms": _part(cell, name) for name in names},
            "together, ms": next((f"{p.ms:.2f} ({name})" for name, p in cell.parts.items() if name not in names), "-"),
            "GFLOP": f"{sum(part.flops for part in cell.parts.values()) / 1e9:.3g}",
            "x floor": _number(cell.floor_ratio),
        }
        for cell in cells
    ]


def _part(cell: Cell, name: str) -> str:
    return f"{cell.parts[name].ms:.2f}" if name in cell.parts else "-"


def _predicted(cells: Sequence[Cell], intervals: Sequence[str]) -> list[dict[str, str]]:
    return [
        {
            "method": cell.row,
            "batch": str(cell.batch_size),
            **{f"T={T}: predicted / measured": f"{cell.predicted_ms[T] / cell.ms[T]:.2f}" for T in intervals},
            "held: predicted / measured": _number(cell.predicted_held / cell.state_bytes if cell.state_bytes else None),
        }
        for cell in cells
        if cell.predicted_ms
    ]


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
