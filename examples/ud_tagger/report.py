"""The page and the picture, from the file of results alone."""

from __future__ import annotations

import platform
import re
from importlib.metadata import version
from itertools import combinations
from math import sqrt
from pathlib import Path
from statistics import mean, median, stdev
from textwrap import fill
from typing import Any

import torch

import gradmaker
from gradmaker.compare.cost import machine as facts

__all__ = ["Pair", "compare", "machine", "markdown", "write_report"]

LABELS = {"adamw": "AdamW", "shampoo": "Shampoo", "caspr": "CASPR"}
LEVEL = 0.05
PAGE = Path(__file__).with_name("page.md")
Records = list[dict[str, Any]]


def machine(device: str) -> dict[str, Any]:
    """What ran the trainings, and the versions."""
    return {**facts(device), "machine": platform.machine(), "gradmaker": gradmaker.__version__, "scipy": version("scipy")}


# ------------------------------------------------------------------ statistics
class Pair:
    """The differences ``a - b`` over common seeds, in percentage points, and Student's paired t-test of their mean."""

    def __init__(self, first: str, second: str, a: list[float], b: list[float]) -> None:
        from scipy import stats

        self.first, self.second = LABELS[first], LABELS[second]
        self.differences = [100 * (x - y) for x, y in zip(a, b, strict=True)]
        n, self.mean, self.std = len(a), mean(self.differences), stdev(self.differences)
        self.half = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * self.std / sqrt(n)  # of the confidence interval
        self.t, self.p = (float(x) for x in stats.ttest_rel(a, b)) if self.std > 1e-9 else (float("nan"), float("nan"))

    def verdict(self, tests: int) -> str:
        """In words; Bonferroni's correction for so many tests."""
        order = "better" if self.mean > 0 else "worse"
        if not self.p < LEVEL:
            return "no difference is shown"
        if self.p * tests < LEVEL:
            return f"{self.first} is {order} than {self.second}"
        return f"{self.first} looks {order}, but not beyond what one of {tests} tests may show by chance"


def final(trainings: Records, method: str) -> Records:
    """Of the chosen configuration, by seed."""
    chosen = [r for r in trainings if (r["method"], r["phase"]) == (method, "final") and r["status"] == "finished"]
    return sorted(chosen, key=lambda r: int(r["number"]))


def search(trainings: Records, method: str) -> Records:
    """By number of the configuration."""
    return sorted((r for r in trainings if (r["method"], r["phase"]) == (method, "search")), key=lambda r: int(r["number"]))


def compare(trainings: Records) -> list[Pair]:
    """Every two methods, on the test part, over the seeds with which both ended."""
    pairs = []
    for second, first in combinations(LABELS, 2):
        a, b = ({r["number"]: r["test"] for r in final(trainings, method)} for method in (first, second))
        common = sorted(a.keys() & b.keys())
        pairs.append(Pair(first, second, [a[k] for k in common], [b[k] for k in common]))
    return pairs


# ------------------------------------------------------------------ page
def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---", *["---:"] * (len(head) - 1)], *rows])


def spread(values: list[float]) -> str:
    return f"{100 * mean(values):.2f} ± {100 * stdev(values):.2f}"


def results(content: dict[str, Any]) -> str:
    trainings, steps, rows = content["trainings"], content["setting"]["steps"], []
    cost = {method: median(r["seconds"] for r in final(trainings, method)) / steps for method in LABELS}
    for method, label in LABELS.items():
        records = final(trainings, method)
        share = f"{1e3 * cost[method]:.0f} ms ({cost[method] / cost['adamw']:.2f})"
        rows.append(
            [label, spread([r["test"] for r in records]), spread([r["dev"] for r in records]), str(len(records)), share]
        )
    return table(["method", "test accuracy, %", "dev accuracy, %", "seeds", "time of a step (to AdamW's)"], rows)


def differences(pairs: list[Pair]) -> str:
    rows = []
    for pair in pairs:
        interval = f"{pair.mean - pair.half:+.2f} to {pair.mean + pair.half:+.2f}"
        what, p = f"{pair.first} - {pair.second}", "< 0.001" if pair.p < 1e-3 else f"{pair.p:.3f}"
        rows.append([what, f"{pair.mean:+.2f} ± {pair.std:.2f}", interval, f"{pair.t:.2f}", p, pair.verdict(len(pairs))])
    return table(["difference", "points", "95 % interval of the mean", "t", "p", "reading"], rows)


def searches(trainings: Records) -> str:
    names = {"lr": "lr", "one_minus_beta1": "1 - b1", "one_minus_beta2": "1 - b2", "weight_decay": "decay", "warmup": "warm-up"}
    tried = {method: search(trainings, method) for method in LABELS}
    best = {method: max(r["dev"] for r in records if r["status"] == "finished") for method, records in tried.items()}
    rows = []
    for k, record in enumerate(tried["adamw"]):
        cells = [f"{record['point'][name]:.2g}" for name in names]
        for method, records in tried.items():
            shown = f"{100 * records[k]['dev']:.2f}" if records[k]["status"] == "finished" else "diverged"
            cells.append(f"**{shown}**" if records[k]["dev"] == best[method] else shown)
        rows.append([str(k), *cells])
    return table(["trial", *names.values(), *LABELS.values()], rows)


def wins(trainings: Records) -> str:
    """Over the shared configurations of the search, with the two-sided sign test."""
    from scipy import stats

    lines = []
    for second, first in combinations(LABELS, 2):
        both = zip(search(trainings, first), search(trainings, second), strict=True)
        gaps = [100 * (a["dev"] - b["dev"]) for a, b in both if a["status"] == b["status"] == "finished"]
        above, unequal = sum(gap > 0 for gap in gaps), sum(gap != 0 for gap in gaps)
        p = float(stats.binomtest(above, unequal).pvalue) if unequal else 1.0
        names, middle = f"{LABELS[first]} is above {LABELS[second]}", f"median {median(gaps):+.2f} points"
        lines.append(f"- {names} in {above} of {len(gaps)} trials, {middle}, p = {p:.2g} by the sign test.")
    return "\n".join(lines)


def axes(s: dict[str, Any], words: int) -> str:
    """What becomes of long axes."""
    if s["block_size"] is not None:
        return f"Tensors are cut into blocks of at most {s['block_size']} a side"
    long = f": here the vocabulary axis of the embedding, {words} x {s['width']}" if words > s["max_dim"] else ""
    return f"Axes longer than {s['max_dim']} have a diagonal factor{long}"


def markdown(content: dict[str, Any], picture: str, numbers: str) -> str:
    """The page: `page.md`, filled in, with links to the picture and to the file of results."""
    trainings, s, bank, pairs = content["trainings"], content["setting"], content["treebank"], compare(content["trainings"])
    words = (f"{p.verdict(len(pairs))} ({p.first} - {p.second}: {p.mean:+.2f} points, p = {p.p:.2g})" for p in pairs)
    ranges = {"lr": s["lr"], "1 - b1": s["one_minus_beta1"], "1 - b2": s["one_minus_beta2"], "decay": s["weight_decay"]}
    page = PAGE.read_text(encoding="utf-8").format(
        s=s,
        bank=bank,
        picture=picture,
        numbers=numbers,
        results=results(content),
        clock="wall-clock time" if "device" in content["machine"] else "processor time",
        differences=differences(pairs),
        words="; ".join(words),
        level=LEVEL,
        tests=len(pairs),
        searches=searches(trainings),
        wins=wins(trainings),
        ranges=", ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in ranges.items()),
        warmup=" or ".join(map(str, s["warmup"])),
        diverged=sum(r["status"] != "finished" for r in trainings),
        trainings=len(trainings),
        schedule=s["schedule"].replace("_", " "),
        axes=axes(s, bank["words"]),
        machine="; ".join(f"{key} {value}" for key, value in content["machine"].items()),
    )
    return "\n\n".join(wrapped(block) for block in page.strip().split("\n\n")) + "\n"


def wrapped(block: str) -> str:
    """A paragraph or a list with lines of the same length; tables, headings and pictures as they are."""
    if block.startswith(("|", "#", "!")):
        return block
    lines = (" ".join(item.split()) for item in re.split(r"\n(?=- )", block))
    return "\n".join(fill(x, 124, subsequent_indent="  " * x.startswith("- "), break_on_hyphens=False) for x in lines)


def write_report(content: dict[str, Any], out: Path) -> None:
    """``report.md`` and ``overview.png``."""
    (out / "report.md").write_text(markdown(content, "overview.png", "results.json"), encoding="utf-8")
    draw(content["trainings"], out / "overview.png")


# ------------------------------------------------------------------ picture
def draw(trainings: Records, file: Path) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from gradmaker.reporting.palette import GREY, LIGHT, STYLE

    colours = dict(zip(LABELS, (GREY, *LIGHT), strict=False))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13.2, 4.3), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 3)
        for method, colour in colours.items():
            _curve(axes[0], final(trainings, method), colour, LABELS[method])
            _trials(axes[1], search(trainings, method), colour)
        _seeds(axes[2], trainings, colours)
        axes[0].set(title="Dev accuracy (mean ± std over seeds)", xlabel="step", ylabel="dev accuracy (%)")
        axes[1].set(title="Search (ring: chosen)", xlabel="learning rate", ylabel="dev accuracy (%)", xscale="log")
        axes[2].set(title="Test accuracy (lines join seeds)", ylabel="test accuracy (%)")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(LABELS))
        figure.savefig(file, dpi=160, metadata={"Software": None})


def _curve(axis: Any, records: Records, colour: str, label: str) -> None:
    steps = [point[0] for point in records[0]["curve"]]
    values = 100 * torch.tensor([[point[1] for point in r["curve"]] for r in records], dtype=torch.float64)
    centre, width = values.mean(0), values.std(0)
    axis.plot(steps, centre, color=colour, label=label, marker="o", markersize=4)
    axis.fill_between(steps, centre - width, centre + width, color=colour, alpha=0.15, linewidth=0)


def _trials(axis: Any, records: Records, colour: str) -> None:
    ended = sorted((r["point"]["lr"], 100 * r["dev"]) for r in records if r["status"] == "finished")
    axis.plot(*zip(*ended, strict=True), color=colour, marker="o", markersize=4, linestyle="none")
    best = max(ended, key=lambda point: point[1])
    axis.plot(*best, marker="o", markersize=10, markerfacecolor="none", markeredgecolor=colour, linestyle="none")


def _seeds(axis: Any, trainings: Records, colours: dict[str, str]) -> None:
    by_seed: dict[int, list[tuple[int, float]]] = {}
    for place, method in enumerate(LABELS):
        values = []
        for record in final(trainings, method):
            values.append(100 * record["test"])
            by_seed.setdefault(record["number"], []).append((place, values[-1]))
        axis.plot([place] * len(values), values, color=colours[method], marker="o", markersize=4, linestyle="none", zorder=3)
        axis.errorbar(place + 0.12, mean(values), stdev(values), color=colours[method], marker="s", capsize=4)
    for points in by_seed.values():
        axis.plot(*zip(*points, strict=True), color="#BBBBBB", linewidth=0.8, zorder=1)
    axis.set_xticks(range(len(LABELS)), list(LABELS.values()))
    axis.set_xlim(-0.4, len(LABELS) - 0.5)
