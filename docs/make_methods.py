"""Writes docs/methods.md, the table of all methods, and a page for each in docs/methods/, from `METHODS` and measurements."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from gradmaker import METHODS, GradientConfig, optimizer
from gradmaker.commands.methods import docstring, parts, reference
from gradmaker.compare.parsing import parse_rows

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

from measured import Experiment, costs, experiments, large, shown, table, time_of  # noqa: E402

PAGE, FOLDER, NOTES = (ROOT / "docs" / name for name in ("methods.md", "methods", "site/method_notes.yaml"))
SAID = yaml.safe_load(NOTES.read_text(encoding="utf-8"))
FAMILIES, WHEN, MEASURES = SAID["families"], SAID["when"], SAID["measures"]
EXPONENTS = {-1.0: "-1", -0.5: "-1/2", -0.25: "-1/4"}
HEAD = """# Methods

Every method is a [curvature x representation x solver](taxonomy.md), and has a page: formula, source, parts, defaults, when it
helps, what it costs. The parts are those of a linear layer, or of its weight; norm layers and vectors may be treated by others.

*loop*: `any` means one line, [`gradmaker.optimizer`](optimizer.md), in any training loop; `declared` means that the method
repeats or differentiates the loss, and needs [declared calls](using.md#the-protocol).

The exponent is that of the curvature matrix; the two factors of a matrix in Shampoo are raised to half of it, -1/4.
[Which method should I use?](which.md) has what was measured.

Made by `docs/make_methods.py` from the registry; not to be edited.
"""


# ------------------------------------------------------------------ from the registry
def exponent(name: str) -> str:
    """Of the curvature."""
    if name in ("gradient", "custom"):
        return {"gradient": "0", "custom": "the solver's"}[name]
    found = METHODS[name](nn.Linear(3, 2)).plan.blocks[0].triple.solver.exponent  # type: ignore[attr-defined]
    return EXPONENTS.get(found, f"{found:g}")


def attaches(name: str) -> bool:
    """Whether the method works in any loop, as `gradmaker.optimizer`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model is small
            optimizer(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), name, lr=0.1)
    except ValueError:
        return False
    return True


def options(name: str) -> str:
    """Damping, decay, and every option that a method has of its own or starts from elsewhere."""
    if name == "gradient":
        return "none"
    common = {f.name: f.default for f in fields(GradientConfig)}
    config: Any = METHODS[name].Config()
    own = [f.name for f in fields(config) if common.get(f.name, MISSING) != getattr(config, f.name)]
    shown_ones = dict.fromkeys(["damping", "decay", *own])
    return ", ".join(f"`{key}={getattr(config, key)!r}`" for key in shown_ones)


def refused(name: str) -> str:
    """The common options that say nothing to a method with its defaults."""
    config: Any = METHODS[name].Config()
    common = {f.name for f in fields(GradientConfig)}
    found = [] if name == "gradient" else [key for key in config.inapplicable_options() if key in common]
    return ", ".join(f"`{key}`" for key in sorted(found))


def presets(name: str) -> Iterator[str]:
    """A line for each preset."""
    for key, own in getattr(METHODS[name].Config, "presets", {}).items():
        yield f"- preset `{key}`: " + ", ".join(f"`{k}={v!r}`" for k, v in own.items())


# ------------------------------------------------------------------ from measurements
def result(experiment: Experiment, row: str) -> list[str]:
    """The line of a row in an experiment, beside its baselines."""
    beside = ", ".join(f"{name} {shown(experiment, name)}" for name in experiment.baselines)
    link = f"[{experiment.title}](../experiments.md#{experiment.anchor})"
    return [link, experiment.measure, f"{row}: {shown(experiment, row)}", beside, time_of(experiment, row)]


def helps(name: str) -> Iterator[str]:
    """When it helps, and the experiments that have the method."""
    yield f"## When it helps\n\n{WHEN[name]}\n"
    rows = [result(e, row) for e in experiments() for row, method in e.methods.items() if method == name]
    if rows:
        yield table(["experiment", "measure", "this method", "beside", "time of a step / first baseline"], rows) + "\n"
    else:
        yield "No [experiment](../experiments.md) trains it against tuned baselines.\n"


def price(name: str, kinds: tuple[str, ...]) -> Iterator[str]:
    """What it costs: passes, and times and memory where they were measured."""
    yield "## What it costs\n"
    if kinds[0] in MEASURES:
        yield f"A measurement is {MEASURES[kinds[0]]}.\n"
    if rows := costs(name):
        yield "Over SGD with momentum: time of a step on one CPU thread, and peak memory ([all](../../benchmarks/peers.md)).\n"
        yield table(["model", "idle", "T=1", "T=10", "memory"], rows) + "\n"
        yield "*idle*: neither measures nor refreshes; *T*: both at every T-th step.\n"
    if found := large(name):
        yield (
            f'On GPT-2 small `preset="large"` takes {found["ratio"]:.2f} times AdamW\'s time and {found["memory"]:.2f} times '
            "its memory ([how](../../benchmarks/gpt2.md)).\n"
        )
    if name in ("gradient", "custom"):
        yield {"gradient": "A forward and a backward pass.\n", "custom": "What its parts cost.\n"}[name]
    elif not rows and not found:
        yield "Its steps were not timed. [`gradmaker.cost`](../using.md#what-a-step-will-cost) predicts them for your model.\n"


# ------------------------------------------------------------------ pages
def page(name: str) -> str:
    """The page of a method."""
    kinds, (said, sources) = parts(name), docstring(name)
    one_line = f'`gradmaker.optimizer(model, "{name}", lr=...)` in [any loop](../optimizer.md)'
    declared = f'`from_config(model, {{"method": "{name}"}})` and [declared calls](../using.md#the-protocol)'
    rates = ", ".join(f"{rate:g}" for rate in parse_rows([name])[0].learning_rates) if name != "custom" else ""
    facts = [
        ["use", one_line if attaches(name) else declared],
        ["classes", f"`{METHODS[name].__name__}`, `{METHODS[name].Config.__name__}`"],
        ["curvature x representation x solver", " x ".join(f"`{part}`" if len(kinds) == 3 else part for part in kinds)],
        ["power of the curvature", exponent(name)],
        ["options and defaults", options(name)],
        *([["learning rates that `gradmaker compare` tries", rates]] if rates else []),
        *([["options without effect, refused", without]] if (without := refused(name)) else []),
    ]
    lines = [f"# {name}\n", said + "\n", *([f"*Source*: {sources}.\n"] if sources else [])]
    lines += [table(["", ""], facts) + "\n", *(f"{line}\n" for line in presets(name)), *helps(name), *price(name, kinds)]
    return "\n".join(lines)


def line(name: str) -> list[str]:
    """The line of a method in the table."""
    kinds = parts(name)
    shown_parts = " x ".join(f"`{part}`" if len(kinds) == 3 else part for part in kinds)
    loop = "any" if attaches(name) or name == "custom" else "declared"
    return [f"[`{name}`](methods/{name}.md)", shown_parts, exponent(name), loop, reference(name)]


def render() -> str:
    """The page of all methods."""
    head = ["method", "curvature x representation x solver", "power", "loop", "source"]
    found = [f"## {title}\n\n{table(head, [line(name) for name in names])}\n" for title, names in FAMILIES.items()]
    return "\n".join([HEAD, *found])


def pages() -> dict[Path, str]:
    """Every page with its text."""
    missing = set(METHODS) ^ {name for names in FAMILIES.values() for name in names}
    if missing or set(WHEN) != set(METHODS):
        raise ValueError(
            f"docs/site/method_notes.yaml: {sorted(missing | set(WHEN) ^ set(METHODS))}: each method once, in both tables"
        )
    return {PAGE: render()} | {FOLDER / f"{name}.md": page(name) for name in METHODS}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
