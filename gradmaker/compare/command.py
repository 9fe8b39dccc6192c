"""The commands `gradmaker compare` and `gradmaker cost`."""

import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer

from gradmaker.compare.comparison import compare as run_comparison
from gradmaker.compare.data import NAMES, load
from gradmaker.compare.errors import InputError, require_extra
from gradmaker.compare.models import MODELS, factory
from gradmaker.compare.presets import HIDDEN, PRESETS
from gradmaker.compare.prices import cost
from gradmaker.compare.rows import Method
from gradmaker.fidelity.command import fidelity
from gradmaker.options.registry import METHODS
from gradmaker.options.suggestions import did_you_mean

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Gradient preconditioning, compared."
)
ORDER = ("kfac", "shampoo")  # default rows after SGD and Adam, where they are registered


@app.command()
def compare(
    methods: Annotated[
        list[str] | None, typer.Argument(help="Methods, torch optimizers or YAML files. Default: sgd adam kfac shampoo.")
    ] = None,
    data: Annotated[str, typer.Option(help=f"One of {', '.join(NAMES)}.")] = "digits",
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with train.parquet and test.parquet, or set GRADMAKER_DATA. Default: the hub.")
    ] = None,
    model: Annotated[str | None, typer.Option(help=f"One of {', '.join(MODELS)}. Default: that of the data set.")] = None,
    hidden: Annotated[list[int] | None, typer.Option(help="Width of a hidden layer; repeat for more layers.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of every training.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples per step.")] = None,
    seeds: Annotated[int, typer.Option(help="Trainings at the selected learning rate.")] = 3,
    lr: Annotated[list[float] | None, typer.Option(help="A learning rate of the grid; repeat for more.")] = None,
    momentum: Annotated[
        float | None, typer.Option(help="Momentum of the SGD optimizer, in the rows sgd, gradient and shampoo. Default: 0.9.")
    ] = None,
    schedule: Annotated[str, typer.Option(help="Learning rate over time: constant, linear or cosine.")] = "cosine",
    config: Annotated[Path | None, typer.Option(help="YAML file with a list of methods.")] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder. Default: runs/<data>.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: torch's; 1 for digits.")] = None,
    modules: Annotated[
        list[str] | None,
        typer.Option("--import", help="Module that registers methods of your own, in this folder or installed; repeatable."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars, no table.")] = False,
    list_methods: Annotated[bool, typer.Option("--list", help="List the methods and exit.")] = False,
) -> None:
    """Train methods from the same parameters, over a learning-rate grid and several seeds, and write a report."""
    try:
        require_extra()
        _import(modules or ())
        if list_methods:
            return _print_methods()
        if data not in PRESETS:
            raise InputError(f"data={data!r}: {did_you_mean(data, PRESETS)}")
        preset = PRESETS[data]
        _prepare(device, preset.threads if threads is None else threads)
        loaded = load(data, data_dir)
        name = model or preset.model
        widths = hidden or (preset.hidden if name == preset.model else HIDDEN.get(name, ()))
        run_comparison(
            factory(name, loaded, widths),
            loaded,
            _methods(methods, config),
            learning_rates=lr or None,
            seeds=seeds,
            epochs=preset.epochs if epochs is None else epochs,
            batch_size=preset.batch_size if batch_size is None else batch_size,
            momentum=momentum,
            schedule=schedule,
            device=device,
            out=out or Path("runs") / data,
            progress=not quiet,
            command=_command_line(),
        )
    except InputError as error:
        _exit(str(error), 2)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


app.command()(cost)
app.command()(fidelity)


def _import(modules: Sequence[str]) -> None:
    """Import modules of the user, also from the working folder. InputError where there is none of that name."""
    if modules and "" not in sys.path:
        sys.path.insert(0, "")
    for name in modules:
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise InputError(f"--import {name}: no such module here or installed") from None


def _methods(names: Sequence[str] | None, config: Path | None) -> list[Method]:
    """The methods of the command line and of the file; without any, the default rows."""
    chosen: list[Method] = [*(names or ()), *([config] if config else ())]
    return chosen or ["sgd", "adam", *(name for name in ORDER if name in METHODS)]


def _prepare(device: str, threads: int | None) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={device!r} cannot be used: {str(error).splitlines()[0]}") from error
    if threads is not None:
        if threads < 1:
            raise InputError(f"threads={threads!r}: expected an integer of at least 1")
        torch.set_num_threads(threads)


def _print_methods() -> None:
    """Print a line for each method: its name and the first line of the maker's docstring."""
    width = max(map(len, METHODS))
    for name, maker in METHODS.items():
        typer.echo(f"{name:<{width}}  {(maker.__doc__ or '').strip().splitlines()[0] if maker.__doc__ else ''}")


def _command_line() -> str:
    """The command line as the user typed it."""
    return shlex.join(["gradmaker", *sys.argv[1:]])


def _exit(message: str, code: int) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)
