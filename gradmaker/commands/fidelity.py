"""`gradmaker fidelity`: approximations of the curvature against the curvature itself, at steps of a training."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, cast

import torch
import typer

from gradmaker.commands.options import (
    Config,
    DataDir,
    DataName,
    Device,
    Hidden,
    Import,
    ModelName,
    Out,
    PrintConfig,
    Quiet,
    TaskPath,
    Threads,
    import_modules,
    prepare,
    task_of,
    threads_of,
)
from gradmaker.commands.settings import as_yaml, check_folder, given_as_data, settings, write_config
from gradmaker.compare.batches.reading import Call
from gradmaker.compare.errors import InputError
from gradmaker.compare.parsing import read_yaml
from gradmaker.compare.problem import Problem, prepare as prepare_task
from gradmaker.fidelity.along import FidelityAlong, fidelity_along
from gradmaker.fidelity.page import write_page
from gradmaker.fidelity.references import REFERENCES, ReferenceName
from gradmaker.fidelity.result import Fidelity

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
SMALL = (16,)  # hidden layers of the built-in model, whose matrices are dense
STEPS = (0, 200)


def fidelity(
    ctx: typer.Context,
    methods: Annotated[
        list[str] | None, typer.Argument(help="Methods, or YAML files of them. Default: layer-wise ones.")
    ] = None,
    task: TaskPath = None,
    data: DataName = "digits",
    data_dir: DataDir = None,
    model: ModelName = None,
    hidden: Hidden = None,
    reference: Annotated[str, typer.Option(help=f"One of {', '.join(REFERENCES)}.")] = "fisher_exact",
    damping: Annotated[float | None, typer.Option(help="Of the exact inverse. Default: that of each approximation.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples in a batch.")] = 128,
    batches: Annotated[int, typer.Option(help="Batches to be measured on.")] = 2,
    seeds: Annotated[int, typer.Option(help="Repetitions of approximations that sample.")] = 1,
    repeats: Annotated[int, typer.Option(help="Measurements of each batch; EKFAC needs two.")] = 2,
    steps: Annotated[
        list[int] | None, typer.Option(help="A step of the training with Adam; repeat. Default: 0 and 200.")
    ] = None,
    dense_limit: Annotated[int, typer.Option(help="Parameters up to which matrices are dense.")] = 2048,
    probes: Annotated[int, typer.Option(help="Random probes, where they are not.")] = 8,
    iterations: Annotated[int, typer.Option(help="Iterations of CG and Lanczos, where they are not.")] = 20,
    out: Out = None,
    device: Device = "cpu",
    threads: Threads = None,
    modules: Import = None,
    config: Config = None,
    print_config: PrintConfig = False,
    quiet: Quiet = False,
) -> None:
    """Compare curvature approximations with the curvature itself, layer by layer, and write a report.

    Without arguments: layer-wise approximations of the exact Fisher matrix of a small network on scikit-learn's digits, before
    and after a training, in less than two minutes. The report is runs/fidelity-<task>/report.html.

    \b
    gradmaker fidelity kfac ekfac shampoo --steps 0 --steps 1000
    gradmaker fidelity kfac kflr --task my_module:make_task --reference hessian
    """  # noqa: D301 - the \b keeps the lines of the paragraph apart
    import_modules(modules or ())
    prepare(device, threads_of(data, task, threads))
    entries = given_as_data(ctx, "methods", methods)
    made = task_of(task, data, data_dir, model, hidden or (None if task or model else SMALL))
    chosen, folder = sorted(set(steps or STEPS)), out or Path("runs") / f"fidelity-{made.name}"
    whole = settings(ctx, methods=entries, steps=chosen, out=folder)
    if print_config:
        return typer.echo(as_yaml(whole), nl=False)
    check_folder(folder)
    problem = prepare_task(made, device)
    network, calls = problem.initial_model(0), problem.first_calls(batch_size, batches)
    if len(calls) < batches:
        typer.echo(
            f"an epoch of the data has {len(calls)} of {batches} batches of {batch_size}: these are measured on", err=True
        )
    try:
        along = fidelity_along(
            network,
            problem.loss,
            [_pair(call) for call in calls],
            _approximations(entries),
            cast("ReferenceName", reference),
            at=chosen,
            damping=damping,
            seeds=seeds,
            repeats=repeats,
            dense_limit=dense_limit,
            probes=probes,
            iterations=iterations,
            line_searches="whole",
            progress=not quiet,
        )
        _train(network, problem, batch_size, chosen[-1], along)
    except ValueError as error:
        raise InputError(" ".join(str(error).split())) from error
    result = along.result
    write_config(whole, folder)
    paths = write_page(result, folder, result.to_json(), shlex.join(["gradmaker", *sys.argv[1:]]))
    if not quiet:
        _tell(result, paths["html"])


def _pair(call: Call) -> tuple[object, object]:
    """Inputs and targets of a call."""
    return (dict(call.kwargs) if call.kwargs else call.args), call.targets


def _approximations(methods: Sequence[object] | None) -> list[object]:
    """Names, mappings, and what YAML files have of these; without any, the default."""
    found: list[object] = []
    for entry in methods or ():
        read = read_yaml(Path(entry)) if isinstance(entry, str) and entry.endswith((".yaml", ".yml")) else entry
        found += read if isinstance(read, list) else [read]
    return found or [*DEFAULTS]


def _train(network: torch.nn.Module, problem: Problem, batch_size: int, last: int, along: FidelityAlong) -> None:
    """Train with Adam, and measure at the chosen steps."""
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    step, epoch = 0, 1
    while True:
        for call in problem.calls(batch_size, 0, epoch):
            along(step)
            if step >= last:
                return
            optimizer.zero_grad()
            problem.loss(call.outputs(network), call.targets).backward()
            optimizer.step()
            step += 1
        epoch += 1


def _tell(result: Fidelity, report: Path) -> None:
    for step in result.steps:
        typer.echo(f"\nstep {step}\n")
        typer.echo(result.of_step(step).table())
    typer.echo(f"\nreport: {report}")
