"""The plan of `gradmaker cost --task`: what methods cost each of many ranks, what does not fit, and which option mends it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from io import StringIO
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from gradmaker.compare.errors import InputError
from gradmaker.compare.parsing import Method, parse_rows
from gradmaker.compare.rank_task import RankTask, read_task
from gradmaker.compare.rows import Row, optimizers
from gradmaker.costs.block_sizes import Member
from gradmaker.costs.ranks import Passes, RankCost, cost_of_ranks, passes_of
from gradmaker.costs.traffic import Collective, Scheme
from gradmaker.errors import CostError
from gradmaker.methods import from_config
from gradmaker.options.checks import check_interval
from gradmaker.options.registry import METHODS
from gradmaker.presets import spelled

__all__ = ["DEFAULTS", "Planned", "plan_report", "read_mesh"]

DEFAULTS: tuple[Method, ...] = ("adamw", "kfac", "shampoo", "soap", "muon")
GIB, TERA = 2**30, 1e12
WIDTHS = (8192, 4096, 2048, 1024, 512)  # limits on sides that are tried
BALANCE = "block_size cuts tensors into blocks of their own, and groups leave a layer to another method"
OF_MODEL = ("weights", "gradients")  # what is communicated without a method, too
NAMES = {
    "statistics": "statistics on every rank",
    "roots": "roots on every rank",
    "owned": "what the fullest owner holds",
    "evidence": "the evidence of a measured step",
}


@dataclass(frozen=True)
class Planned:
    """A method under a scheme: its cost, or why there is none; and an option with which it fits, if it does not."""

    label: str
    scheme: Scheme
    cost: RankCost | None
    reason: str = ""
    mended: str = ""


@dataclass
class Planner:
    """Prices rows of one task; blocks that were priced once are known."""

    task: RankTask
    memory: float | None = None  # bytes
    known: dict[object, Member] = field(default_factory=dict)
    makers: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def passes(self) -> Passes:
        with torch.device("meta"):
            try:
                return passes_of(self.task.model, self.task.batch)
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise InputError(f"the forward pass failed on the meta device: {type(error).__name__}: {reason}") from error

    def price(self, row: Row, scheme: Scheme) -> RankCost:
        """The cost of a row. ValueError or CostError, with the reason, where the method cannot be planned."""
        key = repr(row.maker)
        if key not in self.makers:
            made = None if row.maker is None else from_config(self.task.model, dict(row.maker))
            self.makers[key] = made if hasattr(made, "plan") else _Plain(self.task.model)
        return cost_of_ranks(self.makers[key], self.passes, scheme, self.known, _moments(row))

    def plan(self, row: Row, scheme: Scheme) -> Planned:
        """The cost of a row, and what mends it where a rank has too little memory."""
        try:
            cost = self.price(row, scheme)
        except (ValueError, CostError) as error:
            return Planned(row.label, scheme, None, str(error))
        fits = self.memory is None or cost.bytes <= self.memory
        return Planned(row.label, scheme, cost, mended="" if fits else self.mend(row, scheme, cost))

    def mend(self, row: Row, scheme: Scheme, cost: RankCost) -> str:
        """The first option with which a row fits, in words."""
        assert self.memory is not None
        own = sum(cost.memory[k] for k in ("parameters", "gradients", "optimizer"))
        if own > self.memory:
            return f"the model takes {sized(own)} without the method: shard it over more ranks (--mesh)"
        best = (cost.bytes, "no option that was tried takes less")
        for text, other, changed in _changes(row, scheme):
            try:
                found = self.price(other, changed).bytes
            except (ValueError, CostError):
                continue
            if found <= self.memory:
                return f"{text} fits, with {sized(found)}"
            best = min(best, (found, f"nothing that was tried fits; {text} takes {sized(found)}"))
        return best[1]


def _changes(row: Row, scheme: Scheme) -> Iterator[tuple[str, Row, Scheme]]:
    """Options that take less memory, in words, with the row and the scheme that they make; the mildest first."""
    for options, overridden in _options(row):
        kept = {k: v for k, v in (row.maker or {}).items() if k not in overridden}
        yield spelled(options), replace(row, maker={**kept, **options}), scheme
    if scheme.name == "owners":
        changes: list[dict[str, Any]] = [{"reduce_at": "measurement"}, {"results": "gradients"}]
        for change in (*changes, changes[0] | changes[1]):
            yield spelled(change), row, replace(scheme, **change)
    for name in ("one_sided", "muon"):
        if row.maker is not None and row.method != name:
            yield f"the method {name}", replace(row, maker={"method": name}), scheme


def _options(row: Row) -> Iterator[tuple[Mapping[str, Any], Collection[str]]]:
    """Options of the method of a row that take less memory, and those of the row that they override."""
    if row.maker is None:
        return
    config: Any = METHODS[row.method].Config
    names = {f.name for f in fields(config)}
    if "embeddings" in names:
        yield {"embeddings": False}, ()
    for name, options in getattr(config, "presets", {}).items():
        yield {"preset": name}, options
    for width in WIDTHS if "wide_sides" in names else ():
        yield {"max_dim": width, "wide_sides": "blocks"}, ()
    for name in ("max_dim", "block_size"):
        for width in WIDTHS if name in names else ():
            yield {name: width}, ()


class _Plain:
    """A maker without blocks, of a row that has an optimizer alone."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.plan = model, self
        self.blocks: list[Any] = []
        self.methods: dict[str, Any] = {}


def _moments(row: Row) -> int:
    """Tensors like the parameters that the optimizer of a row holds, as it shows after one step of a small one."""
    p = nn.Parameter(torch.ones(2, 3))
    p.grad = torch.ones_like(p)
    kind: Any = optimizers()[row.optimizer.lower()]
    made = kind([p], lr=1e-3, **row.options)
    made.step()
    return sum(isinstance(v, torch.Tensor) and v.shape == p.shape for v in made.state[p].values())


# ------------------------------------------------------------------ the report
def read_mesh(mesh: str | None, world: int) -> int:
    """The shards of a mesh such as 8x8: replicas times shards; one for a world of whole replicas. InputError for others."""
    if mesh is None:
        return 1
    parts = mesh.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(f"mesh={mesh!r}: expected replicas x shards, as in 8x8, or the number of replicas")
    replicas, shards = int(parts[0]), int(parts[1]) if len(parts) == 2 else 1
    if replicas * shards != world:
        raise InputError(f"mesh={mesh!r} has {replicas * shards} ranks, and world={world}: expected a product of {world}")
    return shards


def plan_report(
    task: str | RankTask,
    methods: Sequence[Method] = (),
    world: int = 1,
    mesh: str | None = None,
    memory: float | None = None,
    bandwidth: float | None = None,
    flops: float | None = None,
    **scheme: Any,
) -> str:
    """The plan of methods on many ranks, as text. InputError for a task, a mesh or a method that cannot be used.

    memory: GiB of a rank; bandwidth: GB that a rank sends in a second; flops: TFLOP that it computes in one; None: not judged.
    scheme: ``reduce_at`` and ``results`` of `Scheme`
    """
    shards = read_mesh(mesh, world)
    try:
        for name, value in (("memory", memory), ("bandwidth", bandwidth), ("flops", flops)):
            if value is not None:
                check_interval(name, value, 0, float("inf"))
        schemes = [Scheme("replicated", world)] if shards == 1 else []
        owners = Scheme("owners", world, shards, **scheme)
        schemes += [owners] if world > 1 else []
    except ValueError as error:
        raise InputError(str(error)) from None
    planner = Planner(read_task(task) if isinstance(task, str) else task, None if memory is None else memory * GIB)
    rows = parse_rows(methods or DEFAULTS)
    planned = [planner.plan(row, scheme) for row in rows for scheme in schemes]
    passes = planner.passes
    count = sum(p.numel() for p in planner.task.model.parameters())
    head = f"{count:,} parameters on {world} ranks ({world // shards} replicas x {shards} shards)"
    head += f", {passes.flops / TERA:.3g} TFLOP of passes on each"
    console = Console(width=160, record=True, file=StringIO())
    console.print(head)
    console.print(_table(planned, flops, bandwidth))
    console.print(_traffic_table(planned))
    return "\n".join([console.export_text().rstrip(), *_remarks(planned, planner.memory)]) + "\n"


def _table(planned: Sequence[Planned], flops: float | None, bandwidth: float | None) -> Table:
    timed = flops is not None and bandwidth is not None
    made = Table(box=None)
    for name in ("method", "scheme"):
        made.add_column(name, no_wrap=True)
    heads = ("GiB", "model", "method", "passing", "TFLOP", "balance", "GiB sent", *(("s",) if timed else ()))
    for head in heads:
        made.add_column(head, justify="right")
    for p in planned:
        if p.cost is None:
            continue
        c, m = p.cost, p.cost.memory
        model = sum(m[k] for k in ("parameters", "gradients", "optimizer"))
        passing = m["workspace"] + m["evidence"]
        sizes = [f"{n / GIB:.2f}" for n in (c.bytes, model, c.bytes - model - passing, passing)]
        seconds = [f"{c.seconds(flops * TERA, bandwidth * 1e9):.3g}"] if flops is not None and bandwidth is not None else []
        work = f"{sum(c.flops.values()) / TERA:.3g}"
        made.add_row(p.label, p.scheme.name, *sizes, work, f"{c.balance:.2f}", f"{c.sent / GIB:.3f}", *seconds)
    return made


def _traffic_table(planned: Sequence[Planned]) -> Table:
    """Bytes of collectives, by method and scheme; those of the model without a method once."""
    made = Table(box=None)
    for name in ("method", "scheme", "collective", "at each"):
        made.add_column(name, no_wrap=True)
    for name in ("carries", "sent a step"):
        made.add_column(name, justify="right")
    seen = set[tuple[str, Collective]]()
    for p in planned:
        for kind, size in p.cost.traffic.bytes.items() if p.cost else ():
            of_all = kind.what in OF_MODEL
            if of_all and (p.scheme.name, kind) in seen:
                continue
            seen.add((p.scheme.name, kind))
            label = "all" if of_all else p.label
            sent = sized(p.cost.traffic.wire[kind]) if p.cost else ""
            made.add_row(label, p.scheme.name, f"{kind.operation} of {kind.what}", kind.when, sized(size), sent)
    return made


def sized(count: float) -> str:
    """Bytes in the largest unit of which there is one."""
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g} B"


def _most(cost: RankCost, memory: float) -> str:
    """What takes the most memory, and the largest matrix where it alone is a part of it to be named."""
    what = max(cost.memory, key=lambda k: cost.memory[k])
    size, name = cost.largest
    matrix = f", and {name} takes {sized(size)} alone" if size > memory / 20 else ""
    return f"most of it is {NAMES.get(what, what)}, {sized(cost.memory[what])}{matrix}"


def _remarks(planned: Sequence[Planned], memory: float | None) -> Iterator[str]:
    for p in planned:
        name = f"{p.label}, {p.scheme.name}"
        if p.cost is None:
            yield f"{name}: not planned: {p.reason}"
            continue
        if memory is not None and p.cost.bytes > memory:
            size = f"{sized(p.cost.bytes)} do not fit into {sized(memory)}"
            yield f"{name}: {size}; {_most(p.cost, memory)}; {p.mended}"
        if p.cost.why:
            yield f"{name}: {p.cost.why}; {BALANCE}"
