"""GPT-2 small through `gradmaker.optimizer`: time and peak memory of a step against AdamW, by named presets.

    python benchmarks/gpt2.py [PRESET ...] --interval 20

124 M parameters with random weights, 1 x 64 tokens, CPU, one thread. The time is the CPU time of a whole window of `--interval`
steps, in which every block measures and refreshes once, over that of AdamW in the same process; the memory is the peak of live
tensors from building the model on, over that of AdamW.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from time import process_time
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded: the weights are random

import torch
import transformers as hf
import typer
from torch import Tensor, nn

import gradmaker
from gradmaker import METHODS
from gradmaker.compare.cost import cpu_peak, machine
from gradmaker.presets import spelled

PAGE = Path(__file__).resolve().parent / "gpt2.md"
PRESETS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "kfac": ("kfac", {"preset": "large", "warmup_steps": 0}),
    "shampoo": ("shampoo", {"preset": "large", "warmup_steps": 0}),
    "soap": ("soap", {"preset": "large"}),
    "kl_shampoo": ("kl_shampoo", {"preset": "large"}),
    "muon": ("muon", {"preset": "large"}),
}
"""Method and options; the interval of refreshes is that of the run, but of Muon, which has none. What is measured is a run
under way: warm-up steps, which refresh at every step, are left out."""
WITHOUT_INTERVALS = ("muon",)
LENGTH = 64
TIME, MEMORY = 3.0, 1.5
"""Most of AdamW's time and memory."""
Step = Callable[[], None]
Found = dict[str, Any]


def model_of(narrow: bool) -> tuple[nn.Module, Tensor]:
    """GPT-2 small, or a narrow one of the same structure, and a batch of one sequence."""
    torch.manual_seed(0)
    small = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": LENGTH, "vocab_size": 64}
    small |= {"bos_token_id": 0, "eos_token_id": 0}
    config = hf.GPT2Config(**small) if narrow else hf.GPT2Config()
    model = hf.GPT2LMHeadModel(config).train()
    return model, torch.randint(config.vocab_size, (1, LENGTH))


def training(make: Callable[[nn.Module], torch.optim.Optimizer], narrow: bool) -> Step:
    """A step of training with an optimizer."""
    model, tokens = model_of(narrow)
    optimizer = make(model)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)


def preset(name: str, interval: int) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """The optimizer of a preset."""
    method, options = PRESETS[name]
    clocks = {} if name in WITHOUT_INTERVALS else {"preconditioner_interval": interval}
    return lambda model: gradmaker.optimizer(model, method, lr=1e-5, **{**options, **clocks})


def seconds(step: Step, count: int) -> float:
    """CPU seconds of a step: the mean of a window."""
    start = process_time()
    for _ in range(count):
        step()
    return (process_time() - start) / count


def peak(make: Callable[[nn.Module], torch.optim.Optimizer], narrow: bool) -> int:
    """Bytes at the peak of two steps, the first of which measures and refreshes."""

    def work() -> None:
        step = training(make, narrow)
        for _ in range(2):
            step()

    return cpu_peak(work)


@cache
def peak_of_adamw(narrow: bool) -> int:
    return peak(adamw, narrow)


def measure(name: str, interval: int, narrow: bool) -> Found:
    """A whole window of steps between some of AdamW, after a first window's first step."""
    make = preset(name, interval)
    memory = peak(make, narrow) / peak_of_adamw(narrow)
    reference, step = training(adamw, narrow), training(make, narrow)
    seconds(reference, 1)
    seconds(step, interval)
    before = seconds(reference, 3)
    own = seconds(step, interval)
    base = (before + seconds(reference, 3)) / 2
    return {"ratio": own / base, "ms": 1e3 * own, "adamw_ms": 1e3 * base, "memory": memory, "interval": interval}


def render(known: Mapping[str, Any]) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in known["machine"].items())
    lines = ["# GPT-2 small, one line", "", *(__doc__ or "").strip().splitlines()[4:], "", f"On {facts}.", ""]
    lines += [f"To be met: at most {TIME:g} x AdamW's time and {MEMORY:g} x its memory.", ""]
    lines += ["| preset | steps of a window | ms | over AdamW | memory over AdamW | met |", "|---|---|---|---|---|---|"]
    for name, r in known["presets"].items():
        if "error" in r:
            lines.append(f"| {shown(name)} | - | - | - | - | {r['error']} |")
            continue
        met = "yes" if r["ratio"] <= TIME and r["memory"] <= MEMORY else "no"
        lines.append(f"| {shown(name)} | {r['interval']} | {r['ms']:.0f} | {r['ratio']:.2f} | {r['memory']:.2f} | {met} |")
    return "\n".join(lines) + "\n"


def shown(name: str) -> str:
    """A preset as it is written in code, and the options that it stands for."""
    method, options = PRESETS[name]
    stands_for = METHODS[method].Config.presets.get(options.get("preset"), {}) if method in METHODS else {}
    said = f"`{', '.join([repr(method), spelled(options)])}`"
    return f"{said}: `{spelled(stands_for)}`" if stands_for else said


def main(
    presets: Annotated[list[str] | None, typer.Argument(help="Presets; default: all.")] = None,
    interval: Annotated[int, typer.Option(help="Steps between refreshes, and of a window.")] = 20,
    narrow: Annotated[bool, typer.Option(help="A narrow model of the same structure.")] = False,
    out: Annotated[Path, typer.Option(help="Markdown file; a JSON file is written beside it.")] = PAGE,
) -> None:
    """Measure presets and write the page; those that are not named keep what the JSON file has."""
    torch.set_num_threads(1)
    if unknown := [name for name in presets or () if name not in PRESETS]:
        raise typer.BadParameter(f"{unknown[0]!r}: expected one of {', '.join(PRESETS)}")
    path = out.with_suffix(".json")
    known: Found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"presets": {}}
    known["machine"] = machine("cpu")
    for name in presets or PRESETS:
        try:
            known["presets"][name] = measure(name, interval, narrow)
        except (RuntimeError, ValueError) as error:
            known["presets"][name] = {"error": " ".join(str(error).split())[:200]}
        print(name, known["presets"][name], flush=True)
        path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        out.write_text(render(known), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
