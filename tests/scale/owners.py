"""What ranks do where each block has one owner: run in `spawned` processes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
    fresh.load_state_dict(state)
    return went_on, steps(fresh, other, rank, world, 3, 6)
