"""CIFAR-10: SGD, AdamW, Shampoo, CASPR and SOAP on a ResNet-18 and on a vision transformer.

    python examples/cifar10.py                        from the hub, into runs/cifar10; small networks on 5000 images
    python examples/cifar10.py --data-dir cifar10     from a local folder with train.parquet and test.parquet
    python examples/cifar10.py --full --device cuda   all images and the published widths
    python examples/cifar10.py --publish docs         put pictures and numbers into the documentation

Shipped defaults, three seeds; each row's learning rate is chosen on a tenth of the training images, from as many for each row.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from networks import ViT, resnet18, vit_tiny
from torch import nn

from gradmaker.compare import Task, compare
from gradmaker.compare.task import builtin_task


class Size(NamedTuple):
    """What is trained, and for how long."""

    networks: dict[str, Callable[[], nn.Module]]
    train: int
    test: int
    epochs: dict[str, int]


SMALL = Size(
    {"resnet18": lambda: resnet18(8), "vit": lambda: ViT(64, 4, 4, 32, patch=8)}, 5000, 2000, {"resnet18": 2, "vit": 5}
)
FULL = Size({"resnet18": resnet18, "vit": vit_tiny}, 50000, 10000, {"resnet18": 50, "vit": 100})
AXES: dict[str, Any] = {"block_size": 1024}
METHODS: list[Any] = [
    {"optimizer": {"name": "SGD", "momentum": 0.9, "weight_decay": 5e-4}, "label": "sgd", "learning_rates": [0.01, 0.03, 0.1]},
    {"optimizer": {"name": "AdamW", "weight_decay": 0.05}, "label": "adamw", "learning_rates": [3e-4, 1e-3, 3e-3]},
    {"method": "shampoo", "grafting": "adam", "beta1": 0.9, "merge": "to_2d", "learning_rates": [3e-4, 1e-3, 3e-3], **AXES},
    {"method": "caspr", "learning_rates": [3e-4, 1e-3, 3e-3], **AXES},
    {"method": "soap", "learning_rates": [3e-4, 1e-3, 3e-3]},
]
for _row in METHODS[2:]:
    _row["optimizer"] = {"name": "SGD"}


def subset(task: Task, train: int, test: int) -> Task:
    """The first images of both parts; both are in random order."""
    return replace(task, train=tuple(part[:train] for part in task.train), test=tuple(part[:test] for part in task.test))


def publish(out: Path, docs: Path) -> None:
    """Copy pictures and numbers of both reports; `docs/make_pages.py` writes what is said of them."""
    for home in sorted(path.parent for path in out.glob("*/report.md")):
        for name, place in (("overview.png", "images/cifar10-{}.png"), ("results.json", "data/cifar10-{}.json")):
            target = docs / place.format(home.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(home / name, target)


def main(
    data_dir: Annotated[Path | None, typer.Option(help="Folder with train.parquet and test.parquet; default: the hub.")] = None,
    out: Annotated[Path, typer.Option(help="Output folder; finished trainings in it are not repeated.")] = Path("runs/cifar10"),
    full: Annotated[bool, typer.Option("--full", help="All images, published widths: for a GPU.")] = False,
    only: Annotated[str | None, typer.Option(help="One of the networks.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Instead of each network's own.")] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of the chosen learning rate.")] = 3,
    publish_to: Annotated[Path | None, typer.Option("--publish", help="Documentation folder.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Compare on each network and, if asked, publish."""
    torch.set_num_threads(threads)
    size = FULL if full else SMALL
    if only is not None and only not in size.networks:
        raise typer.BadParameter(f"{only!r}: legal are {', '.join(size.networks)}", param_hint="--only")
    task = subset(builtin_task("cifar10", data_dir), size.train, size.test)
    for name, model in size.networks.items():
        if only in (None, name):
            compare(
                replace(task, model=model, batch_size=128),
                METHODS,
                budget=epochs or size.epochs[name],
                seeds=seeds,
                out=out / name,
                device=device,
                command="python examples/cifar10.py",
            )
    if publish_to is not None:
        publish(out, publish_to)


if __name__ == "__main__":
    typer.run(main)
