"""The page and the picture, from the file of results alone."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from statistics import mean, stdev
from textwrap import fill
from typing import Any

import torch

import gradmaker
from char_gpt.rows import KFAC, ROWS
from gradmaker.compare.cost import machine as facts

__all__ = ["differences", "machine", "markdown", "write_report"]

PAGE = Path(__file__).with_name("page.md")
PAIRS = (
    ("muon", "torch_muon"),
    ("soap", "torch_muon"),
    *((row, "adamw") for row in ("torch_muon", "muon", "soap", "shampoo", "kfac")),
)
Records = list[dict[str, Any]]


def machine(device: str) -> dict[str, Any]:
    """What ran the trainings, and the versions."""
    return {**facts(device), "machine": platform.machine(), "gradmaker": gradmaker.__version__}


def final(trainings: Records, row: str) -> Records:
    """Of the chosen learning rate, by seed."""
    chosen = [r for r in trainings if (r["row"], r["phase"], r["status"]) == (row, "final", "finished")]
    return sorted(chosen, key=lambda r: int(r["seed"]))


def search(trainings: Records, row: str) -> Records:
    """By learning rate."""
    return sorted((r for r in trainings if (r["row"], r["phase"]) == (row, "search")), key=lambda r: float(r["lr"]))


def curve(records: Records) -> torch.Tensor:
    """Steps, mean seconds, mean and standard deviation of the validation loss, over seeds.  # (4, evaluations)"""
    steps, seconds, losses = torch.tensor([r["curve"] for r in records], dtype=torch.float64).permute(2, 0, 1)
    return torch.stack([steps[0], seconds.mean(0), losses.mean(0), losses.std(0)])


# ------------------------------------------------------------------ page
def table(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}"


def results(trainings: Records, steps: int) -> str:
    goal = curve(final(trainings, "adamw"))[2, -1]
    base = mean(r["seconds"] for r in final(trainings, "adamw")) / steps
    rows = []
    for row, (label, *_) in ROWS.items():
        records = final(trainings, row)
        cost, points = mean(r["seconds"] for r in records) / steps, curve(records)
        reached = (points[2] <= goal).nonzero().flatten()
        when = [f"{points[0, reached[0]]:.0f}", f"{points[1, reached[0]]:.0f} s"] if len(reached) else ["-", "-"]
        losses = [spread([r[part] for r in records]) for part in ("validation", "test")]
        rows.append([label, f"{records[0]['lr']:g}", *losses, *when, f"{1e3 * cost:.0f} ms ({cost / base:.2f})"])
    head = ["method", "lr", "validation loss", "test loss", "steps to AdamW's end", "time to it", "time of a step (to AdamW's)"]
    return table(head, rows)


def differences(trainings: Records, first: str, second: str) -> list[float]:
    """Of the test losses, by common seed."""
    a, b = ({r["seed"]: r["test"] for r in final(trainings, row)} for row in (first, second))
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def gaps(trainings: Records) -> str:
    rows = []
    for first, second in PAIRS:
        found = differences(trainings, first, second)
        lower = sum(gap < 0 for gap in found)
        reading = {0: "higher", len(found): "lower"}.get(lower, "both signs")
        names = f"{ROWS[first].label} - {ROWS[second].label}"
        rows.append([names, ", ".join(f"{gap:+.3f}" for gap in found), f"{mean(found):+.3f} ± {stdev(found):.3f}", reading])
    return table(["difference of test losses", "by seed", "mean", "reading"], rows)


def loss(record: dict[str, Any]) -> str:
    return f"{record['validation']:.3f}" if record["status"] == "finished" else "diverged"


def searches(trainings: Records) -> str:
    rows = []
    for row, (label, _, grid) in ROWS.items():
        tried = search(trainings, row)
        best = min((r for r in tried if r["status"] == "finished"), key=lambda r: float(r["validation"]))
        cells = [f"{r['lr']:g}: {loss(r)}" if r is not best else f"{r['lr']:g}: **{loss(r)}**" for r in tried]
        more = f" ({len(tried) - len(grid)} beyond the grid)" if len(tried) > len(grid) else ""
        rows.append([label, f"{len(tried)}{more}", ", ".join(cells)])
    return table(["method", "trials", "lr: validation loss"], rows, left=3)


def markdown(content: dict[str, Any], picture: str, numbers: str) -> str:
    """The page: `page.md`, filled in, with links to the picture and to the file of results."""
    trainings, s = content["trainings"], content["setting"]
    page = PAGE.read_text(encoding="utf-8").format(
        s=s,
        text=content["text"],
        picture=picture,
        numbers=numbers,
        results=results(trainings, s["steps"]),
        clock="wall-clock time" if "device" in content["machine"] else "processor time of the process",
        gaps=gaps(trainings),
        searches=searches(trainings),
        soap=", ".join(f"{r['test']:.3f}" for r in final(trainings, "soap")),
        kfac=KFAC,
        diverged=sum(r["status"] != "finished" for r in trainings),
        trainings=len(trainings),
        machine="; ".join(f"{key} {value}" for key, value in content["machine"].items()),
        commits=", ".join(sorted({r["commit"] for r in trainings if r["commit"]})) or "unknown",
    )
    return "\n\n".join(wrapped(block) for block in page.strip().split("\n\n")) + "\n"


def wrapped(block: str) -> str:
    """A paragraph or a list with lines of the same length; tables, headings, commands and pictures as they are."""
    if block.startswith(("|", "#", "!", "```")):
        return block
    lines = (" ".join(item.split()) for item in re.split(r"\n(?=- )", block))
    return "\n".join(fill(x, 124, subsequent_indent="  " * x.startswith("- "), break_on_hyphens=False) for x in lines)


def write_report(out: Path) -> None:
    """``report.md`` and ``overview.png`` of the results in a folder."""
    content = json.loads((out / "results.json").read_text(encoding="utf-8"))
    (out / "report.md").write_text(markdown(content, "overview.png", "results.json"), encoding="utf-8")
    draw(content["trainings"], out / "overview.png")


# ------------------------------------------------------------------ picture
def draw(trainings: Records, file: Path) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from gradmaker.reporting.palette import GREY, LIGHT, STYLE

    torchs = {"adamw": {"color": GREY, "linestyle": "--"}, "torch_muon": {"color": "black", "linestyle": "--"}}
    looks = torchs | {row: {"color": c} for row, c in zip([row for row in ROWS if row not in torchs], LIGHT, strict=False)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13.2, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 3)
        for row, look in looks.items():
            steps, seconds, centre, width = curve(final(trainings, row))
            for axis, x in zip(axes, (steps, seconds), strict=False):
                axis.plot(x, centre, label=ROWS[row].label, **look)
                axis.fill_between(x, centre - width, centre + width, color=look["color"], alpha=0.15, linewidth=0)
            tried = [(r["lr"], r["validation"]) for r in search(trainings, row) if r["status"] == "finished"]
            axes[2].plot(*zip(*tried, strict=True), marker="o", markersize=4, **look)
        axes[0].set(title="Validation loss over steps", xlabel="step", ylabel="validation loss (nats)")
        axes[1].set(title="Validation loss over seconds", xlabel="seconds of training (one thread)")
        axes[2].set(title="Search, half of the steps", xlabel="learning rate", xscale="log")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(looks))
        figure.savefig(file, dpi=160, metadata={"Software": None})
