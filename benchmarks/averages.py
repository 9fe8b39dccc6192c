"""How long Shampoo and CASPR should remember their statistics: on digits.

python benchmarks/averages.py                     into runs/averages; finished trainings are not repeated
python benchmarks/averages.py --publish docs      put picture and numbers into the documentation
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from gradmaker.compare import compare
from gradmaker.compare.task import builtin_task

DECAYS = (0.9, 0.95, 0.99, 0.999, None)
RATES = {"shampoo": [0.03, 0.1, 0.3, 1.0, 3.0], "caspr": [0.001, 0.003, 0.01, 0.03, 0.1]}


def rows() -> dict[str, Any]:
    """Every memory, with all else as shipped; the grids are wide enough to hold the best rate inside."""
    return {
        f"{method} {'sum' if decay is None else decay}": {"method": method, "decay": decay, "learning_rates": rates}
        for method, rates in RATES.items()
        for decay in DECAYS
    }


def model() -> nn.Module:
    """64-64-64-10 with ReLU."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def publish(out: Path, docs: Path) -> None:
    """Copy the picture and the numbers; `docs/make_pages.py` writes what is said of them."""
    for name, place in (("overview.png", "images/averages.png"), ("results.json", "data/averages.json")):
        (docs / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out / name, docs / place)


def main(
    out: Annotated[Path, typer.Option(help="Output folder; finished trainings in it are not repeated.")] = Path(
        "runs/averages"
    ),
    epochs: Annotated[int, typer.Option(help="Passes through the data.")] = 20,
    seeds: Annotated[int, typer.Option(help="Trainings of the chosen learning rate.")] = 5,
    publish_to: Annotated[Path | None, typer.Option("--publish", help="Documentation folder.")] = None,
) -> None:
    """Compare and, if asked, publish."""
    torch.set_num_threads(1)
    command = "python benchmarks/averages.py"
    task = replace(builtin_task("digits"), model=model, batch_size=64)
    compare(task, rows(), budget=epochs, seeds=seeds, out=out, command=command)
    if publish_to is not None:
        publish(out, publish_to)


if __name__ == "__main__":
    typer.run(main)
