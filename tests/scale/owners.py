"""What ranks do where each block has one owner: run in `spawned` processes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gradmaker as gm
from tests.scale import replicas, sharded

FACTORISATIONS = ("linalg_cholesky_ex", "_linalg_eigh", "_linalg_svd", "linalg_qr", "linalg_lu_factor_ex", "linalg_inv_ex")


class Factorisations(TorchDispatchMode):
    """Counts the matrices that are factorised."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[-1].split(".")[0]
        if name in FACTORISATIONS:
            self.count[name] += args[0].numel() // (args[0].shape[-1] * args[0].shape[-2])
        return func(*args, **(kwargs or {}))


class Formed(TorchDispatchMode):
    """Notes the shapes of all tensors with memory of their own size."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.ndim > 1 and t.untyped_storage().nbytes() >= t.numel() * t.element_size():
                self.shapes.add(tuple(t.shape[-2:]))
        return out


def formed(options: dict[str, Any], rank: int, world: int) -> list[tuple[bool, bool]]:
    """For each wide layer whether this rank owns it, and whether the ends of two steps form its whole gradient."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 67), torch.nn.Tanh(), torch.nn.Linear(67, 3)).double()
    sharded.shard(model, (world,))
    maker = made(options, model, rank)
    shapes: set[tuple[int, ...]] = set()
    for step in range(2):
        x, t = replicas.batch(step)
        replicas.declare(maker, model, x, t)
        maker.accumulate()
        with Formed() as seen:
            maker.precondition()
        shapes |= seen.shapes
    own = {name for b in maker.plan.blocks if b.owned for s in b.sites for name in s.parameters}
    wide = {"0.weight": {(67, 6), (67, 7)}, "2.weight": {(3, 67), (3, 68)}}
    return [(name in own, bool(shapes & looks)) for name, looks in wide.items()]


def made(options: dict[str, Any], model: torch.nn.Module, rank: int | None) -> Any:
    maker: Any = gm.from_config(model, options)
    if rank is not None:
        maker.owners = True
    return maker


def held(maker: Any) -> int:
    return sum(block.bytes for block in maker.plan.blocks)


def steps(maker: Any, model: torch.nn.Module, rank: int | None, world: int, begin: int, end: int) -> list[list[Tensor]]:
    optimizer, found = torch.optim.SGD(model.parameters(), 1e-2), []
    for step in range(begin, end):
        x, t = replicas.batch(step)
        part = replicas.own(step, rank, world)
        optimizer.zero_grad()
        replicas.declare(maker, model, x[part], t[part])
        maker.forward_and_backward()
        optimizer.step()
        found.append([sharded.full(p) for p in model.parameters()])
    return found


def trajectory(options: dict[str, Any], rank: int | None, world: int, dims: tuple[int, ...] = ()) -> Any:
    """Parameters of six steps, bytes held, and counted factorisations."""
    model = sharded.net(True) if dims else replicas.net()
    if dims and rank is not None:
        sharded.shard(model, dims)
    maker = made(options, model, rank)
    if dims:
        return steps(maker, model, rank, world, 0, 3)
    with Factorisations() as counted:
        found = steps(maker, model, rank, world, 0, 6)
    return found, held(maker), dict(counted.count), [b.owner for b in maker.plan.blocks if b.state]


def saved(options: dict[str, Any], rank: int, world: int, folder: str) -> Any:
    """Parameters after a state was saved, and after it was loaded into a fresh maker with owners."""
    model = replicas.net()
    maker = made(options, model, rank)
    steps(maker, model, rank, world, 0, 3)
    state, weights = maker.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    if rank == 0:
        torch.save((weights, state), f"{folder}/owners_{options['method']}.pt")
    went_on = steps(maker, model, rank, world, 3, 6)
    other = replicas.net()
    other.load_state_dict(weights)
    fresh = made(options, other, rank)
    at = f"{folder}/dcp_{options['method']}"
    dcp.save({"maker": state}, checkpoint_id=at)
    target = {"maker": fresh.state_dict()}
    dcp.load(target, checkpoint_id=at)
    fresh.load_state_dict(target["maker"])
    return went_on, steps(fresh, other, rank, world, 3, 6)
