"""Layer-wise approximations against the exact Fisher matrix on four tasks: at initialisation, mid-training, and the end.

    GRADMAKER_DATA=folder python examples/fidelity_gallery.py mnist
    GRADMAKER_DATA=folder python examples/fidelity_gallery.py cifar10 shakespeare tagger --steps 300

Each task is a piece of its own: the measures at three steps of a training with Adam, then a short training with each
approximation at its best learning rate (by factors of three until the neighbours on both sides are worse), and the rank
correlation of fidelity with learning. Written are ``<out>/<task>/report.html`` with its figures, ``fidelity.json`` and
``learning.json``; ``--reuse`` takes the ``fidelity.json`` that is there. The folder of the data holds ``mnist/``, ``cifar10/``,
``tinyshakespeare/``, ``ud_english_ewt/``, as those of the other examples.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import permutations
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

EXACT, SAMPLED = {"fisher": "FisherExact"}, {"fisher": {"FisherMC": {"samples": 16}}}
SQUARED = {"KronDims": {"exponent": 1.0, "balanced": True}}


def approximations(many: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All layer-wise ones.  many: the targets of those that do not sample one, `SAMPLED` where all are too many."""
    kflr = {"KFLR": {"method": "kflr"}} if many is EXACT else {"K-FAC, 16 targets": {"method": "kfac", **many}}
    return {
        "K-FAC": {"method": "kfac"},
        **kflr,
        "EKFAC": {"method": "ekfac", **many},
        "unit-wise": {"method": "unit_ng", **many},
        "TNT": {"method": "tnt"},
        "Shampoo": {"method": "shampoo"},
        "Shampoo^2": {
            **{"method": "custom", "curvature": "BatchGradient", "representation": SQUARED},
            **{"solver": {"Eigh": {"power": -0.5, "damping": 1e-8}}, "grafting": "keep"},
        },
        "diagonal": {"method": "diag_ng", **many},
    }


FIRST = {"Shampoo": 0.03, "Shampoo^2": 0.03, "TNT": 0.03}
"""Where the search for a learning rate begins; 0.01 for the others."""
MEASURES = ("error_scaled", "cosine", "quadratic", "decrease")
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A model, its loss, its stream of batches, and the batches on which curvature is measured."""

    make: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    stream: Callable[[int], Iterator[Batch]]
    measured: list[Batch]
    targets: dict[str, Any] = field(default_factory=lambda: EXACT)

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """The approximations."""
        return approximations(self.targets)


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


def mnist(count: int, size: int = 64) -> Task:
    """A network 784-32-10."""
    return images("mnist", lambda data: mlp(data, (32,)), size, count)


def cifar10(count: int, size: int = 32) -> Task:
    """ResNet-18 with 4 channels in the first stage; its batch norms couple the examples of a batch."""
    return images("cifar10", lambda data: networks.resnet18(4), size, count)


def shakespeare(count: int, size: int = 16) -> Task:
    """A GPT with two layers of 48."""
    text = read_text(Path(os.environ["GRADMAKER_DATA"]))

    def stream(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield text_batch(text.train, size, 32, generator)

    held = stream(-1)
    vocabulary = len(text.characters)
    return Task(lambda: networks.GPT(48, 2, 4, vocabulary, 32), by_token, stream, [next(held) for _ in range(count)], SAMPLED)


def tagger(count: int, size: int = 16) -> Task:
    """The tagger on a twentieth of UD English EWT; words rarer than eight are one unknown word, sentences end at 24."""
    setting = Setting(width=32, hidden=64, layers=2, heads=4, fraction=0.05, dropout=0.0, least=8, length=24)
    bank = read_treebank(setting, Path(os.environ["GRADMAKER_DATA"]))

    def stream(seed: int) -> Iterator[Batch]:
        return sentences(bank.parts["train"], size, seed)

    held = stream(-1)
    return Task(lambda: Tagger(setting, bank.words, bank.tags), by_token, stream, [next(held) for _ in range(count)], SAMPLED)


TASKS: dict[str, Callable[..., Task]] = {"mnist": mnist, "cifar10": cifar10, "shakespeare": shakespeare, "tagger": tagger}


def fidelities(task: Task, steps: int, iterations: int, probes: int) -> Fidelity:
    """The measures at the start, in the middle and at the end of a training with Adam."""
    torch.manual_seed(0)
    model, stream = task.make(), task.stream(0)
    at = (0, steps // 2, steps)
    options: dict[str, Any] = {"repeats": 2, "iterations": iterations, "probes": probes, "damping": 1e-3, "progress": True}
    along = fidelity_along(model, task.loss, task.measured, task.rows, at=at, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps + 1):
        along(step)
        x, t = next(stream)
        optimizer.zero_grad()
        task.loss(model(x), t).backward()
        optimizer.step()
    return along.result


def searched(task: Task, label: str, steps: int, trials: int) -> dict[float, float]:
    """The loss at the end by learning rate: by factors of three, until the best has worse neighbours, of at most ``trials``."""
    found, next_rate = dict[float, float](), FIRST.get(label, 0.01)
    while len(found) < trials:
        found[next_rate] = trained(task, task.rows[label], next_rate, steps)
        best = min(found, key=lambda rate: found[rate])
        untried = [rate for rate in (best * 3, best / 3) if not any(math.isclose(rate, known) for known in found)]
        if not untried:
            break
        next_rate = untried[0]
    return dict(sorted(found.items()))


def trained(task: Task, config: dict[str, Any], rate: float, steps: int) -> float:
    """The mean loss of the last fifth of a training with one method; infinite where it diverged."""
    torch.manual_seed(0)
    model, stream, last = task.make(), task.stream(0), list[float]()
    maker, optimizer = from_config(model, config), torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(steps):
        x, t = next(stream)
        maker.setup_loss_call(task.loss, maker.setup_model_call(model, x), t)
        optimizer.zero_grad()
        last.append(float(maker.forward_and_backward()[1]))
        if not last[-1] < 3 * last[0]:
            return math.inf
        optimizer.step()
    ended = last[-max(1, steps // 5) :]
    return sum(ended) / len(ended)


def ranks(values: list[float]) -> Tensor:
    """The place of each value in their order; equal ones share the mean of their places."""
    return torch.tensor([sum((b < a) + 0.5 * (b == a) for b in values) for a in values], dtype=torch.float64)


def correlation(a: list[float], b: list[float]) -> dict[str, float]:
    """Spearman's rank correlation, its number of points, and the share of all orders with one as large in absolute value."""
    x, y = (r - r.mean() for r in (ranks(a), ranks(b)))
    size = (x.norm() * y.norm()).clamp(min=1e-300)
    rho = float(x @ y / size)
    orders = torch.tensor(list(permutations(range(len(a)))))
    p = float(((y[orders] @ x / size).abs() >= abs(rho) - 1e-12).double().mean())
    return {"rho": rho, "points": len(a), "p": p}


def correlations(result: Fidelity, ends: dict[str, float]) -> dict[str, dict[str, dict[str, float]]]:
    """Of each measure at each step with the loss at the end."""
    return {
        str(step): {
            m: correlation([result.value(k, m, step=step) for k in ends], list(ends.values()))
            for m in MEASURES
            if all(result.mean(k, m, step=step) for k in ends)
        }
        for step in result.steps
    }


def main(
    tasks: Annotated[list[str], typer.Argument(help=f"of {', '.join(TASKS)}")],
    steps: Annotated[int, typer.Option(help="steps of the training with Adam")] = 200,
    short: Annotated[int, typer.Option(help="steps of the trainings with the approximations; 0: none of them")] = 100,
    trials: Annotated[int, typer.Option(help="learning rates of each at most")] = 6,
    iterations: Annotated[int, typer.Option(help="of CG and Lanczos")] = 20,
    probes: Annotated[int, typer.Option(help="for norms")] = 8,
    batches: Annotated[int, typer.Option(help="batches to be measured on")] = 2,
    size: Annotated[int | None, typer.Option(help="examples of a batch; default: that of the task")] = None,
    reuse: Annotated[bool, typer.Option(help="take the measures that are in the folder")] = False,
    out: Annotated[Path, typer.Option(help="folder of the results")] = Path("docs/fidelity_gallery"),
) -> None:
    """Measure, train, correlate, and write a folder for each task."""
    for name in tasks:
        started = time.process_time()
        task, saved = TASKS[name](batches, **({} if size is None else {"size": size})), out / name / "fidelity.json"
        result = Fidelity.from_json(saved) if reuse else fidelities(task, steps, iterations, probes)
        if not reuse:
            result.write(out / name)
        measured = time.process_time()
        print(f"{name}: {measured - started:.0f} processor seconds for the measures", flush=True)
        if not short:
            continue
        losses = {label: searched(task, label, short, trials) for label in task.rows}
        ends = {label: min(found.values()) for label, found in losses.items()}
        told = {
            "steps": short,
            "loss": ends,
            "loss by learning rate": {k: {f"{rate:.2g}": v for rate, v in found.items()} for k, found in losses.items()},
            "at an end of the grid": [k for k, found in losses.items() if ends[k] in (*found.values(),)[:: len(found) - 1]],
            "correlation": correlations(result, ends),
            "processor seconds": {"measures": measured - started, "trainings": time.process_time() - measured},
        }
        (out / name / "learning.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(told, indent=1))


if __name__ == "__main__":
    typer.run(main)
