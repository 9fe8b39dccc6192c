"""Options that subcommands share, and what they stand for."""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated

import torch
import typer

from gradmaker.commands.settings import read_config
from gradmaker.compare.data import NAMES
from gradmaker.compare.errors import InputError
from gradmaker.compare.models import MODELS
from gradmaker.compare.presets import PRESETS
from gradmaker.compare.task import Task, builtin_task, load_task

__all__ = [
    "Config",
    "DataDir",
    "DataName",
    "Device",
    "Hidden",
    "Import",
    "ModelName",
    "Out",
    "PrintConfig",
    "Quiet",
    "TaskPath",
    "Threads",
    "import_modules",
    "prepare",
    "task_of",
]

TaskPath = Annotated[
    str | None,
    typer.Option("--task", help="A task of your own, my_module:make_task: a function without arguments that returns a Task."),
]
DataName = Annotated[str, typer.Option("--data", help=f"Built-in data: one of {', '.join(NAMES)}.")]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder with train.parquet and test.parquet, or set GRADMAKER_DATA. Default: the hub.")
]
ModelName = Annotated[
    str | None, typer.Option("--model", help=f"Built-in model: one of {', '.join(MODELS)}. Default: that of the data.")
]
Hidden = Annotated[list[int] | None, typer.Option(help="Width of a hidden layer; repeat for more layers.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads. Default: torch's; 1 for digits.")]
Out = Annotated[Path | None, typer.Option(help="Output folder.")]
Import = Annotated[
    list[str] | None,
    typer.Option("--import", help="Module that registers methods of your own, in this folder or installed; repeatable."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars, no table.")]
Config = Annotated[
    Path | None,
    typer.Option(
        is_eager=True,
        callback=read_config,
        help="YAML file of options by name; those on the command line go before. A list: methods.",
    ),
]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print all options as YAML, for --config, and exit.")]


def import_modules(names: Sequence[str]) -> None:
    """Import modules of the user, also from the working folder. InputError where there is none of that name."""
    if names and "" not in sys.path:
        sys.path.insert(0, "")
    for name in names:
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise InputError(f"--import {name}: no such module here or installed") from None


def prepare(device: str, threads: int | None) -> None:
    """Set the number of threads. InputError for a device that this machine lacks."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        able = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        raise InputError(f"device={device!r} cannot be used on this machine: expected {' or '.join(able)}") from None
    if threads is not None:
        if threads < 1:
            raise InputError(f"threads={threads!r}: expected an integer of at least 1")
        torch.set_num_threads(threads)


def threads_of(data: str, task: str | None, threads: int | None) -> int | None:
    """The given number of threads, else that of the preset of built-in data."""
    preset = PRESETS.get(data) if task is None else None
    return preset.threads if threads is None and preset is not None else threads


def task_of(task: str | None, data: str, data_dir: Path | None, model: str | None, hidden: Sequence[int] | None) -> Task:
    """The task of the user, else that of built-in data. InputError where both are asked for."""
    if task is None:
        return builtin_task(data, data_dir, model, hidden)
    if model or hidden:
        raise InputError("--task brings its own model: leave --model and --hidden out")
    return load_task(task)
