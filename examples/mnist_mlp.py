"""MNIST: SGD, Adam, K-FAC and Shampoo on the MLP of the case study of Osawa et al. 2023 (arXiv:2305.04684).

    python examples/mnist_mlp.py                      from the hub, into runs/mnist
    python examples/mnist_mlp.py --data-dir mnist     from a local folder with train.parquet and test.parquet
    python examples/mnist_mlp.py --publish docs       and put picture and numbers into the documentation

Shipped defaults, SGD on top, 5 epochs at batch 512, three seeds; each row's learning rate is chosen on 6000 held-out samples.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from gradmaker.compare import compare
from gradmaker.compare.task import builtin_task

METHODS = ["sgd", "adam", "kfac", "shampoo"]


def model() -> nn.Module:
    """784-512-512-10 with ReLU."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def publish(out: Path, docs: Path) -> None:
    """Copy the picture and the numbers; `docs/make_pages.py` writes what is said of them."""
    for name, place in (
        ("overview.png", "images/mnist.png"),
        ("results.csv", "data/mnist.csv"),
        ("results.json", "data/mnist.json"),
    ):
        (docs / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out / name, docs / place)


def main(
    data_dir: Annotated[Path | None, typer.Option(help="Folder with train.parquet and test.parquet; default: the hub.")] = None,
    out: Annotated[Path, typer.Option(help="Output folder; finished trainings in it are not repeated.")] = Path("runs/mnist"),
    publish_to: Annotated[Path | None, typer.Option("--publish", help="Documentation folder.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Compare and, if asked, publish."""
    torch.set_num_threads(threads)
    command = "python examples/mnist_mlp.py"
    task = replace(builtin_task("mnist", data_dir), model=model, batch_size=512)
    compare(task, METHODS, budget="5 epochs", seeds=3, out=out, device=device, command=command)
    if publish_to is not None:
        publish(out, publish_to)


if __name__ == "__main__":
    typer.run(main)
