"""The page of the comparison with other libraries, from its JSON file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from own_rows import KINDS, Row
from workloads import WORKLOADS

Found = Mapping[str, Any]
MEASURES = ("plain", "T1", "T10", "memory")
TARGETS: dict[str, tuple[float | None, ...]] = {
    "kfac": (1.9, 4.7, 2.5, 3.2),
    "kfac-decay0": (1.8, 2.5, 1.9, 1.6),
    "skfac": (1.8, 2.5, 1.9, 1.6),
    "ekfac": (5.0, 23, 6.7, 4.1),
    "shampoo": (1.9, 18, 3.9, 3.7),
    "soap": (5.0, 20, 7.0, 4.4),
    "kl_shampoo": (1.9, 18, 3.8, 4.0),
    "kradagrad_star": (2.0, 30, 4.8, 4.1),
    "psgd_whiten": (2.0, 8, 2.7, 3.0),
    "smw_ng": (None, 1.4, None, 1.2),
    "seng": (1.3, 1.45, 1.3, 1.6),
    "muon-bf16": (None, 5.4, None, 1.6),
}
"""On `mlp512`: plain, T=1, T=10, memory."""
OF_PEER = {"adam": 1.1, "adagrad": 1.1}
"""Rows that are to be within a factor of the whole step of the best peer."""
BEGIN, END = "<!-- speed: made by benchmarks/peers.py -->", "<!-- end of speed -->"
"""Marks of the short table in docs/speed.md."""
BOUND = 1.25
"""A row this close to its floor is at its bound."""
MISSING = (
    "Not on the package index, or not for this Python and torch: Distributed Shampoo (Meta), emerging-optimizers (needs "
    "Python 3.12), the authors' KrADagrad. torchzero's Shampoo was left out: one step at T=1 took 3000 steps of SGD. ASDL's "
    "EKFAC and K-BFGS are repaired, since the releases return the raw gradient and drop the update. HeavyBall runs eagerly."
)
HEAD = """# Cost of a step, and of the same step of other libraries

Made by `python benchmarks/peers.py`. Ratios to SGD with momentum in the same run: CPU time of one thread, interleaved in one
process, means over whole windows of steps, medians over windows. `plain`: a step that neither measures nor refreshes; `+stat`:
with the statistic; `T=1`: both at every step; `T=10`: both at every tenth, over whole windows of ten steps. Peers without
`plain` measure at every step, in their `T=10` too. Memory: the peak of live tensors over that of SGD. Floor: what the products,
convolutions and decompositions of a step take alone in the same run; the last column has the times of plain / +stat / T=1
steps over their floors. Digits: loss after 100 steps at the best of five learning rates (the first is about 2.3) and test
accuracy. A dash: the row has no such step. Intervals are explicit in every row.
"""


def ratio(cell: Found | None, measure: str) -> float | None:
    """A ratio to SGD; None where there is none."""
    if cell is None or "error" in cell["time"]:
        return None
    if measure == "memory":
        return cell["memory"] if isinstance(cell["memory"], float) else None
    found = cell["time"].get(measure)
    return None if found is None else found["ratio"]


def floor_ms(cell: Found, kind: str) -> float | None:
    """Milliseconds of the floor of a kind of step; a mean over a window for T10."""
    floors = cell.get("floor", {})
    if kind == "T10" and "plain" in floors and "T1" in floors:
        return float(0.9 * floors["plain"]["ms"] + 0.1 * floors["T1"]["ms"])
    return floors[kind]["ms"] if kind in floors and "ms" in floors[kind] else None


def over_floor(cell: Found, kind: str) -> float | None:
    """A step over its floor."""
    least = floor_ms(cell, kind)
    return None if least is None or kind not in cell["time"] else cell["time"][kind]["ms"] / least


def show(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits if value < 100 else 0}f}"


# ------------------------------------------------------------------ tables
def render(known: Found, rows: Sequence[Row]) -> str:
    """The page."""
    facts = ", ".join(f"{key} {value}" for key, value in known.get("machine", {}).items())
    lines = [HEAD, f"On {facts}.", "", MISSING, "", "## In short", "", *short(known, rows), ""]
    lines += ["## Targets", "", *targets(known, rows), ""]
    for name, (what, _) in WORKLOADS.items():
        lines += [f"## {name}: {what}", "", *table(known, rows, name), ""]
    return "\n".join([*lines, "## Checks", "", *checks(known, rows)]) + "\n"


def short(known: Found, rows: Sequence[Row], workload: str = "mlp512") -> Iterator[str]:
    """Each row of this library beside the lowest number of its peers, a column at a time."""
    yield f"{WORKLOADS[workload][0] if workload in WORKLOADS else workload}: this library / the best peer of its family."
    yield ""
    yield "| row | plain | T=1 | T=10 | memory |"
    yield "|---|---|---|---|---|"
    for row in (row for row in rows if row.library == "gradmaker"):
        if (cell := known["cells"].get(f"{workload}/{row.name}")) is not None:
            pairs = ((ratio(cell, measure), best_of_peers(known, rows, row, workload, measure)) for measure in MEASURES)
            yield f"| {row.name} | {' | '.join(f'{show(own)} / {show(best)}' for own, best in pairs)} |"


def in_page(text: str, known: Found, rows: Sequence[Row]) -> str:
    """The text of a page with the short table of now."""
    before, rest = text.split(BEGIN)
    return "\n".join([before + BEGIN, *short(known, rows), END + rest.split(END)[1]])


def best_of_peers(known: Found, rows: Sequence[Row], row: Row, workload: str, measure: str) -> float | None:
    """The lowest ratio of the peers of a row."""
    peers = [p.name for p in rows if p.family == row.family and p.library != "gradmaker"]
    theirs = [r for name in peers if (r := ratio(known["cells"].get(f"{workload}/{name}"), measure)) is not None]
    return min(theirs, default=None)


def table(known: Found, rows: Sequence[Row], workload: str) -> Iterator[str]:
    """All rows on a workload, family by family; what was not run is named below."""
    cells, left_out = known["cells"], []
    if not any(f"{workload}/{row.name}" in cells for row in rows):
        yield "Not run."
        return
    yield "| row | plain | +stat | T=1 | T=10 | memory | GFLOP of T=1 | over the floor |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in by_family(rows):
        cell = cells.get(f"{workload}/{row.name}")
        if cell is None:
            left_out.append(row.name)
            continue
        if "error" in cell["time"]:
            yield f"| {row.name} | {cell['time']['error'].replace('|', '/')[:90]} | | | | | | |"
            continue
        times = " | ".join(show(ratio(cell, kind)) for kind in KINDS)
        floors = " / ".join(show(over_floor(cell, kind)) for kind in KINDS[:3])
        note = f" ({row.note})" if row.note else ""
        yield f"| {row.name}{note} | {times} | {show(ratio(cell, 'memory'))} | {show(gflop(cell), 1)} | {floors} |"
    if left_out:
        yield ""
        yield f"Not run: {', '.join(left_out)}."


def by_family(rows: Sequence[Row]) -> Iterator[Row]:
    for family in dict.fromkeys(row.family for row in rows):
        yield from (row for row in rows if row.family == family)


def gflop(cell: Found) -> float | None:
    found = cell.get("floor", {}).get("T1", {})
    return found.get("all_gflop", sum(found["gflop"].values()) if "gflop" in found else None)


def targets(known: Found, rows: Sequence[Row]) -> Iterator[str]:
    """What is to be reached and what was: the given numbers, or half of the best peer's overhead, or the floor."""
    yield "Each cell: reached / wanted. Wanted is the number of the row where it has one, else half of the best peer's"
    yield f"overhead, or {BOUND} x the floor where that is more or there is no peer (marked f); memory: the leanest peer's."
    yield ""
    yield f"| workload | row | {' | '.join(MEASURES)} | all met |"
    yield "|---|---|---|---|---|---|---|"
    for workload in WORKLOADS:
        for row in rows:
            cell = known["cells"].get(f"{workload}/{row.name}")
            if row.library == "gradmaker" and cell is not None and "error" not in cell["time"]:
                yield _target_line(known, rows, row, workload, cell)


def _target_line(known: Found, rows: Sequence[Row], row: Row, workload: str, cell: Found) -> str:
    shown, met = [], True
    for at, measure in enumerate(MEASURES):
        reached = ratio(cell, measure)
        wanted, mark = wanted_of(known, rows, row, workload, at)
        if reached is None or wanted is None:
            shown.append(show(reached))
            continue
        good = reached <= wanted * 1.005  # what the page would round to the same number
        met &= good
        shown.append(f"{show(reached)} / {show(wanted)}{mark}" + ("" if good else " **no**"))
    return f"| {workload} | {row.name} | {' | '.join(shown)} | {'yes' if met else 'no'} |"


def wanted_of(known: Found, rows: Sequence[Row], row: Row, workload: str, at: int) -> tuple[float | None, str]:
    """The ratio to be reached, and how it was found: given, of the peer, or of the floor (f)."""
    given = TARGETS.get(row.name, (None,) * 4)[at] if workload == "mlp512" else None
    if given is not None:
        return given, ""
    measure, cell = MEASURES[at], known["cells"][f"{workload}/{row.name}"]
    best = best_of_peers(known, rows, row, workload, measure)
    if measure == "memory":
        return best, ""
    if row.family in OF_PEER:
        return (None if best is None else OF_PEER[row.family] * best), ""
    half = None if best is None else 1 + (best - 1) / 2
    least = floor_ms(cell, measure)
    bound = None if least is None or measure not in cell["time"] else BOUND * least / cell["time"][measure]["sgd_ms"]
    if bound is not None and (half is None or bound > half):
        return bound, "f"
    return half, ""


def checks(known: Found, rows: Sequence[Row]) -> Iterator[str]:
    """Learning and equal directions of each row."""
    yield "Learning on digits; the largest relative error, in float64 over three steps of each kind, of directions against the"
    yield "same rows with every gradient formed, and against a peer whose formula is near: equal where it is that of rounding."
    yield ""
    yield "| row | learning rate | loss | accuracy | against formed | against a peer |"
    yield "|---|---|---|---|---|---|"
    for row in by_family(rows):
        found = known["rows"].get(row.name)
        if found is None:
            continue
        learned = found["learning"]
        seen = [f"{learned[key]:g}" if key in learned else "-" for key in ("rate", "last", "accuracy")]
        yield f"| {row.name} | {' | '.join(seen)} | {_error(found.get('formed'))} | {_against(found.get('peer'))} |"


def _error(value: Any) -> str:
    return "-" if value is None else f"{value:.1e}" if isinstance(value, float) else str(value.get("error", ""))[:60]


def _against(value: Any) -> str:
    return f"{value[0]}: {value[1]:.1e}" if isinstance(value, (list, tuple)) else _error(value)
