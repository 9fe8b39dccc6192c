"""What the committed measurements say of a method: results of experiments and costs of a step, for the pages made of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DATA, BENCHMARKS = ROOT / "docs" / "data", ROOT / "benchmarks"


class Experiment(NamedTuple):
    """One task, with a result for each row."""

    title: str
    anchor: str  # of its entry in the gallery
    measure: str
    lower: bool  # whether less is better
    values: dict[str, list[float]]  # of each row, one a seed
    times: dict[str, float]  # of a step, over that of the first baseline; empty: equal time
    baselines: tuple[str, ...]
    methods: dict[str, str]  # row -> method


@cache
def load(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and sample standard deviation."""
    return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}"


# ------------------------------------------------------------------ experiments
def comparison(name: str, title: str, anchor: str, baselines: tuple[str, ...]) -> Experiment:
    """A file of `compare`: test accuracies at the selected rate."""
    saved = load(DATA / f"{name}.json")
    rows = saved["report"]["rows"]
    values = {
        row["method"]: [
            100 * trial["test_accuracy"][-1]
            for trial in saved["trials"].values()
            if trial["label"] == row["method"] and trial["learning_rate"] == row["learning_rate"]
        ]
        for row in rows
    }
    times = {row["method"]: row["step_ratio"] / rows[0]["step_ratio"] for row in rows}
    methods = {row["method"]: row["method"] for row in rows if row["method"] not in baselines}
    return Experiment(title, anchor, "test accuracy, %", False, values, times, baselines, methods)


def mnist() -> Experiment:
    """Test accuracy of the MLP."""
    return comparison("mnist", "MNIST, MLP", "mnist", ("sgd", "adam"))


def cifar10() -> Experiment:
    """Test accuracy of the vision transformer."""
    return comparison("cifar10-vit", "CIFAR-10, small vision transformer", "cifar-10", ("sgd", "adamw"))


def tagger() -> Experiment:
    """Test accuracy of the tagger."""
    final = [t for t in load(DATA / "tagger.json")["trainings"] if t["phase"] == "final"]
    names = ("adamw", "shampoo", "caspr")
    values = {name: [100 * t["test"] for t in final if t["method"] == name] for name in names}
    seconds = {name: median(t["seconds"] for t in final if t["method"] == name) for name in names}
    times = {name: seconds[name] / seconds["adamw"] for name in names}
    methods = {"shampoo": "shampoo", "caspr": "caspr"}
    return Experiment(
        "Tagging words, Transformer", "tagging-words", "test accuracy, %", False, values, times, ("adamw",), methods
    )


def char_gpt() -> Experiment:
    """Test loss of the small GPT."""
    final = [t for t in load(DATA / "char_gpt.json")["trainings"] if t["phase"] == "final"]
    names = list(dict.fromkeys(t["row"] for t in final))
    values = {name: [t["test"] for t in final if t["row"] == name] for name in names}
    seconds = {name: fmean(t["seconds"] for t in final if t["row"] == name) for name in names}
    times = {name: seconds[name] / seconds["adamw"] for name in names}
    methods = {name: name for name in ("muon", "soap", "shampoo", "kfac")}
    baselines = ("adamw",)
    return Experiment("Tiny Shakespeare, small GPT", "tiny-shakespeare", "test loss", True, values, times, baselines, methods)


def autoencoder() -> Experiment:
    """Training error after 60 seconds."""
    trials = load(DATA / "autoencoder.json")["trials"]
    values: dict[str, list[float]] = {}
    for trial in trials:
        if trial["seed"] > 0:
            values.setdefault(trial["row"], []).append(trial["curve"][-1][2])
    methods = {name: name for name in ("kfac", "kbfgs", "hessian_free")}
    measure = "training error in 60 s"
    return Experiment("Deep autoencoder", "the-deep-autoencoder", measure, True, values, {}, ("adam", "sgd"), methods)


def quadratic() -> Experiment:
    """The function after 250 steps, at a condition of 1e4."""
    saved = load(DATA / "quadratic.json")
    values = {
        row["method"]: [saved["trials"][trial]["end"] for trial in row["trials"]]
        for row in saved["tuned"]
        if row["condition"] == 1e4 and row["start"] == "as published"
    }
    methods = {
        "Shampoo, square roots": "shampoo",
        "KrADagrad": "kradagrad",
        "KrADagrad*, array, 1e-10": "kradagrad_star",
    }
    times = {name: ms / saved["times"]["128"]["Nesterov-SGD"] for name, ms in saved["times"]["128"].items()}
    baselines = ("Nesterov-SGD", "Adam")
    return Experiment("KrADagrad's quadratic", "kradagrads-quadratic", "f", True, values, times, baselines, methods)


EXPERIMENTS: tuple[Callable[[], Experiment], ...] = (mnist, cifar10, tagger, char_gpt, autoencoder, quadratic)


@cache
def experiments() -> tuple[Experiment, ...]:
    """All of them."""
    return tuple(make() for make in EXPERIMENTS)


def shown(experiment: Experiment, row: str) -> str:
    """The result of a row."""
    values = experiment.values[row]
    if experiment.anchor == quadratic().anchor:
        return f"{fmean(values):.2g}"
    return spread(values, 3 if fmean(values) < 4 and experiment.measure == "test loss" else 2)


def time_of(experiment: Experiment, row: str) -> str:
    """Of a step, over that of the first baseline."""
    return f"{experiment.times[row]:.2f}" if row in experiment.times else "equal time"


# ------------------------------------------------------------------ costs
WORKLOADS = {
    "mlp512": "MLP 784-512-512-10, batch 128",
    "conv": "two convolutions on 32 x 32, batch 32",
    "gpt2l": "two-layer GPT, width 256, 16 x 64 tokens",
}


def ratio(cell: dict[str, Any], kind: str) -> str:
    """Time of a kind of step over that of SGD with momentum."""
    found = cell["time"].get(kind)
    return f"{found['ratio']:.2f}" if found else "-"


def costs(method: str) -> list[list[str]]:
    """Workload, ratios of a plain step, of T=1 and of T=10, and of memory; none where the method was not measured."""
    cells = load(BENCHMARKS / "peers.json")["cells"]
    found = [(title, cells.get(f"{workload}/{method}")) for workload, title in WORKLOADS.items()]
    return [
        [title, *(ratio(cell, kind) for kind in ("plain", "T1", "T10")), f"{cell['memory']:.2f}"]
        for title, cell in found
        if cell and "error" not in cell["time"]
    ]


def large(method: str) -> dict[str, Any] | None:
    """Time and memory of the preset for large models on GPT-2 small, over AdamW's."""
    found: dict[str, Any] | None = load(BENCHMARKS / "gpt2.json")["presets"].get(method)
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
