"""Predicted and measured seconds of a step: every method of the table on four models, one thread.

    python benchmarks/predicted.py [METHOD ...] --out benchmarks/predicted.md

A method has three kinds of steps: those that measure nothing, those that measure the curvature, and those that also refresh
the preconditioner. Each kind is predicted from shapes by `gradmaker.cost` and measured: CPU seconds of this process, the
median of a few steps. ``average`` is a step over a window with both intervals at 1 and at 10.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import process_time
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from step import Transformer
from torch import Tensor, nn

from gradmaker import METHODS, cost
from gradmaker.compare.cost import machine
from gradmaker.costs.prediction import StepCost, cost_of_gradient

ROWS = "adam kfac skfac ekfac shampoo soap caspr kl_shampoo kradagrad_star psgd_whiten psgd_kf kbfgs seng smw_ng muon".split()
PAGE = Path("benchmarks/predicted.md")
STEPS = 5
LONG = 1.0  # seconds of a step of which one is enough
KINDS = ("idle", "measured", "refreshed")
Case = tuple[nn.Module, Tensor, Tensor]


def mlp(width: int) -> Case:
    """The MLP of the case study of Osawa et al. 2023, and a narrow one."""
    layers = (nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    return nn.Sequential(*layers), torch.randn(128, 784), torch.randint(10, (128,))


def conv() -> Case:
    """Two convolutions on 32 x 32 images."""
    features = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU())
    net = nn.Sequential(*features, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2048, 10))
    return net, torch.randn(32, 3, 32, 32), torch.randint(10, (32,))


def transformer() -> Case:
    """Two blocks of width 128 on sequences of 32 tokens."""
    return Transformer(), torch.randint(1000, (32, 32)), torch.randint(20, (32,))


CASES: dict[str, Callable[[], Case]] = {
    "MLP 784-512-512-10, batch 128": lambda: mlp(512),
    "MLP 784-128-128-10, batch 128": lambda: mlp(128),
    "2 convolutions on 32x32, batch 32": conv,
    "2-layer Transformer, width 128, 32 tokens, batch 32": transformer,
}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)


def seconds(step: Callable[[], None]) -> float:
    """CPU seconds of a step: the median of a few, or one long one."""
    found: list[float] = []
    while len(found) < STEPS and (not found or found[0] < LONG):
        start = process_time()
        step()
        found.append(process_time() - start)
    return median(found)


def measured(case: Case, method: str | None) -> list[float]:
    """Seconds of each kind of step; of the only kind for the plain gradient."""
    model, x, t = case
    optimizer = sgd(model.parameters())
    maker: Any = None if method is None else METHODS[method](model)

    def step(measures: bool, refreshes: bool) -> None:
        optimizer.zero_grad()
        if maker is None:
            F.cross_entropy(model(x), t).backward()
        else:
            state = maker.step_state
            names, now = list(state.now.clocks.of), state.now
            clocks = now.clocks.forced(now.index, names if measures else (), names if refreshes else ())
            state.load(replace(now, clocks=clocks))
            maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), t)
            maker.forward_and_backward()
        optimizer.step()

    step(True, True)
    step(True, False)
    kinds = ((False, False), (True, False), (True, True)) if method else ((False, False),)
    return [seconds(lambda kind=kind: step(*kind)) for kind in kinds]  # type: ignore[misc]


def predicted(case: Case, method: str | None) -> list[float]:
    """The same from shapes alone."""
    model, x, _ = case
    if method is None:
        return [cost_of_gradient(model, x, optimizer=sgd).idle]
    config = METHODS[method].Config(curvature_interval=10)  # so that there are steps of each kind
    found: StepCost = cost(METHODS[method](model, config), x, optimizer=sgd)
    return [found.idle, found.parts["method"].measured, found.parts["method"].refreshed]


def averages(kinds: Sequence[float]) -> list[float]:
    """A step with everything at every step, and with the statistic at every step and a refresh at every tenth."""
    return [kinds[-1], kinds[1] + (kinds[2] - kinds[1]) / 10] if len(kinds) > 1 else []


def main(
    methods: Annotated[list[str] | None, typer.Argument(help="Methods; default: those of the table.")] = None,
    out: Annotated[Path, typer.Option(help="Markdown file; a JSON file is written beside it.")] = PAGE,
    case: Annotated[str, typer.Option(help="Only models whose name holds this.")] = "",
) -> None:
    """Predict, measure and write the table."""
    torch.set_num_threads(1)
    results: dict[str, dict[str, dict[str, list[float]]]] = {}
    facts = machine("cpu")
    for name, make in CASES.items():
        if case not in name:
            continue
        results[name] = {}
        for method in (None, *(methods or ROWS)):
            torch.manual_seed(0)
            pair = {"predicted": predicted(make(), method), "measured": measured(make(), method)}
            pair = {key: [*kinds, *averages(kinds)] for key, kinds in pair.items()}
            results[name][method or "SGD"] = pair
            print(name, method, [f"{p / m:.2f}" for p, m in zip(pair["predicted"], pair["measured"], strict=True)], flush=True)
            out.with_suffix(".json").write_text(json.dumps({"machine": facts, "cases": results}, indent=1) + "\n")
            out.write_text(render(results, facts))


def render(results: dict[str, dict[str, dict[str, list[float]]]], facts: dict[str, object]) -> str:
    """The Markdown page."""
    ratios = [p / m for table in results.values() for row in table.values() for p, m in zip(*row.values(), strict=True)]
    within = sum(0.5 <= ratio <= 2 for ratio in ratios)
    lines = ["# Predicted cost of a step", "", "Made by `python benchmarks/predicted.py`, which says what is measured.", ""]
    lines += [
        "Milliseconds predicted / measured, and their ratio. T=1: all at every step; T=10: a refresh every tenth.",
        "",
    ]
    lines += [f"{within} of {len(ratios)} numbers are within a factor of two; the ratios lie between {min(ratios):.2f} and"]
    lines += [f"{max(ratios):.2f}.", "", "On " + ", ".join(f"{k} {v}" for k, v in facts.items()) + ".", ""]
    for case, table in results.items():
        lines += [f"## {case}", "", "| method | idle | measures | refreshes (T=1) | T=10 |", "|---|---|---|---|---|"]
        for label, row in table.items():
            pairs = list(zip(row["predicted"], row["measured"], strict=True))
            cells = [f"{p * 1e3:.1f} / {m * 1e3:.1f} = {p / m:.2f}" for p, m in pairs]
            shown = [*cells[:3], *cells[4:]] if len(cells) > 1 else [*cells, "-", "-", "-"]
            lines.append(f"| {label} | {' | '.join(shown)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
