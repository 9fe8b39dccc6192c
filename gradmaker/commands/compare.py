"""`gradmaker compare`: learning curves, accuracy, time and memory of several methods."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

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
from gradmaker.commands.settings import as_yaml, given_as_data, settings, write_config
from gradmaker.compare.comparison import compare as run_comparison
from gradmaker.compare.result import Comparison
from gradmaker.options.registry import METHODS

__all__ = ["compare"]

ORDER = ("kfac", "shampoo")  # default rows after SGD and Adam, where they are registered
TRAINED = "finished"


def compare(
    ctx: typer.Context,
    methods: Annotated[
        list[str] | None,
        typer.Argument(help="Methods, torch optimizers or YAML files of them. Default: sgd adam kfac shampoo."),
    ] = None,
    task: TaskPath = None,
    data: DataName = "digits",
    data_dir: DataDir = None,
    model: ModelName = None,
    hidden: Hidden = None,
    budget: Annotated[
        str | None, typer.Option(help="Length of every training: '20 epochs', '500 steps', '60 seconds'. Default: the task's.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="The same in epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples per step. Default: the task's.")] = None,
    seeds: Annotated[int, typer.Option(help="Trainings at the selected options.")] = 3,
    lr: Annotated[list[float] | None, typer.Option(help="A learning rate of the grid; repeat for more.")] = None,
    tuning: Annotated[
        str | None, typer.Option(help="How options are searched: grid, random, optuna, or a YAML file. Default: grid.")
    ] = None,
    vary_batch_size: Annotated[
        list[int] | None, typer.Option(help="Train with this batch size, too, all else as selected; repeat for more.")
    ] = None,
    vary_interval: Annotated[
        list[int] | None, typer.Option(help="Train with this interval of measurements and refreshes, too; repeat for more.")
    ] = None,
    target: Annotated[float | None, typer.Option(help="Value of the metric for steps and seconds to a target.")] = None,
    momentum: Annotated[
        float | None, typer.Option(help="Momentum of the SGD optimizer, in the rows sgd, gradient and shampoo. Default: 0.9.")
    ] = None,
    schedule: Annotated[str, typer.Option(help="Learning rate over time: constant, linear or cosine.")] = "cosine",
    validation: Annotated[float, typer.Option(help="Share of the training data that selects, where the task has none.")] = 0.1,
    workers: Annotated[int, typer.Option(help="Processes that train at the same time; 0: as many as there are cores.")] = 1,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard event files, too.")] = False,
    out: Out = None,
    device: Device = "cpu",
    threads: Threads = None,
    modules: Import = None,
    config: Config = None,
    print_config: PrintConfig = False,
    quiet: Quiet = False,
) -> None:
    """Train methods from the same parameters, choose the options of each on validation data, and write a report.

    Without arguments: SGD, Adam, K-FAC and Shampoo on scikit-learn's digits, in less than two minutes. The report is
    runs/<task>/report.html. A run that was interrupted goes on where it stopped when it is started again. A row that is
    refused, fails or diverges is a row that says so.

    \b
    gradmaker compare sgd adam kfac --data mnist --epochs 5
    gradmaker compare sgd kfac --task my_module:make_task --budget '500 steps'
    gradmaker compare --config runs/digits/config.yaml --seeds 5
    """  # noqa: D301 - the \b keeps the lines of the paragraph apart
    import_modules(modules or ())
    prepare(device, threads_of(data, task, threads))
    chosen = task_of(task, data, data_dir, model, hidden)
    rows = given_as_data(ctx, "methods", methods) or _default_rows()
    length = budget or (f"{epochs} epochs" if epochs is not None else chosen.options.get("budget", "20 epochs"))
    folder = out or Path("runs") / chosen.name
    vary = _varied(given_as_data(ctx, "vary", None), vary_batch_size, vary_interval)
    search = given_as_data(ctx, "tuning", tuning) or "grid"
    size = chosen.batch_size if batch_size is None else batch_size
    whole = settings(ctx, methods=rows, budget=length, epochs=None, batch_size=size, tuning=search, vary=vary, out=folder)
    if print_config:
        return typer.echo(as_yaml(whole), nl=False)
    write_config(whole, folder)
    found = run_comparison(
        chosen,
        rows,
        learning_rates=lr or None,
        tuning=search,
        budget=length,
        seeds=seeds,
        batch_size=size,
        momentum=momentum,
        schedule=schedule,
        validation=validation,
        vary=vary,
        target=target,
        workers=workers or None,
        tensorboard=tensorboard,
        device=device,
        out=folder,
        progress=not quiet,
        command=shlex.join(["gradmaker", *sys.argv[1:]]),
    )
    if not trained(found):
        typer.echo("error: nothing trained: every training was refused, failed or diverged; the report says why", err=True)
        raise typer.Exit(1)


def trained(found: Comparison) -> bool:
    """Whether a training of any row ended well."""
    return any(record.status == TRAINED for row in found.rows for record in (*row.search, *row.finals))


def _default_rows() -> list[str]:
    return ["sgd", "adam", *(name for name in ORDER if name in METHODS)]


def _varied(given: Any, sizes: Sequence[int] | None, intervals: Sequence[int] | None) -> dict[str, list[int]] | None:
    """The settings that are varied: of the file, and of the command line, which goes before."""
    options = {"batch_size": list(sizes or ()), "interval": list(intervals or ())}
    made = {**(given or {}), **{name: values for name, values in options.items() if values}}
    return made or None
