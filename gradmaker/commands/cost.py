"""`gradmaker cost`: seconds and bytes of a step of each method, predicted or measured."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from gradmaker.commands.options import (
    Config,
    DataName,
    Device,
    Hidden,
    Import,
    ModelName,
    Out,
    PrintConfig,
    Quiet,
    import_modules,
    prepare,
)
from gradmaker.commands.settings import as_yaml, given_as_data, settings, write_config
from gradmaker.compare.cost import REFERENCE
from gradmaker.compare.errors import InputError
from gradmaker.compare.parsing import DEFAULT_METHODS, parse_rows
from gradmaker.compare.plan_report import plan_report
from gradmaker.compare.presets import PRESETS
from gradmaker.compare.rows import Row
from gradmaker.step_costs.cell import Cell, How
from gradmaker.step_costs.pages import write
from gradmaker.step_costs.predicted import Predicted, predicted
from gradmaker.step_costs.study import study
from gradmaker.step_costs.subjects import Subject, builtin, of_task

__all__ = ["cost"]

ADAM = Row(label="Adam of torch", maker=None, optimizer="Adam", learning_rates=(1e-3,))


def cost(
    ctx: typer.Context,
    methods: Annotated[
        list[str] | None,
        typer.Argument(help="Methods, torch optimizers or YAML files of them. Default: sgd torch.Adam kfac shampoo."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="A task of your own, my_module:make_task, whose first batches are used; repeat for more."),
    ] = None,
    data: DataName = "digits",
    model: ModelName = None,
    hidden: Hidden = None,
    width: Annotated[
        list[int] | None, typer.Option(help="Width of all hidden layers of the built-in model; repeat to study several.")
    ] = None,
    batch_size: Annotated[list[int] | None, typer.Option(help="Samples per step; repeat to study several.")] = None,
    interval: Annotated[
        list[int] | None, typer.Option(help="Interval T of measurements and refreshes; repeat. Measured: 1, 10, 100.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure steps, and write a report with figures.")] = False,
    floors: Annotated[bool, typer.Option(help="Time the products and decompositions of a step alone, too.")] = True,
    windows: Annotated[int, typer.Option(help="Windows of steps of which the median is reported.")] = 7,
    seconds: Annotated[float, typer.Option(help="Seconds of a row at one size after which three windows suffice.")] = 4.0,
    world: Annotated[
        int | None,
        typer.Option(help="Plan for so many ranks without data; --task returns a model and the batch of a rank."),
    ] = None,
    mesh: Annotated[str | None, typer.Option(help="Replicas x shards, as in 8x8, with --world. Default: no shards.")] = None,
    memory: Annotated[float | None, typer.Option(help="GiB of a rank: tells what does not fit, and what mends it.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="GB that a rank sends in a second.")] = None,
    flops: Annotated[float | None, typer.Option(help="TFLOP that a rank computes in a second.")] = None,
    reduce_at: Annotated[str, typer.Option(help="When factors are reduced to owners: refresh or measurement.")] = "refresh",
    results: Annotated[str, typer.Option(help="What owners return: roots, gradients, or the smaller.")] = "smaller",
    out: Out = None,
    device: Device = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    modules: Import = None,
    config: Config = None,
    print_config: PrintConfig = False,
    quiet: Quiet = False,
) -> None:
    """Predict what a step of each method costs, from shapes alone; with --measure, measure it; with --world, plan many ranks.

    Predicted are seconds and bytes of a step with the intervals of the method, or with --interval. Measured is a step taken
    apart into passes, statistics, refresh and application, its time at intervals T of both, peak memory, state
    bytes, FLOPs and the floor of its products, all over batch sizes and widths, with ratios to SGD and with the predictions
    beside them; figures, CSV, JSON and Markdown are written to runs/cost. Built-in data are random values of their shapes.

    \b
    gradmaker cost kfac soap adam --data mnist
    gradmaker cost kfac shampoo --data mnist --width 128 --width 512 --batch-size 32 --batch-size 512 --measure
    gradmaker cost --config poster.yaml
    gradmaker cost kfac shampoo --task examples.large_shapes:llama_7b --world 64 --mesh 8x8 --memory 24
    """  # noqa: D301 - the \b keeps the lines of the paragraph apart
    import_modules(modules or ())
    prepare(device, threads)
    entries = given_as_data(ctx, "methods", methods)
    sizes = tuple(batch_size or ([PRESETS[data].batch_size] if data in PRESETS else [64]))
    intervals = tuple(interval or ((1, 10, 100) if measure else ()))
    _check(sizes, intervals, windows)
    folder = out or Path("runs") / "cost"
    whole = settings(ctx, methods=entries or list(DEFAULT_METHODS), batch_size=sizes, interval=intervals, out=folder)
    if print_config:
        return typer.echo(as_yaml(whole), nl=False)
    if world is not None:
        scheme = {"reduce_at": reduce_at, "results": results}
        return typer.echo(plan_report(_one(task), entries or (), world, mesh, memory, bandwidth, flops, **scheme), nl=False)
    rows = parse_rows(entries or list(DEFAULT_METHODS))
    subjects = _subjects(task, data, model, hidden, width, device)
    if not measure:
        return _predict(rows, subjects, sizes, intervals, device)
    write_config(whole, folder)
    how = How(intervals, windows, seconds, floors, device)
    found = study(rows, subjects, sizes, how, folder, _shown(quiet))
    paths = write(found, folder)
    if not quiet:
        typer.echo(f"report: {paths['markdown']}")
    if all(cell.status != "measured" for cell in found.cells):
        typer.echo("error: nothing was measured: every row was refused; the report says why", err=True)
        raise typer.Exit(1)


def _one(tasks: Sequence[str] | None) -> str:
    """The task of a plan."""
    if tasks is None or len(tasks) != 1:
        raise InputError("--world plans one --task module:function, which returns a model and the batch of a rank")
    return tasks[0]


def _check(sizes: Sequence[int], intervals: Sequence[int], windows: int) -> None:
    for name, values in (("batch_size", sizes), ("interval", intervals), ("windows", [windows])):
        if bad := [value for value in values if value < 1]:
            raise InputError(f"{name}={bad[0]}: expected an integer of at least 1")


def _subjects(
    tasks: Sequence[str] | None,
    data: str,
    model: str | None,
    hidden: Sequence[int] | None,
    widths: Sequence[int] | None,
    device: str,
) -> list[Subject]:
    if tasks:
        if model or hidden or widths:
            raise InputError("--task brings its own model: leave --model, --hidden and --width out")
        return [of_task(task, device) for task in tasks]
    if hidden and widths:
        raise InputError("give --hidden, the layers of one model, or --width, one model for each, not both")
    if widths:
        return [builtin(data, model, None, width) for width in widths]
    return [builtin(data, model, hidden)]


def _shown(quiet: bool) -> Callable[[Cell], None]:
    """A function that prints a line for a cell."""

    def shown(cell: Cell) -> None:
        ratios = ", ".join(f"T={T} {ratio:.2f}" for T, ratio in cell.ratio.items())
        text = f"{ratios} x SGD, memory {cell.memory_ratio or 1:.2f} x" if cell.status == "measured" else cell.message
        typer.echo(f"{cell.subject}, batch {cell.batch_size}, {cell.row}: {text}")

    return (lambda cell: None) if quiet else shown


def _predict(
    rows: Sequence[Row], subjects: Sequence[Subject], sizes: Sequence[int], intervals: Sequence[int], device: str
) -> None:
    """Print a table of predictions for every model and batch size. Exit status 1 where none can be made."""
    able = False
    for subject in subjects:
        for size in sizes:
            found = {row.label: predicted(row, subject, size, intervals, device) for row in rows}
            bases = [predicted(row, subject, size, (), device).own for row in (REFERENCE, ADAM)]
            if len(subjects) * len(sizes) > 1:
                typer.echo(f"{subject.label}, batch {size}")
            Console().print(_table(found, [base for base in bases if base], intervals))
            for label, one in found.items():
                able = able or one.own is not None
                if one.own is None:
                    typer.echo(f"{label}: {one.reason}")
    if not able:
        raise typer.Exit(1)


def _table(found: dict[str, Predicted], bases: Sequence[float], intervals: Sequence[int]) -> Table:
    """Rows with predicted costs, and their ratios to steps of SGD and Adam."""
    made = Table(box=None)
    made.add_column("method", no_wrap=True)
    heads = [f"T={T} ms" for T in intervals]
    for head in ("ms", "x SGD", "x Adam", *heads, "MB held", "MB in a step"):
        made.add_column(head, justify="right")
    for label, one in found.items():
        if one.own is not None:
            ratios = [f"{one.own / base:.2f}" for base in bases]
            each = [f"{(one.ms or {})[T]:.2f}" for T in intervals]
            made.add_row(label, f"{one.own:.2f}", *ratios, *each, *(f"{n / 2**20:.1f}" for n in (one.held, one.peak)))
    return made
