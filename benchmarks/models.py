"""Models that people train: which parameters K-FAC treats, whether `verify()` passes, and what a step costs.

    python benchmarks/models.py [NAME ...] --out benchmarks/models.md

The shares are those of the true sizes, planned on the meta device. Checks and steps are of a narrow model with the
same structure: the same classes with two layers of width 64 and random weights, in float32. The models of timm are left out
where it cannot be imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers as hf
import typer
from subjects import Batch, Subject, subjects, timm
from torch import nn

from gradmaker import CostError, GradientMaker, KfacGradientConfig, KfacGradientMaker, cost
from gradmaker.compare.cost import cpu_peak, machine
from gradmaker.reports.coverage import PLAIN, Coverage, coverage, percent

REQUIRED = 0.95
CONFIG = KfacGradientConfig(warmup_steps=0)
PERIOD, ROUNDS = 10, 15  # steps of a measured round: one measurement and one refresh at the default intervals


def build(subject: Subject) -> tuple[nn.Module, Batch]:
    """The narrow model in training mode, every parameter off its special values, with one batch."""
    torch.manual_seed(0)
    model, batch = subject.narrow().train(), subject.batch()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model, batch


def planned(subject: Subject) -> Coverage:
    """What K-FAC treats in the true size."""
    with torch.device("meta"):
        model = subject.true()
    return coverage(KfacGradientMaker(model).plan)


def declare(maker: GradientMaker, model: nn.Module, batch: Batch) -> None:
    """The calls of a step."""
    if "targets" in batch:
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, batch["images"]), batch["targets"])
    else:
        maker.setup_loss_repr(maker.setup_model_call(model, **batch).loss)


# ------------------------------------------------------------------ what is reported
def shares(found: Coverage) -> dict[str, float]:
    """Shares of the parameters: with two Kronecker factors, one of them diagonal or not, in norm layers, and with neither."""
    total = dict.fromkeys(("full", "one-hot", "long side", "norms", "plain"), 0)
    for share in found.shares:
        kind = "plain" if share.method == PLAIN else "norms" if share.parts.startswith("Dense") else share.diagonal or "full"
        total[kind] += share.count
    return {kind: count / found.count for kind, count in total.items()}


def own(found: Mapping[str, float]) -> float:
    """The share of K-FAC's own triple."""
    return found["full"] + found["one-hot"] + found["long side"]


def left_out(found: Coverage) -> dict[str, list[str]]:
    """Names of parameters with their plain gradient by the reason; numbers in them become ``*``."""
    left: dict[str, list[str]] = {}
    for share in found.shares:
        if share.method == PLAIN:
            left[share.parts] = list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in share.sizes))
    return left


def verified(subject: Subject) -> dict[str, Any]:
    """The largest errors of `verify()` on the narrow model."""
    model, batch = build(subject)
    maker = KfacGradientMaker(model)
    declare(maker, model, batch)
    start = perf_counter()
    found = maker.verify()
    errors = {column: max(getattr(c, column) or 0.0 for c in found.checks) for column in ("gradients", "solve")}
    return {"passed": found.passed, "complete": found.complete, **errors, "seconds": perf_counter() - start}


class Cost(NamedTuple):
    """Seconds of an average step, and the highest sum of bytes of live tensors beside the model and its gradient."""

    seconds: float
    bytes: int


def measured(subject: Subject) -> dict[str, Cost]:
    """An average step of the plain gradient and of K-FAC after its warm-up; periods alternate, so that drift is in both."""
    seconds: dict[str, list[float]] = {"plain": [], "kfac": []}
    periods, peaks = {}, {}
    for name in seconds:
        model, batch = build(subject)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        made: list[Callable[[], None]] = []
        peaks[name] = cpu_peak(partial(_first_period, made, name, model, batch))
        periods[name] = made[0]
    for _ in range(ROUNDS):
        for name, period in periods.items():
            start = perf_counter()
            period()
            seconds[name].append((perf_counter() - start) / PERIOD)
    return {name: Cost(median(each), peaks[name]) for name, each in seconds.items()}


def _first_period(made: list[Callable[[], None]], name: str, model: nn.Module, batch: Batch) -> None:
    """Make the maker, append a function that makes the steps of a period, and call it."""
    maker = KfacGradientMaker(model, CONFIG) if name == "kfac" else GradientMaker(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def period() -> None:
        for _ in range(PERIOD):
            optimizer.zero_grad(set_to_none=False)
            declare(maker, model, batch)
            maker.forward_and_backward()
            optimizer.step()

    made.append(period)
    period()


def estimated(maker: KfacGradientMaker, batch: Batch) -> Cost | None:
    """The same from shapes alone, before the first step; None for a model that needs data."""
    try:
        if "targets" in batch:
            found = cost(maker, batch["images"], lambda z: F.cross_entropy(z, batch["targets"]), _sgd)
        else:
            found = cost(maker, dict(batch), lambda output: output.loss, _sgd)
    except CostError:
        return None
    return Cost(found.seconds, found.held + found.peak)


def _sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-4)


def report(subject: Subject) -> dict[str, Any]:
    """All that is known of a model."""
    true = planned(subject)
    model, batch = build(subject)
    guess = estimated(KfacGradientMaker(model, CONFIG), batch)
    return {
        "size": subject.size,
        "parameters": true.count,
        "shares": shares(true),
        "left": left_out(true),
        "narrow": sum(p.numel() for p in model.parameters()),
        "verify": verified(subject),
        **{name: each._asdict() for name, each in measured(subject).items()},
        "estimated": None if guess is None else guess._asdict(),
    }


# ------------------------------------------------------------------ the page
def render(results: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """The page."""
    head = (__doc__ or "").split("\n")[0]
    lines = ["# Models that people train", "", head, "", "Made by `python benchmarks/models.py`.", ""]
    lines += ["On " + ", ".join(f"{k} {v}" for k, v in facts.items()) + ".", "", "## What K-FAC treats", "", COVERED, ""]
    lines += [
        "| model | parameters | own triple | full factors | one-hot table | long side | norms | plain |",
        f"|{'---|' * 8}",
    ]
    for name, found in results.items():
        cells = [percent(found["shares"][k]) for k in ("full", "one-hot", "long side", "norms", "plain")]
        total = percent(own(found["shares"]))
        total = f"**{total}**" if own(found["shares"]) < REQUIRED else total
        lines.append(f"| {name}, {found['size']} | {found['parameters']:,} | {total} | {' | '.join(cells)} |")
    lines += ["", "Plain gradients:", ""]
    lines += [
        f"- {name}: {reason}: {', '.join(f'`{k}`' for k in names)}"
        for name, found in results.items()
        for reason, names in found["left"].items()
    ]
    lines += ["", "## Checks and costs of the narrow models", "", COSTS, "", *cost_rows(results)]
    return "\n".join(lines) + "\n"


def cost_rows(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table of checks and costs."""
    columns = [
        "model",
        "parameters",
        "verify()",
        "gradients",
        "solve",
        "plain, ms",
        "K-FAC, ms",
        "estimated",
        "MB",
        "estimated",
    ]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for name, found in results.items():
        check, guess = found["verify"], found["estimated"]
        verdict = "ok" if check["passed"] and check["complete"] else "FAILED" if not check["passed"] else "unchecked"
        cells = [name, f"{found['narrow']:,}", verdict, *(f"{check[k]:.0e}" for k in ("gradients", "solve"))]
        cells += [f"{1e3 * found[k]['seconds']:.1f}" for k in ("plain", "kfac")]
        cells += ["-" if guess is None else f"{1e3 * guess['seconds']:.1f}", f"{found['kfac']['bytes'] / 1e6:.1f}"]
        cells.append("-" if guess is None else f"{guess['bytes'] / 1e6:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _head(columns: list[str]) -> list[str]:
    return [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]


COVERED = """\
Shares of the parameters at the true size. K-FAC's own triple has two Kronecker factors a layer; the factor of one-hot inputs,
those of a table of tokens or positions, is a diagonal, and so is that of a side over `max_dim=8192`, as the outputs of a head.
Norm layers have exact 2 x 2 blocks. **Bold** is below 95 %."""
COSTS = """\
Errors are the largest of all layers, in float32: captured gradients of examples, and solves. Milliseconds are those of an
average step at the default intervals, with one measurement and one refresh in ten steps, of eight examples on one thread. MB
are the highest sum of live tensors in these steps, beside the model and its gradient."""


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Models; default: all.")] = None,
    out: Annotated[Path, typer.Option(help="Markdown file; a JSON file is written beside it.")] = Path("benchmarks/models.md"),
) -> None:
    """Measure, print and write the page."""
    hf.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results = {}
    for name, subject in subjects():
        if not names or name in names:
            results[name] = report(subject)
            print(f"{name}, {subject.size}: {percent(own(results[name]['shares']))}", flush=True)
            print(json.dumps(results[name], indent=1), flush=True)
    if timm is None:
        print("timm cannot be imported: its models are left out")
    facts = {**machine("cpu"), "transformers": hf.__version__, **({} if timm is None else {"timm": timm.__version__})}
    out.with_suffix(".json").write_text(json.dumps({"machine": facts, "models": results}, indent=1) + "\n", encoding="utf-8")
    out.write_text(render(results, facts), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
