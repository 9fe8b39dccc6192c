"""Bytes of collectives, as the cost model tells them and as they are called in real processes."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradmaker import from_config
from gradmaker.costs.block_sizes import sizes_of
from gradmaker.costs.traffic import communicated

METHODS = ["kfac", "ekfac", "shampoo", "unit_ng", "tnt", "adam"]
OPERATIONS = ("all_reduce", "all_gather", "broadcast", "reduce", "all_to_all_single", "all_gather_into_tensor")
EXAMPLES = 8


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 4))


def options(method: str) -> dict[str, Any]:
    """Of steps of which every second one measures, where the method has passes to measure."""
    return {"curvature_interval": 2, "warmup_steps": 0} if method in ("kfac", "unit_ng") else {}


def count(found: Counter[str]) -> None:
    """Count the bytes of every collective of this process from now on, by operation."""
    for name in OPERATIONS:
        real = getattr(dist, name)

        def counted(first: Any, *rest: Any, _real: Any = real, _name: str = name, **named: Any) -> Any:
            found[_name] += sum(t.numel() * t.element_size() for t in tree_leaves(first) if isinstance(t, Tensor))
            return _real(first, *rest, **named)

        setattr(dist, name, counted)


def work(rank: int, world: int, folder: str) -> None:
    """Two steps of each method: one that measures, and one that need not."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    carried: Counter[str] = Counter()
    count(carried)
    seen = {}
    for method in METHODS:
        torch.manual_seed(0)
        maker: Any = from_config(net(), {"method": method, **options(method)})
        steps = []
        for _ in range(2):
            carried.clear()
            x, t = torch.randn(EXAMPLES, 6), torch.randint(4, (EXAMPLES,))
            maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(maker.model, x), t)
            maker.forward_and_backward()
            steps.append(dict(carried))
        seen[method] = steps, [block.bytes for block in maker.plan.blocks]
    torch.save(seen, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))])
def ranks(request: pytest.FixtureRequest) -> list[Any]:
    """What each rank has counted."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (request.param, folder), nprocs=request.param)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_those_that_real_processes_carry(method: str, ranks: list[Any]) -> None:
    with torch.device("meta"):
        maker: Any = from_config(net(), {"method": method, **options(method)})
    told = communicated(maker, len(ranks), positions=EXAMPLES)
    first, second = Counter[str](), Counter[str]()
    for kind, size in told.items():
        first[kind.operation] += size
        if kind.when == "step" or not options(method):
            second[kind.operation] += size
    for steps, _ in (rank[method] for rank in ranks):
        assert steps == [dict(first), dict(second)]


@pytest.mark.parametrize("method", METHODS)
def test_memory_is_that_of_real_processes(method: str, ranks: list[Any]) -> None:
    with torch.device("meta"):
        maker: Any = from_config(net(), {"method": method, **options(method)})
    told = sum((b.one.state + b.one.cache + b.one.average) * len(b.members) for b in sizes_of(maker.plan.blocks))
    for _, held in (rank[method] for rank in ranks):
        if method != "adam":  # of which a step by one operator holds no cache on the host
            assert sum(held) == pytest.approx(told, rel=0.1)
