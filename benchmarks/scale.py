"""Refreshes that are shared between processes, measured, and what a plan says of more of them, up to 512.

    python benchmarks/scale.py --out benchmarks/scale.md

First part: gloo processes on this machine, each with one thread, refresh the blocks of a small GPT by their owners, as
`gradmaker.scale.assignment.assign` deals them: statistics are reduced to owners, roots are broadcast. CPU seconds of a rank
without those of communication, bytes that its blocks hold, and bytes that every collective carried, counted where it is called;
beside these the bytes of `gradmaker.costs.traffic`; two counters of a refresh travel as float32 here, 8 bytes less for each
member than in int64. Second part: the cost model alone, up to 512 ranks.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import thread_time
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import typer
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1]))

import gradmaker as gm
from examples.large_shapes import gpt2_small, llama, llama_7b
from gradmaker.blocks import Block
from gradmaker.compare.cost import machine
from gradmaker.costs.block_sizes import BlockSizes, Member, sizes_of
from gradmaker.costs.ranks import Passes, cost_of_ranks, passes_of
from gradmaker.costs.traffic import Every, Scheme, communicated, returns_roots
from gradmaker.scale.assignment import Piece, assign

PAGE = Path(__file__).resolve().parent / "scale.md"
METHODS = ("kfac", "shampoo")
PROCESSES = (1, 2, 4)
WORLDS = (1, 8, 64, 512)
RUNS = 3
Found = dict[str, Any]
OF_MODEL = """
Scheme `owners`, factors reduced at each measurement, at most 8 shards; a rank's batch as in `examples/large_shapes.py`.
Embeddings and heads are Adam's, by `groups`. GiB that the method holds on the fullest rank, beside the two moments of Adam on
the same shards; temporary tensors of the largest refresh and of a measured step; FLOPs of an average step over those of the
passes, on the busiest rank; balance of owners; GiB that a rank sends in an average step for the method, beside those of the
model without. With `max_dim=1024` all factors of Llama 7B are diagonals, but for those of tensors in blocks.
"""
LITERATURE = (
    (
        "Distributed Shampoo (Shi et al. 2023, arXiv:2309.06497)",
        "at most 10 % more time of a step than diagonal adaptive methods; blocks by owners, an all_gather of search directions",
    ),
    (
        "KAISA (Pauloski et al. 2021, arXiv:2107.01739)",
        "K-FAC on up to 128 accelerators, 18.1 to 36.3 % less time to the same quality; memory against communication by choice",
    ),
    (
        "Distributed K-FAC (Pauloski et al. 2020, arXiv:2007.00784)",
        "ResNet-50 in 18 to 25 % less time than SGD; factors by owners, layer by layer",
    ),
)


def network(width: int, layers: int) -> nn.Module:
    """A small GPT in the blocks of the large ones; its tables are left out of K-FAC and have diagonals in Shampoo."""
    return llama(64, width, 3 * width, 4, layers)


# ------------------------------------------------------------------ measured
def refresh(rank: int, world: int, folder: str, method: str, width: int, layers: int) -> None:
    """One rank: reduce, refresh its own members, broadcast; what it took and what it carried."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    maker: Any = gm.from_config(network(width, layers), {"method": method, "max_dim": 4 * width})
    sizes = sizes_of(maker.plan.blocks)
    owners = assign([b.work(b.one.refresh, b.one.state + b.one.cache) for b in sizes], world).owners
    carried: Counter[str] = Counter()
    states = {b.name: _statistic(b.block) for b in sizes}
    likes = {b.name: b.block.refreshed(b.block.state, b.block.empty_cache()) for b in sizes}  # of any refresh but the first
    scheme, found = Scheme("owners", world, results="roots"), list[float]()
    for _ in range(RUNS):
        carried.clear()
        for b in sizes:
            _reduce(b, states[b.name], owners, carried, world)
        spent, caches = 0.0, dict[str, dict[str, Tensor]]()
        for b in sizes:
            start = thread_time()
            caches[b.name] = _refreshed(b, states[b.name], owners, rank)
            spent += thread_time() - start
        held = sum(t.numel() * t.element_size() for cache in caches.values() for t in cache.values())
        for b in sizes:
            if returns_roots(b, scheme, Every()):
                _broadcast(b, likes[b.name], owners, carried, world)
        found.append(spent)
    torch.save({"seconds": min(found), "carried": dict(carried), "held": held}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _statistic(block: Block) -> dict[str, Tensor]:
    """A statistic with positive definite factors."""
    made = {}
    for name, t in block.state.items():
        noise = torch.randn(t.shape)
        square = t.ndim == 3 and t.shape[1] == t.shape[2]
        made[name] = noise @ noise.mT / t.shape[-1] if square else torch.ones_like(t)
    return made


def _pieces(b: BlockSizes, owners: Mapping[Piece, int]) -> list[tuple[Piece, int]]:
    return [(p, rank) for p, rank in owners.items() if p.block == b.name]


def _factors(b: BlockSizes, state: Mapping[str, Tensor], piece: Piece) -> list[Tensor]:
    """The tensors of a statistic that belong to a piece: a matrix with its mass, or all of some members."""
    tensors = [t[piece.start : piece.stop] for t in state.values()]
    if not piece.path:
        return tensors
    kinds = [[t for t in tensors if t.ndim > 1], [t for t in tensors if t.ndim == 1]]
    return [kind[piece.path[0]] for kind in kinds]


def _reduce(b: BlockSizes, state: Mapping[str, Tensor], owners: Mapping[Piece, int], carried: Counter[str], world: int) -> None:
    for piece, owner in _pieces(b, owners) if b.block.triple.curvature.of_passes and world > 1 else ():
        flat = torch.cat([t.reshape(-1) for t in _factors(b, state, piece)])
        dist.reduce(flat, owner)
        carried["reduce of factors"] += flat.numel() * flat.element_size()


def _refreshed(b: BlockSizes, state: Mapping[str, Tensor], owners: Mapping[Piece, int], rank: int) -> dict[str, Tensor]:
    """The caches of the members that a rank owns any of; of a matrix alone the other one is as small as can be."""
    runs = dict[tuple[int, int], list[tuple[int, ...]]]()
    for p, owner in _pieces(b, owners):
        if owner == rank:
            runs.setdefault((p.start, p.stop), []).append(p.path)
    made: dict[str, Tensor] = {}
    for (start, stop), paths in runs.items():
        part = {k: t[start:stop] for k, t in state.items()}
        cut = [path[0] for path in paths if path]
        squares = [k for k, t in part.items() if t.ndim > 1]
        for j, name in enumerate(squares):
            if cut and j not in cut:  # refreshed by another rank: a unit matrix of side 1 takes its place
                part[name] = torch.ones(stop - start, 1, 1)
        cache = b.block.refreshed(part, None)
        made |= {f"{start} {k}": v for k, v in cache.items()}
    return made


def _broadcast(
    b: BlockSizes, like: Mapping[str, Tensor], owners: Mapping[Piece, int], carried: Counter[str], world: int
) -> None:
    for piece, owner in _pieces(b, owners) if world > 1 else ():
        names = [k for k in like if not piece.path or _matrix_of(k) == piece.path[0]]
        flat = torch.cat([like[k][piece.start : piece.stop].reshape(-1) for k in names])
        dist.broadcast(flat, owner)
        carried["broadcast of roots"] += flat.numel() * flat.element_size()


def _matrix_of(name: str) -> int:
    """The index of the matrix in the name of a cached tensor; reports on a refresh go with the first."""
    end = name.rpartition("_")[2]
    return int(end) if end.isdecimal() else 0


def measured(method: str, world: int, width: int, layers: int) -> Found:
    """What some processes took and carried, beside the bytes of the cost model."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(refresh, (world, folder, method, width, layers), nprocs=world)
        ranks = [torch.load(f"{folder}/{rank}.pt") for rank in range(world)]
    with torch.device("meta"):
        maker: Any = gm.from_config(network(width, layers), {"method": method, "max_dim": 4 * width})
    told = communicated(maker, world, "owners", results="roots")
    modelled = {f"{k.operation} of {k.what}": v for k, v in told.items() if k.when == "refresh"}
    flops = cost_of_ranks(maker, Passes(0.0, 0), Scheme("owners", world, results="roots"))
    return {
        "seconds": [r["seconds"] for r in ranks],
        "held": [r["held"] for r in ranks],
        "balance": flops.balance,
        "carried": ranks[0]["carried"],
        "modelled": modelled,
    }


# ------------------------------------------------------------------ modelled
def growth(name: str) -> list[Found]:
    """What the cost model says of a large model on more and more ranks: whole replicas to 8 ranks, then shards of 8."""
    with torch.device("meta"):
        model, batch = LARGE[name]()
        passes = passes_of(model, batch)
    adam = 2 * sum(p.numel() * p.element_size() for p in model.parameters())
    found, known, last = list[Found](), dict[object, Member](), len(list(model.children())) - 1
    for label, given in LARGE_ROWS.items():
        method = str(given["method"])
        groups: dict[Any, str] = {("0.*", f"{last}.*"): "adam", "*": method}
        maker: Any = gm.from_config(model, {**given, "groups": groups})
        for world in WORLDS:
            shards = min(world, 8)
            scheme = Scheme("owners", world, shards, reduce_at="measurement") if world > 1 else Scheme()
            c = cost_of_ranks(maker, passes, scheme, known)
            model_bytes = sum(c.memory[k] for k in ("parameters", "gradients", "optimizer"))
            own = c.bytes - model_bytes - c.memory["workspace"] - c.memory.get("evidence", 0)
            of_model = sum(v for k, v in c.traffic.wire.items() if k.what in ("weights", "gradients"))
            found.append(
                {
                    "method": label,
                    "world": world,
                    "held": own,
                    "adam": adam // shards,
                    "workspace": c.memory["workspace"] + c.memory.get("evidence", 0),
                    "flops": sum(c.flops.values()) / passes.flops,
                    "balance": c.balance,
                    "sent": c.sent - of_model,
                    "sent_of_model": of_model,
                }
            )
    return found


LARGE = {"GPT-2 small": gpt2_small, "Llama 7B": llama_7b}
LARGE_ROWS: dict[str, dict[str, Any]] = {
    **{f"{name}, large": {"method": name, "preset": "large"} for name in ("kfac", "shampoo", "soap")},
    "shampoo, large, block_size=1024": {"method": "shampoo", "preset": "large", "block_size": 1024},
    "muon": {"method": "muon"},
}
"""With their preset, if they have one."""


# ------------------------------------------------------------------ the page
def render(known: Mapping[str, Any]) -> str:
    """The page."""
    facts = ", ".join(f"{key} {value}" for key, value in known["machine"].items())
    lines = ["# Work that is shared between processes", "", *_said(), "", f"On {facts}.", ""]
    return "\n".join([*lines, *_measured(known), *_modelled(known), *_literature()]) + "\n"


def _said() -> list[str]:
    return [line for line in (__doc__ or "").split("\n\n", 2)[2].strip().splitlines()]


def _measured(known: Mapping[str, Any]) -> Iterator[str]:
    yield "## Refreshes of a small GPT, measured"
    yield ""
    yield f"Width {known['width']}, {known['layers']} layers; the least of {RUNS} refreshes of all blocks; the busiest rank."
    yield ""
    heads = (
        "method",
        "ranks",
        "CPU s, busiest",
        "all ranks",
        "balance",
        "modelled",
        "MiB of roots",
        "bytes carried",
        "modelled",
    )
    yield f"| {' | '.join(heads)} |"
    yield "|---" * 9 + "|"
    for method, worlds in known["measured"].items():
        for world, r in worlds.items():
            seconds = r["seconds"]
            balance = max(seconds) * len(seconds) / sum(seconds)
            bytes_ = [", ".join(f"{k} {v:,}" for k, v in r[name].items()) or "none" for name in ("carried", "modelled")]
            cells = (f"{max(seconds):.3f}", f"{sum(seconds):.3f}", f"{balance:.2f}", f"{r['balance']:.2f}")
            yield f"| {method} | {world} | {' | '.join(cells)} | {max(r['held']) / 2**20:.2f} | {' | '.join(bytes_)} |"
    yield ""


def _modelled(known: Mapping[str, Any]) -> Iterator[str]:
    yield "## Up to 512 ranks, modelled"
    yield ""
    yield from OF_MODEL.strip().splitlines()
    yield ""
    for name, rows in known["modelled"].items():
        yield f"### {name}"
        yield ""
        yield "| method | ranks | GiB held | Adam's | GiB passing | FLOPs | balance | GiB sent | without |"
        yield "|---" * 9 + "|"
        for r in rows:
            sizes = [r[k] / 2**30 for k in ("held", "adam", "workspace")]
            cells = [*(f"{x:.3g}" for x in sizes), f"{r['flops']:.2%}", f"{r['balance']:.2f}"]
            sent = [f"{r[k] / 2**30:.3g}" for k in ("sent", "sent_of_model")]
            yield f"| {r['method']} | {r['world']} | {' | '.join([*cells, *sent])} |"
        yield ""


def _literature() -> Iterator[str]:
    yield "## In the literature"
    yield ""
    yield "| system | as its authors report |"
    yield "|---|---|"
    for name, figure in LITERATURE:
        yield f"| {name} | {figure} |"


def main(
    width: Annotated[int, typer.Option(help="Of the small GPT.")] = 256,
    layers: Annotated[int, typer.Option(help="Of the small GPT.")] = 4,
    processes: Annotated[list[int] | None, typer.Option(help="Numbers of processes; default: 1, 2, 4.")] = None,
    large: Annotated[list[str] | None, typer.Option(help="Models of the second part; default: all.")] = None,
    out: Annotated[Path, typer.Option(help="Markdown file; a JSON file is written beside it.")] = PAGE,
) -> None:
    """Measure shared refreshes, model more ranks, and write the page."""
    torch.set_num_threads(1)
    known: Found = {"machine": machine("cpu"), "width": width, "layers": layers, "measured": {}, "modelled": {}}
    for method in METHODS:
        known["measured"][method] = {str(n): measured(method, n, width, layers) for n in processes or PROCESSES}
        print(method, {n: r["seconds"] for n, r in known["measured"][method].items()}, flush=True)
    known["modelled"] = {name: growth(name) for name in large or LARGE}
    out.with_suffix(".json").write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    out.write_text(render(known), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
