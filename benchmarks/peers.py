"""Cost of a step of this library and of its peers, family by family, as ratios to SGD with momentum.

    python benchmarks/peers.py --quick
    python benchmarks/peers.py --rows kfac --rows soap --workloads mlp512 --only ours

CPU time of one thread, interleaved with SGD in one process: means over whole windows of steps, medians over windows. Kinds of
steps: `plain` neither measures nor refreshes, `stat` measures, `T1` does both at every step, `T10` both at every tenth. Cells
that the JSON file holds for the same sources are not measured again.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Literal

import torch
import typer
from own_rows import OWN, RATE, Row, sgd
from peer_rows import PEERS
from timing import measure
from workloads import WORKLOADS, build

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "benchmarks" / "peers.md"
QUICK: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("mlp512", ("*",)),
    *((name, ("kfac", "shampoo", "soap", "smw_ng")) for name in ("mlp128", "mlp128-b32", "conv", "gpt2l")),
)
"""The short matrix: workloads with patterns of families."""
SOURCES = ("gradmaker", "curvature", "representations", "solvers")


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


def time_of(row: Row, workload: str, windows: int, limit: float) -> dict[str, Any]:
    """Ratios of every kind of step of a row."""
    steps = {kind: row.make(build(workload), kind, RATE) for kind in row.kinds}
    found = measure(steps, sgd(build(workload), "", RATE), windows, limit)
    return {kind: ratio.as_dict() for kind, ratio in found.items()}


def cell(row: Row, workload: str, windows: int, limit: float) -> dict[str, Any]:
    """What is measured of a row on a workload; an error in its place says why there is nothing."""
    start = perf_counter()
    try:
        torch.manual_seed(0)
        found: dict[str, Any] = {"time": time_of(row, workload, windows, limit)}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return found | {"seconds": round(perf_counter() - start, 1)}


def selected(rows: Iterable[str], workloads: Iterable[str], only: str, quick: bool) -> Iterator[tuple[str, Row]]:
    """Workloads and rows of a run, by names or patterns."""
    plan = QUICK if quick else tuple((name, ("*",)) for name in WORKLOADS)
    for workload, families in plan:
        if workloads and not any(fnmatch.fnmatch(workload, rule) for rule in workloads):
            continue
        for row in (*OWN, *PEERS):
            named = not rows or any(fnmatch.fnmatch(name, rule) for rule in rows for name in (row.name, row.family))
            ours = (row.library == "gradmaker") == (only == "ours") or only == "all"
            if named and ours and any(fnmatch.fnmatch(row.family, rule) for rule in families):
                yield workload, row


def main(
    rows: Annotated[list[str] | None, typer.Option(help="Rows or families, or patterns of them; default: all.")] = None,
    workloads: Annotated[list[str] | None, typer.Option(help="Workloads, or patterns of them; default: all.")] = None,
    only: Annotated[Literal["all", "ours", "peers"], typer.Option(help="Whose rows.")] = "all",
    quick: Annotated[bool, typer.Option(help="The short matrix.")] = False,
    windows: Annotated[int, typer.Option(help="Windows of each kind of step.")] = 10,
    limit: Annotated[float, typer.Option(help="Seconds of a cell after which three windows suffice.")] = 20.0,
    time_limit: Annotated[float, typer.Option(help="Minutes after which no further cell is begun.")] = 180.0,
    out: Annotated[Path, typer.Option(help="Markdown file; a JSON file is written beside it.")] = PAGE,
) -> None:
    """Measure what is asked for and is not known, and write the page."""
    torch.set_num_threads(1)
    start, own = perf_counter(), sources()
    known: dict[str, Any] = json.loads(out.with_suffix(".json").read_text()) if out.with_suffix(".json").exists() else {}
    for workload, row in selected(rows or (), workloads or (), only, quick):
        key = f"{workload}/{row.name}"
        version = version_of(row, own)
        if known.get(key, {}).get("version") == version:
            continue
        if perf_counter() - start > 60 * time_limit:
            break
        known[key] = {"version": version, **cell(row, workload, windows, limit)}
        print(f"{key:28}", line(known[key]), flush=True)
        out.with_suffix(".json").write_text(json.dumps(known, indent=1) + "\n")


def line(found: dict[str, Any]) -> str:
    """A cell as one line of text."""
    if "error" in found:
        return str(found["error"])
    ratios = "  ".join(f"{kind} {r['ratio']:6.2f} (+-{100 * r['spread']:2.0f}%)" for kind, r in found["time"].items())
    return f"{ratios}  [{found['seconds']:.0f} s]"


if __name__ == "__main__":
    typer.run(main)
