"""What `gradmaker.fidelity` takes on networks of ten million parameters: seconds, memory, and its table.

    OMP_NUM_THREADS=2 python benchmarks/fidelity_scale.py resnet18 --out benchmarks/fidelity_resnet18
    OMP_NUM_THREADS=2 python benchmarks/fidelity_scale.py gpt --out benchmarks/fidelity_gpt

ResNet-18 for 32x32 images and a GPT with 6 layers, at initialisation, a batch of 32 random examples, three approximations and 8
probes. The time is that of a process with two threads; seconds of the processor are beside it, for a machine with other work.
"""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from gradmaker import fidelity

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples import networks

APPROXIMATIONS = {"K-FAC": "kfac", "EKFAC": "ekfac", "diagonal": "diag_ng"}
LENGTH, VOCABULARY = 64, 65


def tokens_last(z: Tensor, t: Tensor) -> Tensor:
    """The mean cross entropy of all tokens."""
    return F.cross_entropy(z.flatten(0, 1), t.flatten())


def problem(name: str, width: int, examples: int) -> tuple[nn.Module, object, tuple[Tensor, Tensor]]:
    """A model at initialisation, its loss and a random batch."""
    torch.manual_seed(0)
    if name == "resnet18":
        return networks.resnet18(width), F.cross_entropy, (torch.randn(examples, 3, 32, 32), torch.randint(10, (examples,)))
    model = networks.GPT(6 * width, 6, 6, VOCABULARY, LENGTH)
    return model, tokens_last, (torch.randint(VOCABULARY, (examples, LENGTH)), torch.randint(VOCABULARY, (examples, LENGTH)))


def main(
    name: Annotated[str, typer.Argument(help="resnet18 or gpt")],
    width: Annotated[int, typer.Option(help="channels of the first stage, or features of a head")] = 64,
    examples: Annotated[int, typer.Option(help="examples in the batch")] = 32,
    probes: Annotated[int, typer.Option(help="random probes")] = 8,
    iterations: Annotated[int, typer.Option(help="of CG and Lanczos")] = 10,
    out: Annotated[Path, typer.Option(help="folder of the result")] = Path("fidelity_scale"),
) -> None:
    """Measure, and write JSON and a table."""
    model, loss, batch = problem(name, width, examples)
    wall, cpu = time.perf_counter(), time.process_time()
    result = fidelity(model, loss, batch, APPROXIMATIONS, probes=probes, iterations=iterations, progress=True)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    cost = {
        "model": f"{name}, width {width}, {sum(p.numel() for p in model.parameters())} parameters, {examples} examples",
        "seconds": round(wall, 1),
        "processor seconds": round(cpu, 1),
        "peak GiB": round(peak / 2**30, 2),
        "threads": torch.get_num_threads(),
        "probes": probes,
        "iterations": iterations,
        "machine": f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}",
    }
    out.mkdir(parents=True, exist_ok=True)
    result.to_json(out / "fidelity.json")
    text = "\n".join(f"{key}: {value}" for key, value in cost.items())
    (out / "table.txt").write_text(f"{text}\n\n{result.table()}\n", encoding="utf-8")
    (out / "cost.json").write_text(json.dumps(cost, indent=1) + "\n", encoding="utf-8")
    print(text, result.table(), sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
