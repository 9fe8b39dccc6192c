"""Cost of a step of this library and of its peers, family by family, as ratios to SGD with momentum.

    python benchmarks/peers.py --quick
    python benchmarks/peers.py --rows kfac --rows soap --workloads mlp512 --only ours

CPU time of one thread, interleaved with SGD in one process: means over whole windows of steps, medians over windows. Kinds of
steps: `plain` neither measures nor refreshes, `stat` measures, `T1` does both at every step, `T10` both at every tenth. Cells
that the JSON file holds for the same sources, or the same version of a peer, are not measured again.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Literal

import torch
import typer
from own_rows import OWN, RATE, Row, sgd
from peer_rows import PEERS
from peers_page import in_page, render
from row_checks import equal_to_formed, equal_to_peer, learning, peak_ratio
from workloads import WORKLOADS, build

from gradmaker.compare.cost import machine
from gradmaker.costs.floor import floor, record
from gradmaker.costs.timing import measure

ROOT = Path(__file__).resolve().parents[1]
SHORT, PAGE = ROOT / "docs" / "speed.md", ROOT / "benchmarks" / "peers.md"
EQUAL_ON = "mlp128-b32"  # where directions are compared: rows pay in all of its layers
SOME = ("kfac", "kfac-emp", "shampoo", "soap", "smw_ng", "ASDL kfac", "pytorch_optimizer SOAP", "ASDL smw")
QUICK: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("mlp512", ("*",)),
    *((workload, SOME) for workload in ("mlp128", "mlp128-b32", "conv", "gpt2l")),
)
"""The short matrix: workloads with patterns of rows."""
SOURCES = ("gradmaker", "curvature", "representations", "solvers")
Found = dict[str, Any]


# ------------------------------------------------------------------ versions
def version_of(row: Row, own: str) -> str:
    """The version that a cell is measured on: of the package, or `own` for rows of this library."""
    try:
        return own if row.library == "gradmaker" else metadata.version(row.library)
    except metadata.PackageNotFoundError:
        return "missing"


def sources() -> str:
    """A hash of the library's sources."""
    digest = hashlib.blake2b(digest_size=6)
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


# ------------------------------------------------------------------ cells
def attempt(run: Callable[[], Any]) -> Any:
    """What it returns; the error, where peers cannot do it."""
    try:
        torch.manual_seed(0)
        return run()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def time_of(row: Row, workload: str, windows: int, limit: float) -> Found:
    """Ratios of every kind of step of a row."""
    steps = {kind: row.make(build(workload), kind, RATE) for kind in row.kinds}
    found = measure(steps, sgd(build(workload), "", RATE), windows, limit)
    return {kind: ratio.as_dict() for kind, ratio in found.items()}


def floors_of(row: Row, workload: str) -> Found:
    """Of each kind of step; of peers the FLOPs of a step that does everything."""
    found: Found = {}
    own = row.library == "gradmaker"
    for kind in (k for k in row.kinds if k != "T10" and (own or k == "T1")):
        step = row.make(build(workload), kind, RATE)
        for _ in range(2):
            step()
        found[kind] = floor(step).as_dict() if own else {"all_gflop": round(record(step).gflop(), 4)}
    return found


def cell(row: Row, workload: str, windows: int, limit: float) -> Found:
    """What is measured of a row on a workload; an error in its place says why there is nothing."""
    start = perf_counter()
    found: Found = {"time": attempt(lambda: time_of(row, workload, windows, limit))}
    if "error" not in found["time"]:
        found["memory"] = attempt(lambda: peak_ratio(row, workload))
        found["floor"] = attempt(lambda: floors_of(row, workload))
    return found | {"seconds": round(perf_counter() - start, 1)}


def checks(row: Row) -> Found:
    """Of a row on any workload: learning, and for ours equal directions."""
    found: Found = {"learning": attempt(lambda: learning(row))}
    if row.library == "gradmaker":
        found["formed"] = attempt(lambda: equal_to_formed(row, EQUAL_ON))
        found["peer"] = attempt(lambda: equal_to_peer(row.name, EQUAL_ON))
    return found


# ------------------------------------------------------------------ what is asked for
def selected(rows: Iterable[str], workloads: Iterable[str], only: str, quick: bool) -> Iterator[tuple[str, Row]]:
    """Workloads and rows of a run, by names or patterns."""
    plan = QUICK if quick else tuple((name, ("*",)) for name in WORKLOADS)
    for workload, names in plan:
        if workloads and not any(fnmatch.fnmatch(workload, rule) for rule in workloads):
            continue
        for row in (*OWN, *PEERS):
            named = not rows or any(fnmatch.fnmatch(name, rule) for rule in rows for name in (row.name, row.family))
            ours = (row.library == "gradmaker") == (only == "ours") or only == "all"
            if named and ours and any(fnmatch.fnmatch(row.name, rule) for rule in names):
                yield workload, row


def is_known(found: Found | None, version: str) -> bool:
    return found is not None and found["version"] == version and "error" not in str(found)


def read(path: Path) -> Found:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cells": {}, "rows": {}}


def write(path: Path, known: Found) -> None:
    path.with_suffix(".json").write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    path.write_text(render(known, (*OWN, *PEERS)), encoding="utf-8")
    if path == PAGE:
        SHORT.write_text(in_page(SHORT.read_text(encoding="utf-8"), known, (*OWN, *PEERS)), encoding="utf-8")


def main(
    rows: Annotated[list[str] | None, typer.Option(help="Rows or families, or patterns of them; default: all.")] = None,
    workloads: Annotated[list[str] | None, typer.Option(help="Workloads, or patterns of them; default: all.")] = None,
    only: Annotated[Literal["all", "ours", "peers"], typer.Option(help="Whose rows.")] = "all",
    quick: Annotated[bool, typer.Option(help="The short matrix.")] = False,
    again: Annotated[bool, typer.Option(help="Measure known cells again.")] = False,
    checked: Annotated[bool, typer.Option(help="Learning on digits and equal directions too.")] = True,
    windows: Annotated[int, typer.Option(help="Windows of each kind of step.")] = 10,
    limit: Annotated[float, typer.Option(help="Seconds of a cell after which three windows suffice.")] = 12.0,
    time_limit: Annotated[float, typer.Option(help="Minutes after which no further cell is begun.")] = 180.0,
    out: Annotated[Path, typer.Option(help="Markdown file; a JSON file is written beside it.")] = PAGE,
) -> None:
    """Measure what is asked for and is not known, and write the page."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # peers warn at every step
    start, own, known = perf_counter(), sources(), read(out.with_suffix(".json"))
    known["machine"] = machine("cpu")
    wanted = list(selected(rows or (), workloads or (), only, quick))
    cells = known["cells"]
    missing = [(w, row) for w, row in wanted if again or not is_known(cells.get(f"{w}/{row.name}"), version_of(row, own))]
    print(f"{len(missing)} of {len(wanted)} cells to measure, about {len(missing) * 20 / 60:.0f} minutes", flush=True)
    for workload, row in missing:
        if perf_counter() - start > 60 * time_limit:
            break
        key, version = f"{workload}/{row.name}", version_of(row, own)
        known["cells"][key] = {"version": version, **cell(row, workload, windows, limit)}
        print(f"{key:28}", line(known["cells"][key]), flush=True)
        if checked and not is_known(known["rows"].get(row.name), version):
            known["rows"][row.name] = {"version": version, **checks(row)}
            print(f"{'':28}", {k: v for k, v in known["rows"][row.name].items() if k != "version"}, flush=True)
        write(out, known)
    write(out, known)


def line(found: Found) -> str:
    """A cell as one line of text."""
    if "error" in found["time"]:
        return str(found["time"]["error"])
    ratios = "  ".join(f"{kind} {r['ratio']:6.2f} (+-{100 * r['spread']:2.0f}%)" for kind, r in found["time"].items())
    return f"{ratios}  memory {found['memory']}  [{found['seconds']:.0f} s]"


if __name__ == "__main__":
    typer.run(main)
