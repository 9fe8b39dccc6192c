"""A step taken apart: both passes, application, statistics and refresh, each against its floor.

    python benchmarks/profile_step.py [ROW ...] --workload mlp512

By differences of the kinds of steps of `benchmarks/peers.py`: the passes are a step of SGD; the application is what a plain
step takes more, the statistics what a measuring step takes more than that, the refresh what the step takes that does both. The
floor of a part is its products, convolutions and decompositions alone; the rest is element-wise work, copies, checks, Python.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from own_rows import OWN, RATE, Row, Step, sgd
from workloads import WORKLOADS, build

from gradmaker.compare.cost import machine
from gradmaker.costs.floor import Floor, floor
from gradmaker.costs.timing import measure

PAGE = Path(__file__).resolve().parent / "profile.md"
PARTS = {"passes": ("sgd",), "application": ("plain", "sgd"), "statistics": ("stat", "plain"), "refresh": ("T1", "stat")}
"""The kind of step that has a part, and the one that lacks it."""
SHOWN = 8  # operators of a table
Found = dict[str, Any]


def parts_of(kinds: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The parts of a row; those that its kinds of steps cannot tell apart are one."""
    if "stat" in kinds:
        return PARTS
    if "plain" in kinds:
        return {name: PARTS[name] for name in ("passes", "application")} | {"statistics and refresh": ("T1", "plain")}
    return {"passes": PARTS["passes"], "all that is added": ("T1", "sgd")}


def profile(row: Row, workload: str, windows: int, limit: float) -> Found:
    """Milliseconds, floors and FLOPs of the parts of a step, and the operators that take most of it."""
    kinds = [kind for kind in row.kinds if kind != "T10"]
    reference = sgd(build(workload), "", RATE)
    steps = {kind: row.make(build(workload), kind, RATE) for kind in kinds}
    times = {kind: ratio.ms for kind, ratio in measure({**steps, "sgd": reference}, reference, windows, limit).items()}
    floors = {kind: floor(step) for kind, step in {**steps, "sgd": reference}.items()}
    parts = {name: part(times, floors, *of) for name, of in parts_of(kinds).items()}
    return {"parts": parts, "operators": operators(steps[kinds[-1]])}


def part(times: Mapping[str, float], floors: Mapping[str, Floor], kind: str, without: str = "") -> Found:
    """What one kind of step has more than another."""
    made = {"ms": times[kind], "floor": 1e3 * floors[kind].total, "gflop": sum(floors[kind].flops.values()) / 1e9}
    if without:
        less = part(times, floors, without)
        made = {key: made[key] - less[key] for key in made}
    return {key: round(value, 4) for key, value in made.items()}


def operators(step: Step, steps: int = 3) -> list[Found]:
    """Operators by the CPU time that they take themselves, of one step."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it prints its start and its stop
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    found = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return [
        {"name": e.key, "calls": round(e.count / steps, 1), "ms": round(e.self_cpu_time_total / 1e3 / steps, 4)}
        for e in found[:SHOWN]
    ]


def render(known: Mapping[str, Any]) -> str:
    """The page."""
    facts = ", ".join(f"{key} {value}" for key, value in known["machine"].items())
    lines = ["# A step taken apart", "", *(__doc__ or "").strip().splitlines()[4:], "", f"On {facts}."]
    for name, found in known["rows"].items():
        row, workload = name.split(" on ")
        lines += ["", f"## {row}, {WORKLOADS[workload][0]}", ""]
        lines += ["| part | ms | floor, ms | over it | rest, ms | GFLOP |", "|---|---|---|---|---|---|"]
        for what, p in found["parts"].items():
            over = f"{p['ms'] / p['floor']:.2f}" if p["floor"] > 0.01 else "-"
            lines.append(
                f"| {what} | {p['ms']:.2f} | {p['floor']:.2f} | {over} | {p['ms'] - p['floor']:.2f} | {p['gflop']:.2f} |"
            )
        shown = ", ".join(f"{o['name'].removeprefix('aten::')} {o['ms']:.2f} ms in {o['calls']:g}" for o in found["operators"])
        lines += ["", f"Operators of a step that does all: {shown}."]
    return "\n".join(lines) + "\n"


def main(
    rows: Annotated[list[str] | None, typer.Argument(help="Rows of this library; default: all.")] = None,
    workload: Annotated[str, typer.Option(help="Name of a workload.")] = "mlp512",
    windows: Annotated[int, typer.Option(help="Windows of each kind of step.")] = 7,
    limit: Annotated[float, typer.Option(help="Seconds of a row after which three windows suffice.")] = 8.0,
    out: Annotated[Path, typer.Option(help="Markdown file; a JSON file is written beside it.")] = PAGE,
) -> None:
    """Profile rows and write the page; rows that are not named keep what the JSON file has."""
    torch.set_num_threads(1)
    path = out.with_suffix(".json")
    known: Found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}}
    known["machine"] = machine("cpu")
    by_name = {row.name: row for row in OWN}
    if unknown := [name for name in rows or () if name not in by_name]:
        raise typer.BadParameter(f"{unknown[0]!r}: expected one of {', '.join(by_name)}")
    for name in rows or by_name:
        torch.manual_seed(0)
        found = known["rows"][f"{name} on {workload}"] = profile(by_name[name], workload, windows, limit)
        print(name, found["parts"], flush=True)
        path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        out.write_text(render(known), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
