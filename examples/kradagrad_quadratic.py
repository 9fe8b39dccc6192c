"""KrADagrad's ill-conditioned quadratic: SGD, Adam, Shampoo and KrADagrad, in float32 and float64, published and tuned rates.

    python examples/kradagrad_quadratic.py                      into runs/quadratic; resumes what is there
    python examples/kradagrad_quadratic.py --publish docs       and put tables, picture and numbers into the documentation

``f(X) = sum X o (H_0 X H_1)``, ``H_i = Q_i diag(10^(1 - r^2)) Q_i^T``, ``r`` evenly from 0 to ``sqrt(log10 condition)``: the
experiment of Mei, Moreno & Walters 2023 (arXiv:2305.19416). ``f`` and its gradient are computed in float64 and rounded to
float32, in which ``X`` is held.
"""

from __future__ import annotations

import json
import math
import os
import runpy
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from gradmaker import from_config
from gradmaker.compare.cost import machine

CONDITIONS, MOVES = (1e4, 1e6, 1e8), (1, 2, 3, 4, 5)
GRID = range(-16, -3, 2)  # see `rate`: 1e-4 to 1e-1 in half decades
WIDEST = range(-24, 13, 2)  # how far it is extended while the best rate stands at its edge
Trial = dict[str, Any]
"""``f`` at `points` and at the end (None: diverged), conditions of the statistics (None: singular), seconds, inactive."""


# ------------------------------------------------------------------ the problem
class Quadratic(nn.Module):
    """The loss, of its one parameter; ``moved`` draws a relative change of the start of 1e-6."""

    H0: Tensor
    H1: Tensor

    def __init__(self, size: int, condition: float, seed: int = 0, moved: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4750 + seed)
        e = 10.0 ** (1 - torch.linspace(0, math.log10(condition) ** 0.5, size, dtype=torch.float64).square())
        for k in range(2):
            Q, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
            self.register_buffer(f"H{k}", (Q * e) @ Q.T)
        X = torch.randn(size, size, generator=torch.Generator().manual_seed(95054 + seed))
        if moved:
            X *= 1 + 1e-6 * torch.randn(size, size, generator=torch.Generator().manual_seed(moved))
        self.X = nn.Parameter(X)

    def forward(self) -> Tensor:
        X = self.X.double()
        return (X * (self.H0 @ X @ self.H1)).sum()


class PublishedMomentum(torch.optim.Optimizer):
    """The authors' momentum: ``M <- mu (mu M + U) + U``, ``X <- X - lr M``; ``X - 2 mu lr U`` in the first ``plain`` steps."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, mu: float = 0.9, plain: int = 2) -> None:
        super().__init__(params, {"lr": lr, "mu": mu, "plain": plain})
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            lr, mu = group["lr"], group["mu"]
            for p in group["params"]:
                M = self.state[p].setdefault("momentum", torch.zeros_like(p))
                M.mul_(mu).add_(p.grad)
                if self.steps >= group["plain"]:
                    M.mul_(mu).add_(p.grad)
                p.sub_(M if self.steps >= group["plain"] else 2 * mu * p.grad, alpha=lr)
        self.steps += 1


# ------------------------------------------------------------------ the methods
@dataclass(frozen=True)
class Row:
    """A method: the config of its maker (None: plain gradients), what steps, and at which rate it was published.

    ``reference`` is f after 250 steps at N = 128, seed 0, of code that shares nothing with this one, by condition; ``rounding``
    says that it is decided by rounding errors; ``tuned`` whether the row takes part in the tuning.
    """

    maker: dict[str, Any] | None
    optimizer: str
    lr: float
    reference: tuple[float | None, ...] = (None, None, None)
    rounding: bool = False
    tuned: bool = True


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "published": PublishedMomentum,
    "published, no plain steps": partial(PublishedMomentum, plain=0),
}
# Roots at steps 2, 5, 8, ...; plain gradients before; sums; the length of the gradient, which the authors' code always gives.
COMMON = {"decay": None, "grafting": "keep", "preconditioner_interval": 3, "warmup_steps": 3, "start_step": 2}
UNGRAFTED = {"grafting": "none", "start_step": 0}
ABSOLUTE = {
    "method": "custom",
    "curvature": "BatchGradient",
    "representation": "KronDims",
    "solver": {"Eigh": {"power": -0.5, "damping": 1e-8, "split": "each"}},
    **COMMON,
}
STAR = {"method": "kradagrad_star", **COMMON}
ARRAY = {"InverseDims": {"denominator": "exact", "ridge": 1e-8, "relative": False}}
KRAD = {"method": "kradagrad", "damping": 1e-8, "compat": "kradagrad", "start_step": 3}
ROWS: dict[str, Row] = {
    "SGD": Row(None, "sgd", 1e-3, (1.35e3, 898, 681)),
    "Adam": Row(None, "adam", 1.0, (18.8, 14.5, 10.6)),
    "Nesterov-SGD": Row(None, "nesterov", 5e-3, (24.4, None, None)),
    "Shampoo, float64": Row({**ABSOLUTE, "dtype": "float64"}, "published", 5e-3, (0.722, 1.08, 0.758)),
    "Shampoo, absolute 1e-8": Row(ABSOLUTE, "published", 5e-3, (5.88, 26.9, 12.3), rounding=True),
    "Shampoo, relative 1e-6": Row({"method": "shampoo", **COMMON}, "published", 5e-3, (2.07, None, None)),
    "Shampoo, square roots": Row(
        {"method": "shampoo", "root": "svd", "damping": 1e-10, **COMMON}, "published", 5e-3, (0.722, None, None)
    ),
    "KrADagrad*": Row({**STAR, "damping": 1e-8, "compat": "kradagrad"}, "published", 5e-3, (24.4, 18.4, 13.4)),
    "KrADagrad": Row(KRAD, "published, no plain steps", 1e-2, (36.0, 26.6, 20.1)),
    "KrADagrad*, array, 1e-10": Row({**STAR, "damping": 1e-10}, "published", 5e-3, (0.722, 1.08, 0.758)),
    "KrADagrad*, array, 1e-6": Row({**STAR, "damping": 1e-6}, "published", 5e-3),
    "KrADagrad*, array, absolute 1e-8": Row(
        {**ABSOLUTE, "representation": ARRAY, "solver": "PositiveRoot"}, "published", 5e-3, (0.542, None, None), True, False
    ),
    "Shampoo, float64, own length": Row({**ABSOLUTE, "dtype": "float64", **UNGRAFTED}, "published, no plain steps", 10.0),
    "KrADagrad*, array, own length": Row({**STAR, "damping": 1e-10, **UNGRAFTED}, "published, no plain steps", 10.0),
}
STARTS = {
    "as published": {},
    "torch's momentum": {"optimizer": "nesterov"},
    "torch's momentum, no plain steps": {"optimizer": "nesterov", "start_step": 0},
}
STARTED = ("Shampoo, float64", "Shampoo, square roots", "KrADagrad*", "KrADagrad*, array, 1e-10")


# ------------------------------------------------------------------ one trial
def session(row: Row, model: Quadratic, lr: float, start: dict[str, Any]) -> tuple[Callable[[], float], Any]:
    """What makes a step and returns f before it, and the maker."""
    maker = None if row.maker is None else from_config(model, {**row.maker, **{k: v for k, v in start.items() if k in COMMON}})
    optimizer = OPTIMIZERS[start.get("optimizer", row.optimizer)](model.parameters(), lr=lr)

    def step() -> float:
        optimizer.zero_grad()
        f = model()
        f.backward()
        if maker is not None:
            maker.precondition()
        optimizer.step()
        return float(f.detach())

    return step, maker


def conditions(maker: Any) -> list[float | None]:
    """Of every factor's statistic, or inverse, as it is held; None where rounding has left an eigenvalue of zero or below."""
    block = maker.plan.blocks[0]
    representation, state = block.triple.representation, {k: v.double() for k, v in block.state.items()}
    if hasattr(representation, "square_roots"):
        spectra = [torch.linalg.svdvals(R).square() for R in representation.factor_roots(state)]
    elif hasattr(representation, "factors"):
        spectra = [torch.linalg.eigvalsh(H) for H in representation.factors(state)]
    else:
        spectra = [s for s, _ in representation.spectra(state)]
    return [float(f"{float(s.max() / s.min()):.3g}") if s.min() > 0 else None for s in spectra]


def points(iterations: int) -> list[int]:
    """Iterations of which the curve is kept."""
    return [i for i in range(iterations) if i < 10 or i % 10 == 0 or i == iterations - 1]


def trial(row: Row, model: Quadratic, lr: float, iterations: int, start: dict[str, Any]) -> Trial:
    """One run; it diverged where ``f`` is not finite, or 1e8 times its first value, and ends there."""
    begun, values = time.process_time(), list[float]()
    step, maker = session(row, model, lr, start)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        while len(values) < iterations and (not values or values[-1] < 1e8 * values[0]):
            values.append(step())
    whole = len(values) == iterations and math.isfinite(values[-1])
    return {
        "curve": [float(f"{values[i]:.4g}") for i in points(iterations)] if whole else [],
        "end": values[-1] if whole else None,
        "conditions": conditions(maker) if whole and maker is not None else [],
        "inactive": any("inactive" in str(w.message) for w in caught),
        "seconds": round(time.process_time() - begun, 3),
    }


class Runs:
    """The trials of a folder: each is run once, and the file is replaced after it."""

    def __init__(self, out: Path, size: int, iterations: int) -> None:
        self.path, self.size, self.iterations = out / "results.json", size, iterations
        setting = {"size": size, "iterations": iterations}
        self.content: dict[str, Any] = {"setting": setting, "trials": {}, "times": {}}
        if self.path.exists():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))
        if self.content["setting"] != setting:
            raise typer.BadParameter(f"{self.path} holds trials of {self.content['setting']}: choose another --out")
        out.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, condition: float, seed: int, lr: float, moved: int = 0, start: str = "as published") -> Trial:
        key = trial_key(name, condition, seed, lr, moved, start)
        if key not in self.content["trials"]:
            model = Quadratic(self.size, condition, seed, moved)
            self.content["trials"][key] = found = trial(ROWS[name], model, lr, self.iterations, STARTS[start])
            self.write()
            print(f"{key}: {found['end']}", flush=True)
        found = self.content["trials"][key]
        return found

    def write(self) -> None:
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps(self.content, allow_nan=False), encoding="utf-8")
        os.replace(fresh, self.path)


def trial_key(name: str, condition: float, seed: int, lr: float, moved: int = 0, start: str = "as published") -> str:
    return f"{name} | {condition:.0e} | seed {seed} | rate {lr:g} | moved {moved} | {start}"


# ------------------------------------------------------------------ published, tuned, time
def published(runs: Runs, conditions: Sequence[float]) -> list[dict[str, Any]]:
    """Every row at its published rate: the end, the reference, and the ends from starts that are moved by 1e-6."""
    out, known = [], (runs.size, runs.iterations) == (128, 250)
    for name, row in ROWS.items():
        for condition, reference in zip(CONDITIONS, row.reference, strict=True):
            if any(row.reference) and condition in conditions:
                moved = [runs.get(name, condition, 0, row.lr, move)["end"] for move in MOVES] if row.maker else []
                end = runs.get(name, condition, 0, row.lr)["end"]
                found = {"method": name, "rate": row.lr, "condition": condition, "end": end}
                found |= {"reference": reference if known else None, "moved": moved, "rounding": row.rounding}
                out.append(found)
    return out


def rate(k: int) -> float:
    """Quarters of a decade: 1e-4, 1.7e-4, 3e-4, 5.5e-4, 1e-3, ..."""
    return float(f"{('1', '1.7', '3', '5.5')[k % 4]}e{k // 4}")


def tune(runs: Runs, name: str, condition: float, seeds: Sequence[int], start: str = "as published") -> dict[str, Any]:
    """The rate with the lowest mean of f at the end.

    Over a grid of half decades, which grows while the best stands at its edge; then halfway to both neighbours.
    """
    found: dict[int, float] = {}

    def best(ks: Iterable[int]) -> int:
        for k in set(ks) - set(found):
            ends = [runs.get(name, condition, seed, rate(k), start=start)["end"] for seed in seeds]
            found[k] = math.inf if None in ends else mean(ends)
        return min(ks, key=lambda k: found[k])

    ks = list(GRID)
    while wider := [k for k in (ks[0] - 2, ks[-1] + 2) if abs(k - best(ks)) == 2 and k in WIDEST]:
        ks = sorted({*ks, *wider})
    edge, chosen = best(ks) in (ks[0], ks[-1]), rate(best([best(ks) - 1, best(ks), best(ks) + 1]))
    trials = [trial_key(name, condition, seed, chosen, start=start) for seed in seeds]
    about = {"method": name, "condition": condition, "start": start, "rate": chosen, "trials": trials}
    return {**about, "edge": edge, "grid": [rate(ks[0]), rate(ks[-1])]}


def step_times(size: int, block: int, rounds: int) -> dict[str, float]:
    """Milliseconds of CPU time of a whole step: medians of blocks that alternate between the rows."""
    rows = {name: row for name, row in ROWS.items() if row.tuned and "own length" not in name}
    steps = {name: session(row, Quadratic(size, 1e6), min(row.lr, 1e-3), {})[0] for name, row in rows.items()}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):  # the first is a warm-up
        for name, step in steps.items():
            begun = time.process_time()
            for _ in range(block):
                step()
            taken[name].append(1e3 * (time.process_time() - begun) / block)
    return {name: round(median(values[1:]), 3) for name, values in taken.items()}


def main(
    out: Annotated[Path, typer.Option(help="Folder of results; finished trials are not repeated.")] = Path("runs/quadratic"),
    publish: Annotated[Path | None, typer.Option(help="Documentation folder.")] = None,
    size: Annotated[int, typer.Option(help="N, the sides of X.")] = 128,
    iterations: Annotated[int, typer.Option(help="Steps of a trial.")] = 250,
    seeds: Annotated[int, typer.Option(help="Seeds of the tuned rows.")] = 3,
    condition: Annotated[list[float] | None, typer.Option(help="Of each factor; default: 1e4, 1e6, 1e8.")] = None,
    timed: Annotated[list[int] | None, typer.Option(help="N of the time of a step; default: 128, 512.")] = None,
) -> None:
    """Run what is missing, then write the summary and, if asked, the documentation."""
    torch.set_num_threads(1)
    runs, conditions = Runs(out, size, iterations), condition or list(CONDITIONS)
    content = runs.content
    content["published"] = published(runs, conditions)
    content["tuned"] = [tune(runs, n, c, range(seeds)) for c in conditions for n, row in ROWS.items() if row.tuned]
    content["starts"] = [tune(runs, name, conditions[0], range(seeds), start) for name in STARTED for start in STARTS]
    for n in timed or [128, 512]:
        content["times"][str(n)] = content["times"].get(str(n)) or step_times(n, 30 if n <= 128 else 6, 5)
    content["machine"] = {**content.get("machine", machine("cpu"))}
    runs.write()
    if publish is not None:
        (publish / "data").mkdir(parents=True, exist_ok=True)
        (publish / "data" / "quadratic.json").write_text(json.dumps(pruned(content), allow_nan=False) + "\n", encoding="utf-8")
        page = Path(__file__).resolve().parents[1] / "docs" / "make_quadratic.py"
        runpy.run_path(str(page))["write"](publish)


def pruned(content: dict[str, Any]) -> dict[str, Any]:
    """Curves of the chosen rates alone."""
    chosen = {key for row in content["tuned"] for key in row["trials"]}
    kept = {key: found if key in chosen else {**found, "curve": []} for key, found in content["trials"].items()}
    return {**content, "trials": kept}


if __name__ == "__main__":
    typer.run(main)
