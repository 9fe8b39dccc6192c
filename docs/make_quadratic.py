"""Writes tables and picture of docs/data/quadratic.md from docs/data/quadratic.json: what lies between two marks is replaced.

The numbers are those of examples/kradagrad_quadratic.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

DOCS = Path(__file__).resolve().parent
GREY = ("SGD", "Adam", "Nesterov-SGD")


def load(docs: Path) -> dict[str, Any]:
    """What the experiment has saved."""
    found: dict[str, Any] = json.loads((docs / "data" / "quadratic.json").read_text(encoding="utf-8"))
    return found


def render(docs: Path = DOCS) -> str:
    """The page with the tables of now."""
    saved = load(docs)
    text = (docs / "data" / "quadratic.md").read_text(encoding="utf-8")
    for name, body in tables(saved).items():
        block = f"<!-- {name} -->\n{body}\n<!-- end {name} -->"
        text = re.sub(
            rf"<!-- {re.escape(name)} -->.*?<!-- end {re.escape(name)} -->", lambda _, block=block: block, text, flags=re.DOTALL
        )
    return text


def write(docs: Path = DOCS) -> None:
    """Page and picture."""
    (docs / "data" / "quadratic.md").write_text(render(docs), encoding="utf-8")
    (docs / "images").mkdir(exist_ok=True)
    draw(load(docs), docs / "images" / "quadratic.png")


def tables(saved: dict[str, Any]) -> dict[str, str]:
    """Markdown by the name of its place."""
    conditions = sorted({row["condition"] for row in saved["tuned"]})
    out = {"published": published(saved["published"])}
    out |= {f"tuned {c:.0e}": tuned(saved, c) for c in conditions}
    out["starts"] = starts(saved)
    out["time"] = times(saved["times"])
    seconds = sum(found["seconds"] for found in saved["trials"].values())
    facts = ", ".join(f"{k} {v}" for k, v in saved["machine"].items())
    out["machine"] = f"{len(saved['trials'])} trials, {seconds / 60:.0f} minutes of CPU time. On {facts}."
    return out


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join([f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}", *(f"| {' | '.join(r)} |" for r in rows)])


def _shown(x: float | None) -> str:
    return "diverged" if x is None else f"{x:.3g}"


def published(entries: Sequence[dict[str, Any]]) -> str:
    """Value, ratio to the reference where there is one, range over moved starts where that is more than 2 %."""
    conditions = sorted({e["condition"] for e in entries})
    cells: dict[str, list[str]] = {}
    for e in entries:
        line = cells.setdefault(e["method"], [e["method"], f"{e['rate']:g}"])
        ratio = f" ({e['end'] / e['reference']:.2f})" if e["reference"] and e["end"] else ""
        moved = [end for end in (*e["moved"], e["end"]) if end is not None]
        wide = len(moved) > 1 and max(moved) > 1.02 * min(moved)
        line.append(_shown(e["end"]) + ratio + (f", {min(moved):.2g} to {max(moved):.2g}" if wide else ""))
    return _table(["method", "rate", *(f"{c:.0e}" for c in conditions)], cells.values())


def _ends(saved: dict[str, Any], row: dict[str, Any]) -> list[float]:
    """Infinite where it diverged."""
    found = [saved["trials"][key]["end"] for key in row["trials"]]
    return [math.inf if end is None else end for end in found]


def tuned(saved: dict[str, Any], condition: float) -> str:
    """The best rate of every method at one condition."""
    rows = [row for row in saved["tuned"] if row["condition"] == condition]
    base = _ends(saved, next(row for row in rows if row["method"] == "SGD"))
    lines = []
    for row in rows:
        ends, found = _ends(saved, row), [saved["trials"][key] for key in row["trials"]]
        spread = f" ± {stdev(ends):.2g}" if len(ends) > 1 else ""
        ratio = mean(a / b for a, b in zip(ends, base, strict=True))
        note = ["edge of the grid"] * row["edge"] + ["inactive"] * any(t["inactive"] for t in found)
        line = [row["method"], f"{row['rate']:g}", f"{mean(ends):.3g}{spread}", f"{ratio:.2g}", _held(found), ", ".join(note)]
        lines.append(line)
    return _table(["method", "rate", "f, mean ± std", "f / SGD", "conditions held", "note"], lines)


def _held(found: Sequence[dict[str, Any]]) -> str:
    """Geometric means over seeds of the condition of each factor."""
    if not found[0]["conditions"]:
        return ""
    shown = []
    for values in zip(*(t["conditions"] for t in found), strict=True):
        known = [v for v in values if v is not None]
        shown.append("singular" if len(known) < len(values) else f"{math.exp(mean(map(math.log, known))):.2g}")
    return ", ".join(dict.fromkeys(shown))


def starts(saved: dict[str, Any]) -> str:
    """What the first steps and the momentum change."""
    names = list(dict.fromkeys(row["start"] for row in saved["starts"]))
    lines: dict[str, list[str]] = {}
    for row in saved["starts"]:
        lines.setdefault(row["method"], [row["method"]]).append(f"{mean(_ends(saved, row)):.3g} at {row['rate']:g}")
    return _table(["method", *names], lines.values())


def times(saved: dict[str, dict[str, float]]) -> str:
    """Milliseconds, and the ratio to SGD."""
    names = list(next(iter(saved.values())))
    lines = [[n, *(f"{found[n]:.2f} ({found[n] / found['SGD']:.1f})" for found in saved.values())] for n in names]
    return _table(["method", *(f"N = {size}" for size in saved)], lines)


# ------------------------------------------------------------------ the picture
def draw(saved: dict[str, Any], path: Path) -> None:
    """``f`` over the iterations at the tuned rates: the mean over seeds, and the range between them."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from gradmaker.reporting.palette import STYLE

    conditions = sorted({row["condition"] for row in saved["tuned"]})
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(4.6 * len(conditions), 4.8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(conditions), squeeze=False, sharey=True)[0]
        for axis, condition in zip(axes, conditions, strict=True):
            for row, look in _looks(saved, condition):
                curves = [saved["trials"][key]["curve"] for key in row["trials"]]
                if all(curves):
                    x = _iterations(saved["setting"]["iterations"])
                    middle = [math.exp(mean(map(math.log, values))) for values in zip(*curves, strict=True)]
                    axis.plot(x, middle, label=row["method"], **look)
                    low, high = (list(map(f, zip(*curves, strict=True))) for f in (min, max))
                    axis.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)
            axis.set(yscale="log", xlabel="iteration", title=f"condition {condition:.0e} of each factor")
        axes[0].set_ylabel("f")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        figure.savefig(path, dpi=130, metadata={"Software": None})


def _iterations(count: int) -> list[int]:
    return [i for i in range(count) if i < 10 or i % 10 == 0 or i == count - 1]


def _looks(saved: dict[str, Any], condition: float) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Grey for the methods without a preconditioner."""
    from gradmaker.reporting.palette import DASHES, LIGHT

    rows = [row for row in saved["tuned"] if row["condition"] == condition]
    plain = [row for row in rows if row["method"] in GREY]
    made = [row for row in rows if row["method"] not in GREY]
    looks = [(row, {"color": "#6E6E6E", "linestyle": DASHES[k % 4]}) for k, row in enumerate(plain)]
    return looks + [(row, {"color": LIGHT[k % 7], "linestyle": DASHES[k // 7 % 4]}) for k, row in enumerate(made)]


if __name__ == "__main__":
    write()
