"""`gradmaker train`: one method on a task, with curves and a checkpoint."""

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

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
from gradmaker.commands.settings import as_yaml, given_as_data, settings, write_config
from gradmaker.compare.comparison import compare
from gradmaker.compare.errors import InputError
from gradmaker.compare.parsing import parse_rows
from gradmaker.compare.search.tuning import Tuning
from gradmaker.compare.trial import Session

__all__ = ["train"]

CHECKPOINT = "checkpoint.pt"


def train(
    ctx: typer.Context,
    method: Annotated[
        str | None, typer.Argument(help="A method, a torch optimizer, or a YAML file of one. Default: kfac.")
    ] = None,
    task: TaskPath = None,
    data: DataName = "digits",
    data_dir: DataDir = None,
    model: ModelName = None,
    hidden: Hidden = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate. Default: the middle of the method's grid.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Length: '20 epochs', '500 steps', '60 seconds'. Default: the task's.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples per step. Default: the task's.")] = None,
    seed: Annotated[int, typer.Option(help="Of initial weights, order of batches, and what the method draws.")] = 0,
    momentum: Annotated[
        float | None, typer.Option(help="Momentum of the SGD optimizer, in the rows sgd, gradient and shampoo. Default: 0.9.")
    ] = None,
    schedule: Annotated[str, typer.Option(help="Learning rate over time: constant, linear or cosine.")] = "cosine",
    validation: Annotated[float, typer.Option(help="Share of the training data held out, where the task has none.")] = 0.1,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard event files, too.")] = False,
    out: Out = None,
    device: Device = "cpu",
    threads: Threads = None,
    modules: Import = None,
    config: Config = None,
    print_config: PrintConfig = False,
    quiet: Quiet = False,
) -> None:
    """Train one method on a task, and write curves, a report and a checkpoint.

    The folder runs/<task>-<method> has report.html, trials.csv, results.json, and checkpoint.pt: a dictionary of `model`,
    `maker` and `optimizer` for load_state_dict. A training that ended is not run again with the same options.

    \b
    gradmaker train kfac --lr 0.03
    gradmaker train soap --task my_module:make_task --budget '2000 steps'
    """  # noqa: D301 - the \b keeps the lines of the paragraph apart
    import_modules(modules or ())
    prepare(device, threads_of(data, task, threads))
    rows = parse_rows([given_as_data(ctx, "method", method) or "kfac"], None if lr is None else [lr], momentum)
    if len(rows) != 1:
        raise InputError(f"train takes one method, got {len(rows)}: use gradmaker compare")
    row = rows[0]
    rate = row.learning_rates[len(row.learning_rates) // 2]
    chosen = task_of(task, data, data_dir, model, hidden)
    length = budget or chosen.options.get("budget", "20 epochs")
    folder = out or Path("runs") / f"{chosen.name}-{row.label}"
    entry = given_as_data(ctx, "method", method) or "kfac"
    whole = settings(ctx, method=entry, lr=rate, budget=length, out=folder)
    if print_config:
        return typer.echo(as_yaml(whole), nl=False)
    write_config(whole, folder)
    found = compare(
        chosen,
        [entry],
        learning_rates=[rate],
        tuning=Tuning(extend=0),
        budget=length,
        seeds=[seed],
        batch_size=batch_size,
        momentum=momentum,
        schedule=schedule,
        validation=validation,
        tensorboard=tensorboard,
        device=device,
        out=folder,
        progress=not quiet,
        command=shlex.join(["gradmaker", *sys.argv[1:]]),
        on_end=Checkpoint(folder / CHECKPOINT),
    )
    if not found.trained:
        reason = found.rows[0].refusal or next((record.message for record in found.rows[0].search), "")
        typer.echo(f"error: nothing trained: {reason}", err=True)
        raise typer.Exit(1)


@dataclass
class Checkpoint:
    """Saves what a training ended with."""

    path: Path

    def __call__(self, session: Session) -> None:
        """Write the file, atomically."""
        parts: dict[str, Any] = {"model": session.model, "maker": session.maker, "optimizer": session.optimizer}
        fresh = self.path.with_suffix(".new")
        torch.save({name: part.state_dict() for name, part in parts.items() if part is not None}, fresh)
        os.replace(fresh, self.path)
