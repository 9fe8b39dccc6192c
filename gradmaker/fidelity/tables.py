"""Tables of a result as text, and its answer in sentences."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from gradmaker.fidelity.approximations import DAMPING
from gradmaker.fidelity.catalogue import BLOCKS, EXACT, MEASURES
from gradmaker.fidelity.layers import WHOLE
from gradmaker.fidelity.values import Mean, Values

__all__ = ["OF_THE_WHOLE", "answer", "as_text", "cell", "overview", "short", "table_of", "whole_rows"]

OF_THE_WHOLE = ("error", "error_scaled", "spectral_scaled", "inverse", "residual", "cosine", "length", "quadratic", "decrease")
"""The measures of the table of the whole model."""
OF_LAYERS = ("error_scaled", "cosine")
"""The measures of the tables of layers."""


def short(value: float) -> str:
    """A number in three digits."""
    if math.isnan(value):
        return "-"
    if value != 0 and not 1e-3 <= abs(value) < 1e4:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def cell(mean: Mean | None) -> str:
    """A mean and its standard error."""
    if mean is None:
        return "-"
    return short(mean.value) + (f" ±{short(mean.error)}" if mean.error > 0 else "")


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left; the first row is the head."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = [
        "  ".join(text.rjust(w) if k else text.ljust(w) for k, (text, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def table_of(result: Values, measure: str) -> str:
    """One measure, layers by approximations."""
    labels = [k for k in (EXACT, *result.labels) if any(v.approximation == k and v.measure == measure for v in result.values)]
    names = [*result.layer_names, WHOLE]
    rows = [[name, *(cell(result.mean(k, measure, name)) for k in labels)] for name in names]
    m = MEASURES[measure]
    return f"{m.title}: {m.formula}\n" + as_text([["layer", *labels], *rows])


def whole_rows(result: Values) -> list[list[str]]:
    """The measures of the whole model by approximation, with a head."""
    labels = [*result.labels, *(k for k in (BLOCKS, EXACT) if any(v.approximation == k for v in result.values))]
    known = [m for m in OF_THE_WHOLE if any(result.mean(k, m) for k in labels)]
    rows = [[k, *(cell(result.mean(k, m)) for m in known)] for k in labels]
    return [["approximation", *(MEASURES[m].title for m in known)], *rows]


def overview(result: Values) -> str:
    """The whole model, then the layers, then the notes."""
    setting = result.setting
    head = f"{setting['reference']} of {setting['parameters']} parameters, {setting['how']}; {setting['runs']}"
    parts = [head, as_text(whole_rows(result))]
    parts += [table_of(result, m) for m in OF_LAYERS if any(v.measure == m and v.layer != WHOLE for v in result.values)]
    return "\n\n".join([*parts, *(["\n".join(f"- {note}" for note in result.notes)] if result.notes else [])])


def answer(result: Values) -> list[str]:
    """What was found, in sentences: what is nearest, what turns the gradient least wrongly, and what no block has."""
    found = []
    for measure, says, lowest in (
        ("error_scaled", "is nearest to the reference, with a relative error of {} after the best scalar", True),
        ("cosine", "has the direction nearest to the exact one, with a cosine of {}", False),
        ("decrease", "decreases the loss most at its best step length, by {}", False),
    ):
        known = {k: mean for k in result.labels if (mean := result.mean(k, measure))}
        if measure == "cosine" and len(_exact_directions(result, known)) > 1:
            listed = ", ".join(f"{k} {cell(m)}" for k, m in known.items())
            found.append(f"Cosines, each with the exact direction of its own power and damping: {listed}.")
        elif known:
            best = (min if lowest else max)(known, key=lambda k: known[k].value)
            others = ", ".join(f"{k} {short(m.value)}" for k, m in known.items() if k != best)
            found.append(f"{best} {says.format(cell(known[best]))}{f' ({others})' if others else ''}.")
    left = result.mean(EXACT, "off_diagonal")
    if left is not None:
        found.append(
            f"Blocks between layers, which no layer-wise approximation has, are {100 * left.value:.0f} % of the squared norm."
        )
    if found and len(result.steps) > 1:
        found.append(f"All of this is of step {result.steps[-1]}, as are tables and spectra.")
    return found or ["Nothing could be measured: see the notes."]


def _exact_directions(result: Values, labels: Collection[str]) -> set[tuple[float, float]]:
    """Power and damping of the exact directions with which those of approximations are compared."""
    given = result.setting.get("damping")
    own = [a for a in result.approximations if a.label in labels]
    return {(a.power, (DAMPING if math.isnan(a.damping) else a.damping) if given is None else given) for a in own}
