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
from gradmaker.compare.errors import InputError
from gradmaker.compare.parsing import DEFAULT_METHODS
from gradmaker.options.yaml_text import parse_yaml

__all__ = ["compare"]


def compare(
    ctx: typer.Context,
    methods: Annotated[
        list[str] | None,
        typer.Argument(help="Methods, torch optimizers or YAML files of them. Default: sgd torch.Adam kfac shampoo."),
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
    vary: Annotated[
        list[str] | None,
        typer.Option(
            help="An option and values that are trained, too, all else as selected: batch_size=32,128 or interval=1,10; repeat."
        ),
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
    gradmaker compare sgd torch.Adam kfac --data mnist --epochs 5
    gradmaker compare sgd kfac --task my_module:make_task --budget '500 steps'
    gradmaker compare --config runs/digits/config.yaml --seeds 5
    """  # noqa: D301 - the \b keeps the lines of the paragraph apart
    import_modules(modules or ())
    prepare(device, threads_of(data, task, threads))
    chosen = task_of(task, data, data_dir, model, hidden)
    rows = given_as_data(ctx, "methods", methods) or list(DEFAULT_METHODS)
    length = budget or (f"{epochs} epochs" if epochs is not None else chosen.options.get("budget", "20 epochs"))
    folder = out or Path("runs") / chosen.name
    varied = given_as_data(ctx, "vary", _varied(vary or ()))
    search = given_as_data(ctx, "tuning", tuning) or "grid"
    whole = settings(ctx, methods=rows, budget=length, epochs=None, tuning=search, vary=varied, out=folder)
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
        batch_size=batch_size,
        momentum=momentum,
        schedule=schedule,
        validation=validation,
        vary=varied,
        target=target,
        workers=workers or None,
        tensorboard=tensorboard,
        device=device,
        out=folder,
        progress=not quiet,
        command=shlex.join(["gradmaker", *sys.argv[1:]]),
    )
    if not found.trained:
        typer.echo("error: nothing trained: every training was refused, failed or diverged; the report says why", err=True)
        raise typer.Exit(1)


def _varied(given: Sequence[str]) -> dict[str, list[Any]]:
    """Options with their values, from `name=value,value`. InputError for other text."""
    made = {}
    for text in given:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise InputError(f"vary={text!r}: expected an option and values, as in batch_size=32,128")
        made[name.strip().replace("-", "_")] = [parse_yaml(value) for value in values.split(",")]
    return made
