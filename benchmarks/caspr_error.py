"""How near CASPR, Shampoo and their relatives come to full-matrix AdaGrad, on drawn and on recorded gradients.

    python benchmarks/caspr_error.py                       into runs/caspr_error
    python benchmarks/caspr_error.py --text book.txt       another text for the transformer
    python benchmarks/caspr_error.py --publish docs        put page, picture and numbers into the documentation

For every problem and seed a sequence of gradients of one matrix is fed to each method's representation; its solver gives the
preconditioner ``X``. Full-matrix AdaGrad's, on the same gradients, is ``(A + 1e-6 lambda_max I)^(-1/2)``. Finished cells are
not repeated.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from time import process_time
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from caspr_problems import Recorded, problems

from gradmaker.compare.cost import machine
from gradmaker.curvature import Gradient
from gradmaker.representations import (
    CrossDims,
    Dense,
    Diagonal,
    KronDims,
    KronSum,
    OneSided,
    OneWayDims,
    Representation,
)
from gradmaker.representations.base import Fold, Frame
from gradmaker.representations.roles import OwnOrder
from gradmaker.solvers import AxisMean, Division, Eigh, HeldRoot, PositiveRoot, Solver

RIDGE = 1e-6
SUM, AVERAGE = Fold(1.0, 1.0, 1.0, summed=True), Fold(0.98, 0.02, 0.02)
ROOT = Eigh(power=-0.5, damping=RIDGE, split="each", mode="largest")


class Method(NamedTuple):
    """Parts of a method, and how gradients enter its statistic."""

    representation: Representation
    solver: Solver
    fold: Fold = SUM
    apart: bool = False  # every row of the matrix by itself
    interval: int = 10  # of the refresh of what has one


FULL = Method(Dense(granularity="layer"), Eigh(power=-0.5, damping=RIDGE, split="exact", mode="largest"))
METHODS = {
    "Shampoo 1/4": Method(KronDims(), ROOT),
    "CASPR p=2": Method(KronSum(2), AxisMean(damping=RIDGE)),
    "CASPR p=1": Method(KronSum(1), AxisMean(damping=RIDGE)),
    "Shampoo 1/2": Method(KronDims(exponent=1.0, balanced=True), ROOT),
    "KL-Shampoo": Method(CrossDims(), PositiveRoot(), AVERAGE),
    "CASPR-adaptive": Method(OneWayDims(at_once=False), HeldRoot(), interval=20),
    "one-sided": Method(OneSided(), ROOT),
    "unit-wise": FULL._replace(apart=True),
    "diagonal": Method(Diagonal(), Division(power=-0.5, damping=1e-12)),
}
CHAIN = {
    "Shampoo 1/4": METHODS["Shampoo 1/4"],
    "X(16)": Method(KronSum(16), AxisMean(damping=RIDGE)),
    "X(4)": Method(KronSum(4), AxisMean(damping=RIDGE)),
    "X(2)": METHODS["CASPR p=2"],
    "X(1)": METHODS["CASPR p=1"],
}
METRICS = {"stat": "X^-2 against A", "root": "X^-1 against A^(1/2)", "inv": "X against A^(-1/2)"}
EARLIER = {
    "kron": ".433/.449/.448 .381/.397/.416 .348/.374/.479 .087/.084/.789 .110/.091/.791 .890/.773/.682 .932/.867/.789",
    "lowrank": ".432/.452/.455 .378/.400/.419 .345/.377/.479 .094/.091/.795 .122/.103/.798 .891/.778/.685 .934/.869/.786",
    "sum": ".507/.479/.834 .529/.492/.836 .550/.504/.838 .538/.349/.802 .802/.587/.658 .587/.487/.839 .753/.612/.869",
    "mlp": ".590/.538/.283 .557/.513/.342 .536/.500/.413 .373/.352/.475 .453/.379/.468 .887/.777/.828 .916/.815/.852",
}
"""Of all methods but those that are `NEW`: stat/root/inv."""
NEW = ("CASPR-adaptive", "unit-wise")


# ------------------------------------------------------------------ preconditioners
def preconditioner(method: Method, gradients: list[Tensor]) -> Tensor:
    """``X``, column by column: what the method makes of unit gradients.  # (P, P)"""
    if method.apart:
        rows = zip(*(g.split(1) for g in gradients), strict=True)
        return torch.block_diag(*(preconditioner(method._replace(apart=False), list(own)) for own in rows))
    representation, solver, fold = method[:3]
    shape = tuple(gradients[0].shape)
    state = representation.init(Frame(1, shape, frozenset(), torch.float64, torch.device("cpu")))
    for index, g in enumerate(gradients):
        due, first = index % method.interval == 0, index == 0
        representation.update(state, Gradient(g.unsqueeze(0)), replace(fold, refresh=due, first=first, index=index))
        if due and not isinstance(representation, OwnOrder):
            representation.refresh(state)
    cache = solver.prepare(representation, state, None)
    units = torch.eye(gradients[0].numel(), dtype=torch.float64).reshape(-1, 1, *shape)
    X = torch.stack([solver.solve(representation, cache, e).flatten() for e in units], 1)
    return (X + X.mT) / 2


def power(A: Tensor, exponent: float) -> Tensor:
    s, Q = torch.linalg.eigh(A)
    out: Tensor = Q * s.clamp(min=torch.finfo(s.dtype).tiny) ** exponent @ Q.mT
    return out


def distance(X: Tensor, Y: Tensor) -> float:
    """``min_c |c X - Y| / |Y|``."""
    cosine = (X / X.norm() * (Y / Y.norm())).sum()
    return float((1 - cosine.square()).clamp(min=0).sqrt())


def errors(X: Tensor, target: Tensor) -> dict[str, float]:
    """Of ``X`` to ``target = A^(-1/2)``, after the best scalar."""
    exponents = {"stat": -2.0, "root": -1.0, "inv": 1.0}
    return {name: distance(power(X, e), power(target, e)) for name, e in exponents.items()}


def links(gradients: list[Tensor]) -> dict[str, float]:
    """Least eigenvalue of every link of the Loewner chain, over the norm of its last member; without ``sqrt(r)`` as well."""
    G = torch.stack(gradients)
    r = int(torch.linalg.matrix_rank(G).max())
    rows, columns = (torch.linalg.matrix_norm(torch.einsum(e, G, G), 2) for e in ("tij,tkj->ik", "tij,tik->jk"))
    A = torch.einsum("ti,tj->ij", G.flatten(1), G.flatten(1))
    last = r**0.5 * power(A + r * RIDGE * min(rows, columns) * torch.eye(len(A), dtype=A.dtype), -0.5)
    members = {**{name: preconditioner(method, gradients) for name, method in CHAIN.items()}, "sqrt(r) AdaGrad": last}
    size = float(torch.linalg.matrix_norm(last, 2))
    found = {f"{b} - {a}": _least(members[b] - members[a]) / size for a, b in pairwise(members)}
    return {**found, "AdaGrad - X(1)": _least(last / r**0.5 - members["X(1)"]) / size, "r": r}


def _least(A: Tensor) -> float:
    return float(torch.linalg.eigvalsh((A + A.mT) / 2)[0])


def cell(recorded: Recorded) -> dict[str, Any]:
    """All numbers of one sequence."""
    gradients = recorded.gradients
    flat = [g.reshape(1, -1) for g in gradients]
    target = preconditioner(FULL, flat)
    found = {name: errors(preconditioner(method, gradients), target) for name, method in METHODS.items()}
    return {"shape": list(gradients[0].shape), "losses": recorded.losses, "errors": found, "links": links(gradients)}


# ------------------------------------------------------------------ the page
def spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values) if len(values) > 1 else 0.0:.3f}"


def signed(values: list[float]) -> str:
    return f"{mean(values):+.3f} ± {stdev(values) if len(values) > 1 else 0.0:.3f}"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows), ""]


def lines_of(content: dict[str, Any]) -> list[str]:
    """Tables: errors by metric, the earlier measurement, the chain, the trainings."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for entry in content["cells"]:
        cells.setdefault(entry["problem"], []).append(entry)
    names, out = list(cells), []
    for metric, what in METRICS.items():
        out += [f"### {metric}: `{what}`", ""]
        rows = [[m, *(spread([c["errors"][m][metric] for c in cells[n]]) for n in names)] for m in METHODS]
        out += table(["method", *names], rows)
    out += ["### CASPR p=2 less Shampoo 1/4, paired by seed", ""]
    two, four = "CASPR p=2", "Shampoo 1/4"
    rows = [[k, *(signed([c["errors"][two][k] - c["errors"][four][k] for c in cells[n]]) for n in names)] for k in METRICS]
    out += table(["metric", *names], rows)
    out += ["## Beside an earlier measurement", "", NOTES["earlier"], ""]
    compared = [n for n in names if n in EARLIER]
    known = [m for m in METHODS if m not in NEW]
    rows = [[m, *(f"{triple(cells[n], m)} ({EARLIER[n].split()[k]})" for n in compared)] for k, m in enumerate(known)]
    out += table(["method", *compared], rows)
    out += ["## The Loewner chain", "", NOTES["chain"], ""]
    keys = [k for k in next(iter(cells.values()))[0]["links"] if k != "r"]
    rows = [[f"`{k}`", *(f"{min(c['links'][k] for c in cells[n]):.1e}" for n in names)] for k in keys]
    out += table(["least eigenvalue", *names], [*rows, ["r", *(str(max(c["links"]["r"] for c in cells[n])) for n in names)]])
    trained = [n for n in names if cells[n][0]["losses"]]
    losses = [[n, *(spread([c["losses"][k] for c in cells[n]]) for k in (0, 1))] for n in trained]
    return [*out, "## Trainings", "", *table(["problem", "mean loss of the first tenth", "of the last"], losses)]


def triple(entries: list[dict[str, Any]], method: str) -> str:
    return "/".join(f"{mean(e['errors'][method][metric] for e in entries):.3f}".lstrip("0") for metric in METRICS)


HEAD = """# CASPR and full-matrix AdaGrad

Made by `python benchmarks/caspr_error.py`. `A` is the sum of `g g^T` over a sequence of gradients of one matrix, `X` the
preconditioner that a method makes of the same sequence. CASPR (Duvvuri et al., ICLR 2024) is meant to be nearer to
`A^(-1/2)` than Shampoo is. Errors are Frobenius norms over that of the target, after the best scalar factor; mean ± sample
standard deviation over the seeds.

- `kron`, `lowrank`, `sum`: 12 x 10, drawn as `A Z B`, `A z z'^T B`, `A Z + Z' B`; `A` and `B` are `Q D W`, a rotation, lengths
  from 1 to 10^-1.5, a Gaussian matrix.
- `mlp`: 12 x 10, the first layer of a tanh network on inputs correlated by such a `B`, SGD.
- `digits`: 16 x 10, the hidden layer of 64-10-16-10 on scikit-learn's digits, SGD.
- `query`, `up`: 16 x 16 and 32 x 16, of the second block of a Transformer of width 16 that guesses the next character, Adam.

All methods sum, as full-matrix AdaGrad does, but for KL-Shampoo, in whose sum early gradients would weigh more: it averages
with its default decay 0.98, over about 50 gradients. The ridge is 1e-6 of the largest eigenvalue. CASPR-adaptive renews its
roots every 20 gradients. "unit-wise" is full-matrix AdaGrad of every row by itself, the blocks of `A` of which CASPR's `R` is
the mean.

![errors by problem and method](caspr_error.png)

## Errors
"""
NOTES = {
    "earlier": """Mean stat/root/inv, and in brackets what separate code gave before this library was written, from other seeds.
How `A` and `B` were drawn was found again by trial; the network, the labels and the inputs of `mlp` are new, and KL-Shampoo
was fitted in another way there.""",
    "chain": """Shampoo <= X(16) <= X(4) <= X(2) <= X(1) <= sqrt(r) (A + ..)^(-1/2) in the Loewner order, `r` the largest rank
of a gradient: the least eigenvalue of each difference over the norm of the last member, the lowest of all seeds.
The last line leaves `sqrt(r)` out, where nothing is promised.""",
}


def render(content: dict[str, Any]) -> str:
    """The page."""
    facts = [f"- {key}: {value}" for key, value in {**content["facts"], **content["settings"]}.items()]
    return "\n".join([HEAD, *lines_of(content), "## How", "", *facts, ""])


def draw(content: dict[str, Any], path: Path) -> None:
    """Bars with error bars: a panel for each metric."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(entry["problem"] for entry in content["cells"]))
    figure, panels = pyplot.subplots(3, 1, figsize=(10, 8.5), sharex=True, layout="constrained")
    colours = pyplot.get_cmap("tab10").colors
    for panel, (metric, what) in zip(panels, METRICS.items(), strict=True):
        for k, method in enumerate(METHODS):
            found = [[e["errors"][method][metric] for e in content["cells"] if e["problem"] == n] for n in names]
            places = [j + (k - (len(METHODS) - 1) / 2) * 0.095 for j in range(len(names))]
            bars = [stdev(v) if len(v) > 1 else 0.0 for v in found]
            panel.bar(places, list(map(mean, found)), 0.09, yerr=bars, color=colours[k], label=method, error_kw={"lw": 0.8})
        panel.set_ylabel(f"{metric}: {what}")
        panel.set_ylim(0, 1)
        panel.grid(axis="y", alpha=0.3)
    panels[-1].set_xticks(range(len(names)), names)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# ------------------------------------------------------------------ the run


def measure(path: Path, settings: dict[str, Any], text: Path | None, chosen: list[str]) -> dict[str, Any]:
    """Every cell that the file does not hold yet; it is written after each."""
    content: dict[str, Any] = {"facts": {"seconds": 0, **machine("cpu")}, "settings": settings, "cells": []}
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["settings"] != settings:
            raise typer.BadParameter(f"{path} was made with other settings, {content['settings']}: choose another --out")
    done = {(entry["problem"], entry["seed"]) for entry in content["cells"]}
    makers = {name: make for name, make in problems(text).items() if name in chosen}
    for seed in range(settings["seeds"]):
        for name, make in makers.items():
            if (name, seed) in done:
                continue
            begun = process_time()
            recorded = make(seed, settings["drawn" if name in ("kron", "lowrank", "sum", "mlp") else "recorded"])
            content["cells"].append({"problem": name, "seed": seed, **cell(recorded)})
            content["cells"].sort(key=lambda entry: (list(makers).index(entry["problem"]), entry["seed"]))
            content["facts"]["seconds"] += round(process_time() - begun)
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            print(f"{name} {seed}: {process_time() - begun:.0f} s")
    return content


def main(
    text: Annotated[Path | None, typer.Option(help="Text of the Transformer; default: Python's reference manual.")] = None,
    out: Annotated[Path, typer.Option(help="Output folder; finished cells in it are not repeated.")] = Path("runs/caspr_error"),
    publish_to: Annotated[Path | None, typer.Option("--publish", help="Documentation folder.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of every problem, from 0.")] = 5,
    drawn: Annotated[int, typer.Option(min=1, help="Gradients of a drawn problem.")] = 400,
    recorded: Annotated[int, typer.Option(min=1, help="Steps of a training.")] = 1000,
    only: Annotated[list[str] | None, typer.Option(help="Problems; default: all.")] = None,
) -> None:
    """Measure, report and, if asked, publish."""
    torch.set_num_threads(1)
    names = list(problems(text))
    if unknown := set(only or ()) - set(names):
        raise typer.BadParameter(f"unknown problems {sorted(unknown)}; there are {', '.join(names)}")
    out.mkdir(parents=True, exist_ok=True)
    settings = {"seeds": seeds, "drawn": drawn, "recorded": recorded, "text": text.name if text else "pydoc_data/topics.py"}
    content = measure(out / "caspr_error.json", settings, text, only or names)
    draw(content, out / "caspr_error.png")
    (out / "caspr.md").write_text(render(content), encoding="utf-8")
    if publish_to is not None:
        publish(out, publish_to)


def publish(out: Path, docs: Path) -> None:
    """Copy the page, its picture and the numbers."""
    for name, place in (("caspr_error.png", "images/caspr_error.png"), ("caspr_error.json", "data/caspr_error.json")):
        (docs / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out / name, docs / place)
    page = (out / "caspr.md").read_text(encoding="utf-8").replace("(caspr_error.png)", "(../images/caspr_error.png)")
    (docs / "data" / "caspr.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
