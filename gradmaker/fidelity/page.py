"""The report of a comparison of curvatures: an answer, tables, figures, notes, and what runs it again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gradmaker.fidelity.catalogue import EXACT, MEASURES
from gradmaker.fidelity.layers import WHOLE
from gradmaker.fidelity.tables import answer
from gradmaker.fidelity.values import Values

if TYPE_CHECKING:
    from gradmaker.reporting import Column, Document, Figure, HeatMap, Table

__all__ = ["document", "write_page"]

WHOLE_COLUMNS = (
    *("error", "error_scaled", "scale", "spectral_scaled", "inverse", "residual", "cosine", "length"),
    *("quadratic", "decrease", "trace", "effective_rank", "condition", "largest"),
)
OF_LAYERS = ("error_scaled", "error", "inverse", "cosine", "length", "decrease", "effective_rank", "condition")
LABEL = "approximation"
LETTERS = "C reference, Ĉ approximation, P preconditioner, p its power, λ damping, g gradient, s eigenvalues."


def write_page(result: Values, folder: Path, text: str, command: str = "") -> dict[str, Path]:
    """Write report, figures and the result as JSON into a folder; returns the files by name."""
    from gradmaker.reporting import write

    paths = write(document(result, command), folder)
    (folder / "fidelity.json").write_text(text + "\n", encoding="utf-8")
    return paths | {"result": folder / "fidelity.json"}


def document(result: Values, command: str = "") -> Document:
    """The report as a document."""
    from gradmaker.reporting import Document, Section, Text

    setting = result.setting
    formulas = [f"{m.title}: {m.formula}" for m in MEASURES.values() if any(v.measure == m.name for v in result.values)]
    sections = [
        Section("The whole model", [_whole(result), *_of_whole(result)]),
        Section("Layers", [*_heat_maps(result), *_layer_tables(result)]),
        Section("Spectra", list(_spectra(result))),
        Section("Along the training", list(_steps(result))),
        Section("Between layers", list(_coupling(result))),
        Section("Measures", [Text([LETTERS, *formulas], True)]),
    ]
    kept = ("device", "dtype", "python", "torch", "gradmaker")
    return Document(
        title=f"Fidelity to {setting['reference']}",
        answer=answer(result),
        lead=f"{setting['parameters']} parameters, {setting['how']}; {setting['runs']}",
        sections=[s for s in sections if s.blocks],
        rows=result.labels,
        notes=list(result.notes),
        machine={k: str(setting[k]) for k in kept},
        command=command,
        files={a.label: a.options for a in result.approximations},
    )


# ------------------------------------------------------------------ tables
def _whole(result: Values) -> Table:
    from gradmaker.reporting import Table

    labels = [k for k in dict.fromkeys(v.approximation for v in result.values) if k not in result.labels]
    known = [m for m in WHOLE_COLUMNS if any(result.mean(k, m) for k in (*result.labels, *labels))]
    rows = [_row(result, label, known) for label in (*result.labels, *labels)]
    costs = {a.label: {"seconds": a.seconds, "bytes": float(a.bytes)} for a in result.approximations}
    return Table(
        "whole", "", _columns(known, costs=True), [{**row, **costs.get(str(row[LABEL]), {})} for row in rows], marked=labels
    )


def _columns(measures: list[str], costs: bool = False) -> list[Column]:
    from gradmaker.reporting import Column

    found = [Column(LABEL, kind="row")]
    for name in measures:
        m = MEASURES[name]
        found.append(Column(name, m.title, format=".3g", spread=f"{name} spread", best=m.better, help=m.formula))
    if costs:
        found += [Column("seconds", "step", kind="seconds", help="a step of the maker at one measurement and refresh")]
        found += [Column("bytes", "state", kind="bytes", help="what its blocks hold")]
    return found


def _row(result: Values, label: str, measures: list[str], layer: str = WHOLE) -> dict[str, float | str | None]:
    row: dict[str, float | str | None] = {LABEL: label}
    for name in measures:
        if mean := result.mean(label, name, layer):
            row |= {name: mean.value, f"{name} spread": mean.error or None}
    return row


def _layer_tables(result: Values) -> Iterator[Table]:
    from gradmaker.reporting import Column, Table

    for name in OF_LAYERS:
        rows = []
        for layer in (*result.layer_names, WHOLE):
            means = {k: mean for k in (*result.labels, EXACT) if (mean := result.mean(k, name, layer))}
            if means:
                values = {k: v for label, m in means.items() for k, v in ((label, m.value), (f"{label} ±", m.error or None))}
                rows.append({"layer": layer, **values})
        labels = [k for k in (*result.labels, EXACT) if any(k in row for row in rows)]
        if rows:
            columns = [Column("layer", kind="text"), *(Column(k, format=".3g", spread=f"{k} ±") for k in labels)]
            m = MEASURES[name]
            yield Table(f"layers_{name}", m.title, columns, rows, m.formula, collapsed=name not in ("error_scaled", "cosine"))


# ------------------------------------------------------------------ figures
def _titled(text: str) -> str:
    """With a capital at its beginning; the letters of formulas stay."""
    return text[:1].upper() + text[1:]


def _of_whole(result: Values) -> Iterator[Figure]:
    """Error against cost."""
    from gradmaker.reporting import Axis, Figure, Series

    for name in ("error_scaled", "cosine"):
        series = []
        for a in result.approximations:
            mean = result.mean(a.label, name)
            if mean is not None and a.seconds > 0:
                bounds = [mean.value - mean.error], [mean.value + mean.error]
                details = {"bytes": [float(a.bytes)]}
                series.append(Series(a.label, [a.seconds], [mean.value], *bounds, details=details, mark="points"))
        if series:
            m = MEASURES[name]
            x, y = Axis("seconds of a step", "log"), Axis(m.title)
            yield Figure(f"cost_{name}", f"{_titled(m.title)} against cost", x, y, series, m.formula)


def _heat_maps(result: Values) -> Iterator[HeatMap]:
    from gradmaker.reporting import HeatMap

    layers = [*result.layer_names, WHOLE]
    for name, limits in (("error_scaled", (0.0, 1.0)), ("cosine", (0.0, 1.0))):
        found = [[_number(result, label, name, layer) for label in result.labels] for layer in layers]
        if any(value is not None for line in found for value in line):
            m = MEASURES[name]
            yield HeatMap(
                f"layers_{name}_map", _titled(m.title), result.labels, layers, found, m.title, m.formula, limits=limits
            )


def _number(result: Values, label: str, measure: str, layer: str) -> float | None:
    mean = result.mean(label, measure, layer)
    return None if mean is None else mean.value


def _spectra(result: Values) -> Iterator[Figure]:
    """Eigenvalues by rank: the share of eigenvalues that are larger."""
    from gradmaker.reporting import Axis, Figure, Series

    for layer in (WHOLE, *result.layer_names[:3]):
        series = []
        for label in (EXACT, *result.labels):
            spectrum = result.spectrum(label, layer)
            if spectrum is not None:
                x, y = _ranks(spectrum.nodes, spectrum.weights)
                if x:
                    series.append(Series(label, x, y, mark="line" if len(x) > 1 else "points"))
        if len(series) > 1:
            name = "spectra" if layer == WHOLE else f"spectra_{result.layer_names.index(layer)}"
            title = f"Eigenvalues of {'the whole model' if layer == WHOLE else layer}"
            axes = Axis("share of larger eigenvalues", "log"), Axis("eigenvalue", "log")
            yield Figure(name, title, *axes, series, "Reference and approximations; positive eigenvalues alone.")


def _ranks(nodes: tuple[float, ...], weights: tuple[float, ...]) -> tuple[list[float], list[float]]:
    """The share of eigenvalues that are at least as large, and the eigenvalue, from the largest."""
    x, y, above, least = list[float](), list[float](), 0.0, max(nodes, default=0.0) * 1e-8
    for node, weight in sorted(zip(nodes, weights, strict=True), reverse=True):
        above += weight
        if node > least and weight > 0:
            x.append(above)
            y.append(node)
    return x, y


def _steps(result: Values) -> Iterator[Figure]:
    """Cosines and errors over the steps of a training."""
    from gradmaker.reporting import Axis, Figure, Series

    if len(result.steps) < 2:
        return
    for name in ("cosine", "error_scaled", "length", "decrease"):
        series = []
        for label in result.labels:
            means = [(step, result.mean(label, name, step=step)) for step in result.steps]
            known = [(float(step), m) for step, m in means if m is not None]
            if known:
                low, high = ([m.value + sign * m.error for _, m in known] for sign in (-1, 1))
                series.append(Series(label, [step for step, _ in known], [m.value for _, m in known], low, high))
        if series:
            m = MEASURES[name]
            yield Figure(f"steps_{name}", f"{_titled(m.title)} over steps", Axis("step"), Axis(m.title), series, m.formula)


def _coupling(result: Values) -> Iterator[HeatMap]:
    from gradmaker.reporting import HeatMap

    names = [name for name in result.setting["coupled"] if name]
    if len(names) > 1 and len(result.coupling) == len(names):
        values = [[None if x != x else x for x in line] for line in result.coupling]
        caption = "|C_lk|_F / (|C_ll|_F |C_kk|_F)^(1/2): what every block-diagonal method leaves out is off the diagonal."
        yield HeatMap("coupling", "The reference between layers", names, names, values, "relative size", caption)
