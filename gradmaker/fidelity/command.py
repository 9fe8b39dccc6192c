"""The command `gradmaker fidelity`: on a built-in data set and model, at the start of a training and after it."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, cast

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from gradmaker.compare.data import NAMES, load
from gradmaker.compare.errors import InputError
from gradmaker.compare.models import MODELS, factory
from gradmaker.fidelity.along import fidelity_along
from gradmaker.fidelity.page import write_page
from gradmaker.fidelity.references import REFERENCES, ReferenceName
from gradmaker.fidelity.result import Fidelity
from gradmaker.options.yaml_text import parse_yaml

__all__ = ["fidelity"]

DEFAULTS = (
    ("K-FAC", {"method": "kfac"}),
    ("KFLR", {"method": "kflr"}),
    ("EKFAC", {"method": "ekfac", "fisher": "FisherExact"}),
    ("unit-wise", {"method": "unit_ng", "fisher": "FisherExact"}),
    ("diagonal", {"method": "diag_ng", "fisher": "FisherExact"}),
    ("Shampoo", {"method": "shampoo"}),
)
"""Without arguments: layer-wise approximations of the exact Fisher matrix."""
RATE = 1e-2  # of the Adam that trains


def fidelity(
    methods: Annotated[list[str] | None, typer.Argument(help="Methods, or YAML files. Default: layer-wise ones.")] = None,
    data: Annotated[str, typer.Option(help=f"One of {', '.join(NAMES)}.")] = "digits",
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the data, or set GRADMAKER_DATA.")] = None,
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "mlp",
    hidden: Annotated[list[int] | None, typer.Option(help="Width of a hidden layer; repeat for more. Default: 16.")] = None,
    reference: Annotated[str, typer.Option(help=f"One of {', '.join(REFERENCES)}.")] = "fisher_exact",
    damping: Annotated[float | None, typer.Option(help="Of the exact inverse. Default: that of each approximation.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples in a batch.")] = 128,
    batches: Annotated[int, typer.Option(help="Batches to be measured on.")] = 2,
    seeds: Annotated[int, typer.Option(help="Repetitions of approximations that sample.")] = 1,
    repeats: Annotated[int, typer.Option(help="Measurements of each batch; EKFAC needs two.")] = 2,
    steps: Annotated[list[int] | None, typer.Option(help="A step of the training; repeat. Default: 0 200.")] = None,
    dense_limit: Annotated[int, typer.Option(help="Parameters up to which matrices are dense.")] = 2048,
    probes: Annotated[int, typer.Option(help="Random probes, where they are not.")] = 8,
    iterations: Annotated[int, typer.Option(help="Iterations of CG and Lanczos, where they are not.")] = 20,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: torch's; 1 for digits.")] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder. Default: runs/fidelity-<data>.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars, no table.")] = False,
) -> None:
    """Compare curvature approximations with the curvature itself, layer by layer, and write a report."""
    try:
        if threads is not None or data == "digits":
            torch.set_num_threads(threads or 1)
        loaded = load(data, data_dir)
        torch.manual_seed(0)
        net = factory(model, loaded, hidden or (16,))()
        held = loaded.train_inputs[: batches * batch_size], loaded.train_targets[: batches * batch_size]
        along = fidelity_along(
            net,
            F.mse_loss if loaded.train_targets.is_floating_point() else F.cross_entropy,
            list(zip(held[0].split(batch_size), held[1].split(batch_size), strict=True)),
            _approximations(methods),
            cast("ReferenceName", reference),
            at=(chosen := sorted(set(steps or (0, 200)))),
            damping=damping,
            seeds=seeds,
            repeats=repeats,
            dense_limit=dense_limit,
            probes=probes,
            iterations=iterations,
            line_searches="whole",
            progress=not quiet,
        )
        _train(net, loaded.train_inputs, loaded.train_targets, batch_size, chosen, along)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    folder = out or Path("runs") / f"fidelity-{data}"
    result = along.result
    paths = write_page(result, folder, result.to_json(), shlex.join(["gradmaker", *sys.argv[1:]]))
    if not quiet:
        _tell(result, paths["html"])


def _approximations(methods: Sequence[str] | None) -> list[object]:
    """What the command line names: methods, or YAML files with a mapping or a list."""
    found: list[object] = []
    for name in methods or ():
        if Path(name).suffix not in (".yaml", ".yml"):
            found.append(name)
            continue
        if not Path(name).is_file():
            raise InputError(f"{name}: no such file")
        read = parse_yaml(Path(name).read_text(encoding="utf-8"))
        found += [read] if isinstance(read, dict) else read
    return found or [*DEFAULTS]


def _train(net: nn.Module, inputs: Tensor, targets: Tensor, batch_size: int, steps: Sequence[int], along: object) -> None:
    """Train with Adam, and measure at the chosen steps."""
    assert callable(along)
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    loss = F.cross_entropy if not targets.is_floating_point() else F.mse_loss
    generator = torch.Generator().manual_seed(0)
    for step in range(max(steps) + 1):
        along(step)
        rows = torch.randint(len(inputs), (batch_size,), generator=generator)
        optimizer.zero_grad()
        loss(net(inputs[rows]), targets[rows]).backward()
        optimizer.step()


def _tell(result: Fidelity, report: Path) -> None:
    for step in result.steps:
        typer.echo(f"\nstep {step}\n")
        typer.echo(result.of_step(step).table())
    typer.echo(f"\nreport: {report}")
