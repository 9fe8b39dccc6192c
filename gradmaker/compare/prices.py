"""The command `gradmaker cost`: predicted seconds and bytes of a step, with the measured ones beside them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from gradmaker.compare.cost import REFERENCE, Cost, measure
from gradmaker.compare.data import Data
from gradmaker.compare.errors import InputError
from gradmaker.compare.models import MODELS, factory
from gradmaker.compare.parsing import Method, parse_rows
from gradmaker.compare.plan_report import plan_report
from gradmaker.compare.presets import HIDDEN, PRESETS
from gradmaker.compare.problem import prepare, seeded
from gradmaker.compare.rows import Row
from gradmaker.compare.task import Task
from gradmaker.costs.prediction import StepCost, cost as predict, cost_of_gradient
from gradmaker.errors import CostError
from gradmaker.options.suggestions import did_you_mean

__all__ = ["Price", "cost", "prices"]

CLASSES = 10
ADAM = Row(label="Adam of torch", maker=None, optimizer="Adam", learning_rates=(1e-3,))


@dataclass(frozen=True)
class Price:
    """The predicted cost of a row, or why there is none."""

    cost: StepCost | None
    reason: str = ""


def prices(rows: Sequence[Row], model: Callable[[], nn.Module], batch: torch.Tensor) -> dict[str, Price]:
    """Predict the costs of rows, by label; the optimizer of a row is part of its step."""
    return {row.label: _price(row, model, batch) for row in rows}


def _price(row: Row, model: Callable[[], nn.Module], batch: torch.Tensor) -> Price:
    with seeded(0, str(batch.device)):
        network = model().to(batch.device).train()
    kind = row.optimizer_class()

    def optimizer(parameters: object) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = kind(parameters, lr=1e-4, **row.options)
        return made

    try:
        maker = row.build_maker(network)
        if maker is None:
            return Price(cost_of_gradient(network, batch, optimizer=optimizer))
        return Price(predict(maker, batch, optimizer=optimizer))
    except (CostError, ValueError) as error:
        return Price(None, str(error))


def cost(
    model: Annotated[str | None, typer.Argument(help=f"One of {', '.join(MODELS)}; none with --task.")] = None,
    methods: Annotated[list[str] | None, typer.Argument(help="Methods, torch optimizers or YAML files.")] = None,
    data: Annotated[str, typer.Option(help=f"Shapes of which data: {', '.join(PRESETS)}.")] = "digits",
    hidden: Annotated[list[int] | None, typer.Option(help="Width of a hidden layer; repeat for more layers.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples per step.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    measured: Annotated[bool, typer.Option("--measure", help="Measure the steps, too.")] = False,
    task: Annotated[str | None, typer.Option(help="module:function that returns a model and the batch of a rank.")] = None,
    world: Annotated[int, typer.Option(help="Ranks, with --task.")] = 1,
    mesh: Annotated[str | None, typer.Option(help="Replicas x shards, as in 8x8. Default: no shards.")] = None,
    memory: Annotated[float | None, typer.Option(help="GiB of a rank: tells what does not fit, and what mends it.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="GB that a rank sends in a second.")] = None,
    flops: Annotated[float | None, typer.Option(help="TFLOP that a rank computes in a second.")] = None,
    reduce_at: Annotated[str, typer.Option(help="When factors are reduced to owners: refresh or measurement.")] = "refresh",
    results: Annotated[str, typer.Option(help="What owners return: roots, gradients, or the smaller.")] = "smaller",
) -> None:
    """Predict seconds and bytes of a step of each method from shapes alone, on random data; with --task, of many ranks."""
    try:
        if task is not None:
            given: list[Method] = [*([model] if model else []), *(methods or [])]
            options = {"reduce_at": reduce_at, "results": results}
            return typer.echo(plan_report(task, given, world, mesh, memory, bandwidth, flops, **options), nl=False)
        if model is None or not methods:
            raise InputError("give a model and methods, as in: gradmaker cost mlp kfac, or a --task")
        if data not in PRESETS:
            raise InputError(f"data={data!r}: {did_you_mean(data, PRESETS)}")
        preset, chosen = PRESETS[data], list[Method](methods)
        torch.set_num_threads(threads)
        size = preset.batch_size if batch_size is None else batch_size
        inputs = torch.rand(2 * size, *preset.shape)
        shapes = Data("random", inputs, torch.arange(2 * size) % CLASSES, inputs[:1], torch.zeros(1, dtype=torch.long))
        widths = tuple(hidden or (preset.hidden if model == preset.model else HIDDEN.get(model, ())))
        make, rows = factory(model, shapes, widths), parse_rows(chosen)
        found = prices([REFERENCE, ADAM, *rows], make, inputs[:size].to(device))
        able = {row.label: row for row in rows if found[row.label].cost is not None}
        problem = prepare(Task(model=make, train=(inputs, shapes.train_targets)), device, 0.5)
        costs = measure(able, problem, size, lambda: None) if measured and able else {}
        Console().print(table(rows, found, costs, measured))
        for row in rows:
            if found[row.label].cost is None:
                typer.echo(f"{row.label}: {found[row.label].reason}")
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def table(rows: Sequence[Row], found: Mapping[str, Price], costs: Mapping[str, Cost], measured: bool) -> Table:
    """Rows with predicted costs, and their ratios to steps of SGD and Adam."""
    made = Table(box=None)
    made.add_column("method", no_wrap=True)
    for head in ("ms", "x SGD", "x Adam", "MB held", "MB in a step", *(("measured ms", "x SGD") if measured else ())):
        made.add_column(head, justify="right")
    bases = [base.seconds for name in (REFERENCE.label, ADAM.label) if (base := found[name].cost) is not None]
    for row in rows:
        price, own = found[row.label], costs.get(row.label)
        if price.cost is None:
            continue
        ratios = [f"{price.cost.seconds / base:.2f}" for base in bases]
        sizes = [f"{n / 2**20:.1f}" for n in (price.cost.held, price.cost.peak)]
        seen = [f"{own.step_seconds * 1e3:.2f}", f"{own.step_ratio:.2f}"] if own else []
        made.add_row(row.label, f"{price.cost.seconds * 1e3:.2f}", *ratios, *sizes, *seen)
    return made
