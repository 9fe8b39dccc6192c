"""Layer-wise approximations against the exact Fisher matrix on four tasks: at initialisation, mid-training, and the end.

    GRADMAKER_DATA=folder python examples/fidelity_gallery.py mnist
    GRADMAKER_DATA=folder python examples/fidelity_gallery.py cifar10 shakespeare tagger --steps 300

Each task is a piece of its own: the measures at three steps of a training with Adam, then a short training with each
approximation at the best of three learning rates, and the rank correlation of fidelity with learning. Written are
``<out>/<task>/report.html`` with its figures, ``fidelity.json`` and ``learning.json``. The folder of the data holds ``mnist/``,
``cifar10/``, ``tinyshakespeare/``, ``ud_english_ewt/``, as those of the other examples.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import networks
import torch
import torch.nn.functional as F
import typer
from char_gpt.text import batch as text_batch, read_text
from torch import Tensor, nn
from ud_tagger.model import Tagger
from ud_tagger.setting import Setting
from ud_tagger.treebank import IGNORED, batches as sentences, read_treebank

from gradmaker import Fidelity, fidelity_along, from_config
from gradmaker.compare.data import load
from gradmaker.compare.models import mlp

EXACT = {"fisher": "FisherExact"}
SQUARED = {"KronDims": {"exponent": 1.0, "balanced": True}}
APPROXIMATIONS: dict[str, dict[str, Any]] = {
    "K-FAC": {"method": "kfac"},
    "KFLR": {"method": "kflr"},
    "EKFAC": {"method": "ekfac", **EXACT},
    "unit-wise": {"method": "unit_ng", **EXACT},
    "TNT": {"method": "tnt"},
    "Shampoo": {"method": "shampoo"},
    "Shampoo^2": {
        **{"method": "custom", "curvature": "BatchGradient", "representation": SQUARED},
        **{"solver": {"Eigh": {"power": -0.5, "damping": 1e-8}}, "grafting": "keep"},
    },
    "diagonal": {"method": "diag_ng", **EXACT},
}
RATES = {"Shampoo": (0.01, 0.03, 0.1), "Shampoo^2": (0.01, 0.03, 0.1), "TNT": (0.01, 0.03, 0.1)}
RATE = (0.001, 0.01, 0.03)
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A model, its loss, its stream of batches, and the batches on which curvature is measured."""

    make: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    stream: Callable[[int], Iterator[Batch]]
    measured: list[Batch]


def images(name: str, make: Callable[[Any], nn.Module], size: int, count: int) -> Task:
    """A classifier of images."""
    data = load(name)

    def stream(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            rows = torch.randint(len(data.train_inputs), (size,), generator=generator)
            yield data.train_inputs[rows], data.train_targets[rows]

    held = stream(-1)
    return Task(lambda: make(data), F.cross_entropy, stream, [next(held) for _ in range(count)])


def by_token(z: Tensor, t: Tensor) -> Tensor:
    """The mean cross entropy of all tokens but the ignored."""
    return F.cross_entropy(z.flatten(0, 1), t.flatten(), ignore_index=IGNORED)


def mnist(count: int) -> Task:
    """A network 784-32-10."""
    return images("mnist", lambda data: mlp(data, (32,)), 64, count)


def cifar10(count: int) -> Task:
    """ResNet-18 with 8 channels in the first stage; its batch norms couple the examples of a batch."""
    return images("cifar10", lambda data: networks.resnet18(8), 32, count)


def shakespeare(count: int) -> Task:
    """A GPT with two layers of 48."""
    text = read_text(Path(os.environ["GRADMAKER_DATA"]))

    def stream(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield text_batch(text.train, 16, 32, generator)

    held = stream(-1)
    vocabulary = len(text.characters)
    return Task(lambda: networks.GPT(48, 2, 4, vocabulary, 32), by_token, stream, [next(held) for _ in range(count)])


def tagger(count: int) -> Task:
    """The tagger on a twentieth of UD English EWT."""
    setting = Setting(width=32, hidden=64, layers=2, heads=4, fraction=0.05, dropout=0.0)
    bank = read_treebank(setting, Path(os.environ["GRADMAKER_DATA"]))

    def stream(seed: int) -> Iterator[Batch]:
        return sentences(bank.parts["train"], 16, seed)

    held = stream(-1)
    return Task(lambda: Tagger(setting, bank.words, bank.tags), by_token, stream, [next(held) for _ in range(count)])


TASKS: dict[str, Callable[[int], Task]] = {"mnist": mnist, "cifar10": cifar10, "shakespeare": shakespeare, "tagger": tagger}


def fidelities(task: Task, steps: int, iterations: int) -> Fidelity:
    """The measures at the start, in the middle and at the end of a training with Adam."""
    torch.manual_seed(0)
    model, stream = task.make(), task.stream(0)
    at = (0, steps // 2, steps)
    options: dict[str, Any] = {"repeats": 2, "iterations": iterations, "damping": 1e-3, "progress": True}
    along = fidelity_along(model, task.loss, task.measured, APPROXIMATIONS, at=at, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps + 1):
        along(step)
        x, t = next(stream)
        optimizer.zero_grad()
        task.loss(model(x), t).backward()
        optimizer.step()
    return along.result


def learning(task: Task, steps: int) -> dict[str, float]:
    """The mean loss of the last tenth of a short training with each approximation, at the best of its rates."""
    found = {}
    for label, config in APPROXIMATIONS.items():
        losses = [trained(task, config, rate, steps) for rate in RATES.get(label, RATE)]
        found[label] = min(losses)
    return found


def trained(task: Task, config: dict[str, Any], rate: float, steps: int) -> float:
    """The loss at the end of a training with one method."""
    torch.manual_seed(0)
    model, stream, last = task.make(), task.stream(0), list[float]()
    maker, optimizer = from_config(model, config), torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(steps):
        x, t = next(stream)
        maker.setup_loss_call(task.loss, maker.setup_model_call(model, x), t)
        optimizer.zero_grad()
        last.append(float(maker.forward_and_backward()[1]))
        optimizer.step()
    ended = last[-max(1, steps // 10) :]
    value = sum(ended) / len(ended)
    return value if value == value else float("inf")


def ranks(values: list[float]) -> Tensor:
    """The place of each value in their order."""
    return torch.tensor(values, dtype=torch.float64).argsort().argsort().double()


def correlation(a: list[float], b: list[float]) -> float:
    """Spearman's rank correlation."""
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def main(
    tasks: Annotated[list[str], typer.Argument(help=f"of {', '.join(TASKS)}")],
    steps: Annotated[int, typer.Option(help="steps of the training with Adam")] = 200,
    short: Annotated[int, typer.Option(help="steps of the trainings with the approximations")] = 100,
    iterations: Annotated[int, typer.Option(help="of CG and Lanczos")] = 20,
    batches: Annotated[int, typer.Option(help="batches to be measured on")] = 2,
    out: Annotated[Path, typer.Option(help="folder of the results")] = Path("docs/fidelity_gallery"),
) -> None:
    """Measure, train, correlate, and write a folder for each task."""
    for name in tasks:
        started = time.process_time()
        task = TASKS[name](batches)
        result = fidelities(task, steps, iterations)
        result.write(out / name)
        ends = learning(task, short)
        known = [k for k in ends if result.mean(k, "error_scaled", step=0)]
        loss = [ends[k] for k in known]
        told = {
            "steps": short,
            "loss": ends,
            "rank correlation with the loss": {
                m: correlation([result.value(k, m, step=0) for k in known], loss)
                for m in ("error_scaled", "cosine", "quadratic", "decrease")
            },
            "processor seconds": time.process_time() - started,
        }
        (out / name / "learning.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(told, indent=1))


if __name__ == "__main__":
    typer.run(main)
