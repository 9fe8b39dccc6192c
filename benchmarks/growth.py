"""Growth of time and memory of a step with width, depth and batch, and its exponents beside the theoretical ones.

    python benchmarks/growth.py [ROW ...] --out benchmarks/growth.md

A multi-layer perceptron of equal layers. CPU milliseconds of one thread of a plain step (neither measured nor refreshed) and of
one that does both, and the peak of live tensors. An exponent is the slope of the last three points in logarithms; a row stops
growing at a step that takes longer than `--longest`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import log
from pathlib import Path
from statistics import median
from time import process_time
from typing import Annotated, Any

import torch
import typer
from own_rows import OWN, RATE, Make, sgd
from torch import Tensor, nn
from workloads import Case

from gradmaker.compare.cost import cpu_peak, machine

PAGE = Path(__file__).resolve().parent / "growth.md"
ROWS = ("SGD", "adam", "kfac", "shampoo", "soap", "psgd_whiten")
AXES: dict[str, tuple[int, ...]] = {
    "width": (128, 256, 512, 1024, 2048, 4096),
    "depth": (2, 4, 8, 16, 32, 64),
    "batch": (32, 64, 128, 256, 512, 1024, 2048),
}
FIXED = {"width": 256, "depth": 2, "batch": 128}
THEORY = {
    "width": "passes 2; plain 2 by rows, 3 formed; T=1 3; memory 2",
    "depth": "passes, plain, T=1 and memory 1",
    "batch": "passes 1; plain by rows 1, formed 0 beside the passes; T=1 0 to 1; memory 0 to 1",
}
MEASURES = ("plain", "T1", "memory")
STEPS = 5
Found = dict[str, Any]


def case_of(width: int, depth: int, batch: int) -> Case:
    """A perceptron of equal layers, and a batch."""
    torch.manual_seed(0)
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())]
    x: Tensor = torch.randn(batch, width)
    return Case(nn.Sequential(*layers), x, torch.randint(width, (batch,)))


def seconds(step: Callable[[], None], longest: float) -> float:
    """CPU seconds of a step: the median of some, or one long one. The first one is not timed."""
    step()
    found: list[float] = []
    while len(found) < STEPS and sum(found) < longest:
        start = process_time()
        step()
        found.append(process_time() - start)
    return median(found)


def point(make: Make, kinds: tuple[str, ...], case: Callable[[], Case], longest: float) -> Found:
    """A row at one size."""
    found: Found = {kind: 1e3 * seconds(make(case(), kind, RATE), longest) for kind in ("plain", "T1") if kind in kinds}

    def work() -> None:
        step = make(case(), "T1", RATE)
        for _ in range(2):
            step()

    return found | {"memory": cpu_peak(work) / 2**20}


def grow(make: Make, kinds: tuple[str, ...], axis: str, sizes: tuple[int, ...], longest: float) -> Found:
    """A row along an axis, by size, as far as its steps are not too long."""
    found: Found = {}
    for size in sizes:
        found[str(size)] = point(make, kinds, partial(case_of, **{**FIXED, axis: size}), longest)
        if found[str(size)]["T1"] > 1e3 * longest:
            break
    return found


def exponent(found: Mapping[str, Mapping[str, float]], measure: str) -> float | None:
    """The slope of the last three points in logarithms, by least squares."""
    points = [(log(int(size)), log(values[measure])) for size, values in found.items() if measure in values][-3:]
    if len(points) < 2:
        return None
    x, y = (torch.tensor(values, dtype=torch.float64) for values in zip(*points, strict=True))
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


# ------------------------------------------------------------------ page
def render(known: Mapping[str, Any], picture: str) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in known["machine"].items())
    lines = ["# Growth of a step", "", *(__doc__ or "").strip().splitlines()[4:], "", f"On {facts}.", ""]
    lines += [f"![Time of a step against width, depth and batch]({picture})"]
    for axis, rows in known["axes"].items():
        rest = ", ".join(f"{name} {size}" for name, size in FIXED.items() if name != axis)
        lines += ["", f"## {axis}", "", f"With {rest}. Theoretical exponents: {THEORY[axis]}.", "", *table(rows)]
    return "\n".join(lines) + "\n"


def table(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterator[str]:
    sizes = max((list(found) for found in rows.values()), key=len)
    yield f"| row | {' | '.join(sizes)} | exponent |"
    yield "|---" * (len(sizes) + 2) + "|"
    for name, found in rows.items():
        for measure in MEASURES:
            if not any(measure in values for values in found.values()):
                continue
            unit = "MiB" if measure == "memory" else "ms"
            cells = [f"{found[size][measure]:.4g}" if size in found else "not run" for size in sizes]
            slope = exponent(found, measure)
            yield f"| {name}, {measure}, {unit} | {' | '.join(cells)} | {'-' if slope is None else f'{slope:.2f}'} |"


def plot(known: Mapping[str, Any], path: Path) -> None:
    """Time of steps that do all, an axis a panel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "growth"
    figure, panels = plt.subplots(1, len(known["axes"]), figsize=(9, 3), sharey=True, squeeze=False)
    for panel, (axis, rows) in zip(panels[0], known["axes"].items(), strict=True):
        for name, found in rows.items():
            sizes = [int(size) for size in found]
            panel.loglog(sizes, [values["T1"] for values in found.values()], marker=".", label=name)
        sizes = sorted({int(size) for found in rows.values() for size in found})
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.minorticks_off()
        panel.set_xlabel(axis)
    panels[0][0].set_ylabel("ms, all at every step")
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(
    rows: Annotated[list[str] | None, typer.Argument(help="Rows of this library, and SGD; default: some.")] = None,
    largest: Annotated[int, typer.Option(help="No larger sizes than this.")] = 4096,
    longest: Annotated[float, typer.Option(help="Seconds of a step after which a row stops growing.")] = 5.0,
    out: Annotated[Path, typer.Option(help="Markdown file; JSON and SVG files are written beside it.")] = PAGE,
) -> None:
    """Measure the growth of rows and write the page."""
    torch.set_num_threads(1)
    makes: dict[str, tuple[Make, tuple[str, ...]]] = {"SGD": (sgd, ("T1",))} | {r.name: (r.make, r.kinds) for r in OWN}
    if unknown := [name for name in rows or () if name not in makes]:
        raise typer.BadParameter(f"{unknown[0]!r}: expected one of {', '.join(makes)}")
    known: Found = {"machine": machine("cpu"), "axes": {axis: {} for axis in AXES}}
    for axis, sizes in AXES.items():
        for name in rows or ROWS:
            found = grow(*makes[name], axis, tuple(size for size in sizes if size <= largest), longest)
            known["axes"][axis][name] = found
            print(axis, name, {measure: exponent(found, measure) for measure in MEASURES}, flush=True)
            out.with_suffix(".json").write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    plot(known, out.with_suffix(".svg"))
    out.write_text(render(known, out.with_suffix(".svg").name), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
