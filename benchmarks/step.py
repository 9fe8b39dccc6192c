"""Cost of a step of every method on three models, as ratios to plain SGD: time, memory and matrix-product FLOPs.

    python benchmarks/step.py [METHOD ...] --out benchmarks/step.md

Times are medians of blocks of steps between blocks of SGD, in one process; a block holds at least one refresh. FLOPs are those
of matrix products and convolutions (`torch.utils.flop_counter`), averaged over a period; decompositions are not in them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gradmaker import METHODS
from gradmaker.compare import Task
from gradmaker.compare.cost import CALLS, REFERENCE, Bench, machine, measure
from gradmaker.compare.parsing import parse_rows
from gradmaker.compare.problem import Problem, prepare
from gradmaker.compare.rows import Row

LEFT_OUT = (
    "gradient",
    "custom",
    "full_ng",
    "unit_ng",
    "layer_ng",
    "newton",
)  # nothing to measure, or too large for these models


class Transformer(nn.Module):
    """A small encoder of linear layers on sequences of tokens, one label for each."""

    def __init__(self, width: int = 128, layers: int = 2, heads: int = 4, vocabulary: int = 1000, classes: int = 20) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Attention(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x.mean(1))
        return out


class Attention(nn.Module):
    """Self-attention and a two-layer network, with norms before and residuals around them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).movedim(2, 0).transpose(-3, -2)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2))
        return x + self.mlp(self.norms[1](x))


def images(count: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Random images with random labels of ten classes: costs do not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(count, *shape, generator=generator), torch.randint(10, (count,), generator=generator)
    return x, t


def tokens(count: int, length: int) -> tuple[Tensor, Tensor]:
    """Random sequences of tokens with one label."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1000, (count, length), generator=generator)
    t = torch.randint(20, (count,), generator=generator)
    return x, t


def mlp() -> nn.Module:
    """The MLP of the case study of Osawa et al. 2023."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def conv() -> nn.Module:
    """Three convolutions with batch norm on 32 x 32 images."""
    layers: list[nn.Module] = []
    for i, o in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 10))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, Tensor], int]] = {
    "MLP 784-512-512-10, batch 512": (mlp, images(4096, 1, 28, 28), 512),
    "3 convolutions on 32x32, batch 64": (conv, images(512, 3, 32, 32), 64),
    "2-layer Transformer, width 128, 32 tokens, batch 64": (Transformer, tokens(512, 32), 64),
}


def flops(row: Row, problem: Problem, batch: int) -> float:
    """FLOPs of matrix products in a step, averaged over a period after warm-up."""
    bench = Bench(row, problem, problem.first_calls(batch, CALLS))
    config = getattr(bench.session.maker, "config", None)
    bench.run(getattr(config, "warmup_steps", 0) + 1)
    period = max([getattr(config, f"{k}_interval", 1) for k in ("curvature", "preconditioner")])
    with FlopCounterMode(display=False) as counter:
        bench.run(period)
    bench.session.close()
    return counter.get_total_flops() / period


def main(
    methods: Annotated[list[str] | None, typer.Argument(help="Methods; default: all but a few.")] = None,
    out: Annotated[Path, typer.Option(help="Markdown file; a JSON file is written beside it.")] = Path("benchmarks/step.md"),
    case: Annotated[str, typer.Option(help="Only models whose name holds this.")] = "",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure and write the table."""
    torch.set_num_threads(threads)
    rows = parse_rows(methods or [m for m in METHODS if m not in LEFT_OUT], None, None)
    results = {}
    for name, (model, data, batch) in CASES.items():
        if case not in name:
            continue
        problem = prepare(Task(model=model, train=data), device)
        costs = measure({row.label: row for row in rows}, problem, batch, lambda: None)
        base = flops(REFERENCE, problem, batch)
        results[name] = {
            row.label: {**costs[row.label].as_dict(), "flop_ratio": flops(row, problem, batch) / base} for row in rows
        }
        print(name, json.dumps(results[name], indent=1))
    facts = machine(device)
    out.with_suffix(".json").write_text(json.dumps({"machine": facts, "cases": results}, indent=1) + "\n")
    out.write_text(render(results, facts))


def render(results: dict[str, dict[str, dict[str, float]]], facts: dict[str, object]) -> str:
    """The Markdown page."""
    lines = ["# Cost of a step", "", "Ratios to plain SGD with momentum; made by `python benchmarks/step.py`.", ""]
    lines += ["On " + ", ".join(f"{k} {v}" for k, v in facts.items()) + ".", ""]
    for case, table in results.items():
        lines += [f"## {case}", "", "| method | time | FLOPs of products | peak memory |", "|---|---|---|---|"]
        for label, c in table.items():
            lines.append(f"| {label} | {c['step_ratio']:.2f} | {c['flop_ratio']:.2f} | {c['memory_ratio']:.2f} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
