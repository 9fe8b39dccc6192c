"""`gradmaker methods`: triple, family, cost and source of every method."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from inspect import cleandoc
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from gradmaker.commands.options import Import, import_modules
from gradmaker.compare.errors import InputError
from gradmaker.options.registry import METHODS
from gradmaker.options.suggestions import did_you_mean

__all__ = ["NO_TRIPLE", "Described", "described", "docstring", "methods", "parts", "reference"]

NO_TRIPLE = {"gradient": "none", "custom": "any legal triple"}
WIDTH, BATCH = 32, 8
"""Of the square layer on which the column of memory is measured: one on which every method is legal."""


@dataclass(frozen=True)
class Described:
    """What a table of methods says of one.

    Args:
        triple: curvature x representation x solver, as of a linear layer.
        family: the curvature that it approximates.
        interval: steps between measurements, and between refreshes, by default.
        memory: bytes held after a step on a square layer, as a multiple of its weight.
    """

    name: str
    what: str
    triple: str
    family: str
    power: float | None
    interval: str
    memory: float | None
    source: str


def described(name: str) -> Described:
    """The description of a method, from its docstrings and from its parts on a linear layer."""
    made: Any = METHODS[name]
    source = reference(name)
    summary = " ".join(cleandoc(made.__doc__ or "").split("\n\n")[0].split())
    if name in NO_TRIPLE:
        return Described(name, summary, NO_TRIPLE[name], "", None, "", None, source)
    names = parts(name)
    maker = made(nn.Linear(WIDTH, WIDTH, bias=False))
    try:
        _step(maker)
        block = maker.plan.blocks[0]
        config = maker.config
        intervals = [_interval(getattr(config, each, None)) for each in ("curvature_interval", "preconditioner_interval")]
        size = maker.summary().bytes / (4 * WIDTH**2)
        exponent = float(block.triple.solver.exponent)
    finally:
        maker.remove()
    return Described(name, summary, " x ".join(names), names[0], exponent, " / ".join(intervals), size, source)


def parts(name: str) -> tuple[str, ...]:
    """Curvature, representation and solver of a method for a linear layer; a word for a method without them."""
    if name in NO_TRIPLE:
        return (NO_TRIPLE[name],)
    made: Any = METHODS[name]
    triple = made(nn.Linear(3, 2)).plan.blocks[0].triple
    return tuple(type(part).__name__ for part in (triple.curvature, triple.representation, triple.solver))


def docstring(name: str) -> tuple[str, str]:
    """What the config's docstring says, and the sources that it names."""
    text = cleandoc(METHODS[name].Config.__doc__ or "")
    said, _, sources = text.partition("Reference: ")
    return said.strip(), " ".join(sources.split()).rstrip(".")


def reference(name: str) -> str:
    """The first source that the config's docstring names."""
    return docstring(name)[1].split("; ")[0]


def _step(maker: Any) -> None:
    """One step, after which a maker holds all that it needs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = maker.setup_model_call(maker.model, torch.randn(BATCH, WIDTH))
        maker.setup_loss_call(F.cross_entropy, outputs, torch.arange(BATCH))
        maker.forward_and_backward()


def _interval(value: Any) -> str:
    return str(value) if isinstance(value, int) else ("-" if value is None else "schedule")


def methods(
    patterns: Annotated[
        list[str] | None, typer.Argument(metavar="WORD...", help="Show methods with these words in name, triple or source.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with all columns.")] = False,
    names: Annotated[bool, typer.Option("--names", help="Names alone, one a line.")] = False,
    modules: Import = None,
) -> None:
    """List the methods: what each is made of (curvature x representation x solver), what it costs, and where it comes from.

    interval: steps between measurements of the curvature, and between refreshes of the preconditioner, by default. memory: what
    is held for a 32 x 32 layer, as a multiple of its weight (Adam: 2). `gradmaker cost` has seconds and bytes for a model.
    """
    import_modules(modules or ())
    wanted = [word.lower() for word in patterns or ()]
    shown = [one for one in map(described, METHODS) if all(word in _text(one) for word in wanted)]
    if not shown:
        raise InputError(f"{' '.join(patterns or ())!r}: {did_you_mean(str((patterns or ('',))[0]), sorted(METHODS))}")
    if names:
        typer.echo("\n".join(one.name for one in shown))
    elif as_json:
        typer.echo(json.dumps([asdict(one) for one in shown], indent=1))
    else:
        Console().print(_table(shown))


def _text(one: Described) -> str:
    return " ".join((one.name, one.what, one.triple, one.source)).lower()


def _table(shown: Sequence[Described]) -> Table:
    made = Table(box=None, pad_edge=False)
    made.add_column("method", no_wrap=True)
    for head in ("curvature x representation x solver", "power", "interval", "memory", "source"):
        made.add_column(head, justify="right" if head in ("power", "memory") else "left", overflow="fold")
    for one in shown:
        power = "" if one.power is None else f"{one.power:g}"
        size = "" if one.memory is None else f"{one.memory:.2g}"
        made.add_row(one.name, one.triple, power, one.interval, size, one.source)
    return made
