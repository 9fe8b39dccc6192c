"""The deep autoencoder of MNIST: training error in equal time of SGD, Adam and second-order methods, all tuned alike.

    python examples/mnist_autoencoder.py                      from the hub, into runs/autoencoder; resumes what is there
    python examples/mnist_autoencoder.py --data-dir mnist     from a local folder with train.parquet and test.parquet
    python examples/mnist_autoencoder.py --width full --images 60000 --limit 3600      as published

The network is 784-1000-500-250-30 and its mirror image (Hinton & Salakhutdinov, Science 2006), by default a quarter as wide:
logistic units, a linear code, sparse initialisation (Martens, ICML 2010), cross-entropy summed over pixels and averaged over
images. The error is the squared error of an image, summed over pixels and averaged over the training images.

Time is CPU time of the process, of training steps alone, with one thread: the wall time of a machine with nothing else to do.
``docs/make_autoencoder.py --take runs/autoencoder`` writes page and picture.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from gradmaker import from_config
from gradmaker.compare.cost import machine
from gradmaker.compare.data import load
from gradmaker.trust_region.policy import clip_factor

WIDTHS = {"full": (1000, 500, 250, 30), "quarter": (250, 125, 62, 30)}
SPARSE = 15  # incoming weights of a unit that are not zero at first
POINTS = 24  # evaluations of a training
SEARCH = 0  # the seed that chooses settings; fresh ones are reported

Config = dict[str, Any]
"""batch, lr, optimizer with its options, method (a mapping for `from_config`; absent: the plain gradient), decay; clip:
bound of ``g . P g``, K-FAC's KL clip for what has none of its own; for a plain gradient, of its squared norm."""


# ------------------------------------------------------------------ settings that are tried
def sgd(batch: int, lr: float, momentum: float, **options: Any) -> Config:
    """Nesterov's momentum."""
    return {"batch": batch, "lr": lr, "optimizer": ["SGD", {"momentum": momentum, "nesterov": True}], "decay": 0.5, **options}


def adam(batch: int, lr: float, beta2: float = 0.999) -> Config:
    """torch's Adam."""
    return {"batch": batch, "lr": lr, "optimizer": ["Adam", {"betas": [0.9, beta2]}], "decay": 0.5}


def kfac(batch: int, damping: float, clip: float, **options: Any) -> Config:
    """K-FAC with momentum and a KL clip, which takes the place of a learning rate."""
    method = {"method": "kfac", "damping": damping, "clip": clip, "clip_learning_rate": 1.0, "warmup_steps": 10}
    method |= {"curvature_interval": 10, "preconditioner_interval": 20, **options}
    return {"batch": batch, "lr": 1.0, "optimizer": ["SGD", {"momentum": 0.9}], "method": method, "decay": 0.5}


def kbfgs(batch: int, damping: float, clip: float, **options: Any) -> Config:
    """K-BFGS with the same momentum and clip as K-FAC."""
    method = {"method": "kbfgs", "damping": damping, "beta1": 0.0, "curvature_interval": 10, **options}
    return {"batch": batch, "lr": 1.0, "optimizer": ["SGD", {"momentum": 0.9}], "method": method, "clip": clip, "decay": 0.5}


def hessian_free(batch: int, damping: float, cg: int, examples: int | None = None, **options: Any) -> Config:
    """Hessian-free optimization, with products on some of the batch; its damping adapts itself, and its steps are whole."""
    method = {"method": "hessian_free", "damping": damping, "iterations": cg, "curvature_examples": examples, **options}
    return {"batch": batch, "lr": 1.0, "optimizer": ["SGD", {}], "method": method, "decay": 0.5}


ROWS: dict[str, list[Config]] = {
    "sgd": [sgd(100, lr, 0.9, clip=100.0) for lr in (0.02, 0.01, 0.04)]
    + [sgd(100, 0.01, 0.95, clip=100.0), sgd(100, 0.005, 0.95), sgd(50, 0.01, 0.9, clip=100.0)]
    + [sgd(50, 0.005, 0.9), sgd(200, 0.04, 0.9, clip=100.0)],
    "adam": [adam(100, lr) for lr in (0.008, 0.004, 0.016)]
    + [adam(200, 0.008), adam(50, 0.004), adam(100, 0.008, 0.99), adam(200, 0.016), adam(50, 0.002)],
    "kfac": [kfac(500, damping, 0.1) for damping in (0.03, 0.1, 0.01)]
    + [kfac(500, 0.03, 0.2), kfac(250, 0.03, 0.03), kfac(1000, 0.03, 0.3), kfac(500, 0.05, 0.2), kfac(250, 0.03, 0.1)],
    "kbfgs": [kbfgs(500, 0.03, clip, secant_decay=0.5) for clip in (0.2, 0.3, 0.1)]
    + [kbfgs(500, 0.1, 0.2, secant_decay=0.5), kbfgs(250, 0.03, 0.1, secant_decay=0.5)]
    + [kbfgs(500, 0.03, 0.2, secant_decay=0.5, curvature_interval=5)]
    + [kbfgs(500, 0.03, 0.2, secant_decay=0.0), kbfgs(500, 0.03, 0.2)],
    "hessian_free": [hessian_free(1000, damping, 8, factors=True) for damping in (0.01, 1.0)]
    + [hessian_free(1000, 0.01, cg, factors=True) for cg in (5, 12)]
    + [hessian_free(2000, 0.01, 8, factors=True), hessian_free(500, 0.01, 6, factors=True)]
    + [hessian_free(1000, 0.01, 8, factors=True, adapt=False), hessian_free(1000, 1.0, 20, squares="batch")],
}
"""By row. Those without a method are the baselines."""


# ------------------------------------------------------------------ the task
def autoencoder(widths: tuple[int, ...], pixels: int = 784) -> nn.Sequential:
    """Logistic units; code and output are linear, the output being the logits of pixels."""
    sizes = [pixels, *widths, *reversed(widths[:-1]), pixels]
    layers: list[nn.Module] = []
    for k, (i, o) in enumerate(pairwise(sizes), 1):
        layers += [nn.Linear(i, o)] if k in (len(widths), len(sizes) - 1) else [nn.Linear(i, o), nn.Sigmoid()]
    return nn.Sequential(*layers)


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Every unit has ``SPARSE`` incoming weights from N(0, 1) and a zero bias (Martens 2010, section 5)."""
    generator = torch.Generator().manual_seed(seed)
    for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
        count = min(SPARSE, layer.in_features)
        rows = [torch.randperm(layer.in_features, generator=generator)[:count] for _ in range(layer.out_features)]
        values = torch.randn(layer.out_features, count, generator=generator)
        layer.weight.zero_().scatter_(1, torch.stack(rows), values)
        layer.bias.zero_()


def cross_entropy(logits: Tensor, pixels: Tensor) -> Tensor:
    """Summed over pixels, averaged over images."""
    return F.binary_cross_entropy_with_logits(logits, pixels, reduction="sum") / len(pixels)


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor) -> tuple[float, float]:
    """Squared error and cross-entropy of an image, in chunks of 5000."""
    totals = torch.zeros(2, dtype=torch.float64)
    for x in images.split(5000):
        z = model(x)
        totals += torch.stack([(z.sigmoid() - x).square().sum(), cross_entropy(z, x) * len(x)]).double()
    error, loss = (totals / len(images)).tolist()
    return error, loss


def pixels(name: str, data_dir: Path | None, count: int) -> tuple[Tensor, Tensor]:
    """Training images, the first ``count``, and test images, as rows in [0, 1]."""
    data = load(name, data_dir)
    low, high = data.train_inputs.min(), data.train_inputs.max()  # of standardised pixels, which were 0 and 1
    train, test = (((x - low) / (high - low)).flatten(1).clamp(0, 1) for x in (data.train_inputs, data.test_inputs))
    return train[:count].contiguous(), test


# ------------------------------------------------------------------ one training
def batches(images: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Epoch after epoch in a new order, without the rest of an epoch."""
    generator = torch.Generator().manual_seed(1000 + seed)
    while True:
        for rows in torch.randperm(len(images), generator=generator).split(size):
            if len(rows) == min(size, len(images)):
                yield images[rows]


def stepper(model: nn.Module, config: Config) -> tuple[Callable[[Tensor], None], torch.optim.Optimizer]:
    """What makes a step on a batch, and the optimizer."""
    name, options = config["optimizer"]
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=config["lr"], **options)
    gradient = plain(model) if "method" not in config else preconditioned(model, config["method"])

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        raw, solved = gradient(x, "clip" in config)
        if "clip" in config:
            factor = clip_factor(raw, solved, config["clip"], 1.0)
            for value in solved:
                value.mul_(factor)
        optimizer.step()

    return step, optimizer


Gradients = tuple[list[Tensor], list[Tensor]]
"""Before and after a maker; the former copied, if they are asked for."""


def plain(model: nn.Module) -> Callable[[Tensor, bool], Gradients]:
    """``.grad`` as it comes."""
    parameters = list(model.parameters())

    def gradient(x: Tensor, both: bool) -> Gradients:
        cross_entropy(model(x), x).backward()
        found = [p.grad for p in parameters if p.grad is not None]
        return found, found

    return gradient


def preconditioned(model: nn.Module, method: dict[str, Any]) -> Callable[[Tensor, bool], Gradients]:
    """``.grad`` by a maker."""
    maker, parameters = from_config(model, method), list(model.parameters())

    def gradient(x: Tensor, both: bool) -> Gradients:
        maker.setup_loss_call(cross_entropy, maker.setup_model_call(model, x), x)
        maker.accumulate()
        raw = [p.grad.clone() for p in parameters if p.grad is not None] if both else []
        maker.precondition()
        return raw, [p.grad for p in parameters if p.grad is not None]

    return gradient


def rate(config: Config, share: float) -> float:
    """The learning rate when this share of the time is over: constant, then linear to zero over the last ``decay`` of it."""
    decay = config.get("decay", 0.0)
    return float(config["lr"] * (min(1.0, (1 - share) / decay) if decay else 1.0))


def train(model: nn.Module, images: Tensor, config: Config, seed: int, limit: float) -> dict[str, Any]:
    """Train for ``limit`` seconds of CPU time; evaluations are outside of the clock.

    Returns seconds, steps, epochs, and the curve: seconds, steps, squared error and cross-entropy of training images.
    """
    initialise(model, seed)
    begun = time.process_time()
    step, optimizer = stepper(model, config)
    supply = batches(images, config["batch"], seed)
    spent, last, steps, curve = time.process_time() - begun, 0.0, 0, [(0.0, 0, *evaluate(model, images))]
    while len(curve) <= POINTS and math.isfinite(curve[-1][2]):
        due = limit * len(curve) / POINTS
        begun = time.process_time() - spent
        while spent < due and spent + last <= limit:  # a step that is not over in time does not count
            for group in optimizer.param_groups:
                group["lr"] = rate(config, spent / limit)
            step(next(supply))
            steps += 1
            before, spent = spent, time.process_time() - begun
            last = spent - before
        curve.append((spent, steps, *evaluate(model, images)))
    return {"seconds": spent, "steps": steps, "epochs": steps * config["batch"] / len(images), "curve": curve}


# ------------------------------------------------------------------ all trainings
class Store:
    """``results.json``: every finished training, written at once, read again by a run that resumes."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = folder / "results.json", settings
        folder.mkdir(parents=True, exist_ok=True)
        found = json.loads(self.path.read_text()) if self.path.exists() else {"settings": settings, "trials": []}
        if found["settings"] != settings:
            raise typer.BadParameter(f"{self.path} holds trainings of {found['settings']}: choose another --out")
        self.trials: list[dict[str, Any]] = found["trials"]

    def find(self, row: str, config: Config, seed: int) -> dict[str, Any] | None:
        """The training, if it was finished."""
        return next((t for t in self.trials if (t["row"], t["config"], t["seed"]) == (row, config, seed)), None)

    def add(self, trial: dict[str, Any]) -> None:
        """Replace the file in one step."""
        self.trials.append(trial)
        fresh = self.path.with_suffix(".new")
        content = {"settings": self.settings, "machine": machine(torch.device("cpu")), "trials": self.trials}
        fresh.write_text(json.dumps(content))
        os.replace(fresh, self.path)


def final(trial: dict[str, Any]) -> float:
    """The training error at the time limit; infinite if it is not a number."""
    error = float(trial["curve"][-1][2])
    return error if math.isfinite(error) else math.inf


def chosen(trials: Sequence[dict[str, Any]], row: str) -> Config:
    """The settings of a row that had the lowest training error in the search."""
    config: Config = min((t for t in trials if t["row"] == row and t["seed"] == SEARCH), key=final)["config"]
    return config


def run(store: Store, rows: Sequence[str], train_test: tuple[Tensor, Tensor], seeds: int) -> None:
    """All trainings that are not there yet, one row after the other for each setting and for each seed."""
    images, test = train_test
    searches = [(r, ROWS[r][k], SEARCH) for k in range(max(len(ROWS[r]) for r in rows)) for r in rows if k < len(ROWS[r])]

    def once(row: str, config: Config, seed: int) -> None:
        if store.find(row, config, seed) is None:
            model = autoencoder(WIDTHS[store.settings["width"]], images.shape[1])
            done = train(model, images, config, seed, store.settings["limit"])
            store.add({"row": row, "config": config, "seed": seed, "test": evaluate(model, test)[0], **done})
            print(f"{row} seed {seed}: {done['curve'][-1][2]:.3f}, {done['steps']} steps, {json.dumps(config)}", flush=True)

    for search in searches:
        once(*search)
    for seed in range(SEARCH + 1, SEARCH + 1 + seeds):
        for row in rows:
            once(row, chosen(store.trials, row), seed)


def main(
    data_dir: Annotated[Path | None, typer.Option(help="Folder with train.parquet and test.parquet; default: the hub.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of results.json; what it holds is not repeated.")] = Path(
        "runs/autoencoder"
    ),
    rows: Annotated[str, typer.Option(help="Names, separated by commas.")] = ",".join(ROWS),
    width: Annotated[str, typer.Option(help=" or ".join(WIDTHS))] = "quarter",
    images: Annotated[int, typer.Option(min=1, help="Training images: the first so many.")] = 10000,
    limit: Annotated[float, typer.Option(min=0.01, help="Seconds of each training.")] = 60.0,
    seeds: Annotated[int, typer.Option(min=1, help="Fresh seeds for the chosen settings.")] = 3,
) -> None:
    """Search with one seed, then train the best settings of each row with fresh ones."""
    torch.set_num_threads(1)
    names = rows.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        raise typer.BadParameter(f"--rows: {', '.join(unknown)}; legal are {', '.join(ROWS)}")
    if width not in WIDTHS:
        raise typer.BadParameter(f"--width {width}: legal are {', '.join(WIDTHS)}")
    store = Store(out, {"width": width, "images": images, "limit": limit})
    run(store, names, pixels("mnist", data_dir, images), seeds)


if __name__ == "__main__":
    typer.run(main)
