"""What ranks do with models that `fully_shard` (FSDP2) has sharded, and what one process does: run in `spawned` processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import gradmaker as gm
from tests.scale.replicas import N, batch, declare, own


class Net(nn.Module):
    """Shards of two ranks: 9 and 9 rows of 18, 1 and none of 1, 2 and 1 of 3."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.one, self.last = nn.Linear(6, 18), nn.Linear(18, 1), nn.Linear(1, 3)
        self.checkpointed = checkpointed
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            h: Tensor = checkpoint(lambda v: self.first(v).tanh(), x, use_reentrant=False)
        else:
            h = self.first(x).tanh()
        out: Tensor = self.last(self.one(h).tanh())
        return out


def net(small: bool) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 3)]
    return nn.Sequential(*layers).double() if small else Net()


def shard(model: nn.Module, dims: tuple[int, ...], **options: Any) -> None:
    mesh = init_device_mesh("cpu", dims, mesh_dim_names=("replicate", "shard")[-len(dims) :])
    for layer in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def full(t: Any) -> Tensor:
    found: Tensor = (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
    return found


def declared(options: dict[str, Any], rank: int | None, dims: tuple[int, ...], parts: int = 1, **more: Any) -> Any:
    """Gradients and parameters of declared steps: uneven parts, and a rank without any."""
    model, world, found = net(more.pop("small", True)), 1, []
    if rank is not None:
        world = int(torch.tensor(dims).prod())
        shard(model, dims, **more)
    maker: Any = gm.from_config(model, options)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for step in range(3):
        optimizer.zero_grad()
        for j in range(parts):
            x, t = batch(step * parts + j)
            part = own(step * parts + j, rank, world)
            declare(maker, model, x[part], t[part])
            maker.accumulate(1 / parts)
        maker.precondition()
        found += [full(p.grad) for p in model.parameters()]
        optimizer.step()
        found += [full(p) for p in model.parameters()]
    return found


def attached(options: dict[str, Any], rank: int | None, dims: tuple[int, ...], front: bool = False, **more: Any) -> Any:
    """Parameters of a loop with equal shares."""
    set_to_none = more.pop("set_to_none", True)
    checkpointed, policy = more.pop("checkpointed", False), more.get("mp_policy")
    model: nn.Module = Net(checkpointed and rank is not None)
    n, part = N, slice(0, N)
    if rank is not None:
        n = N // int(torch.tensor(dims).prod())
        part = slice(rank * n, (rank + 1) * n)
        shard(model, dims, **more)
    maker: Any = gm.from_config(model, options)
    optimizer: Any = torch.optim.SGD(model.parameters(), 1e-2)
    if front:
        optimizer = gm.PreconditionedOptimizer(maker, optimizer, max_norm=1e-2)
    else:
        maker.attach(optimizer)
    found = []
    for step in range(4):
        x, t = batch(step)
        optimizer.zero_grad(set_to_none)
        z = model(x[part])
        F.cross_entropy(z.double() if policy else z, t[part].abs() % 3).backward()
        optimizer.step()
        found += [full(p) for p in model.parameters()]
        if front and step == 1:  # a state that is saved and loaded goes on the same way
            optimizer.load_state_dict(optimizer.state_dict())
    return found


class Tied(nn.Module):
    """A table of embeddings that is the head's weight, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table, self.inner, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.inner(self.table(tokens)).tanh())
        return out


def tied(options: dict[str, Any], rank: int | None, dims: tuple[int, ...]) -> Any:
    model = Tied()
    if rank is not None:
        mesh = init_device_mesh("cpu", dims)
        fully_shard(model.inner, mesh=mesh)
        fully_shard(model, mesh=mesh)
    maker: Any = gm.from_config(model, options)
    tokens = torch.arange(12) * 5 % 7
    part = slice(0, 12) if rank is None else slice(0, 5) if rank == 0 else slice(5, 12)
    declare(maker, model, tokens[part], (tokens[part] * 3 + 1) % 7)
    maker.forward_and_backward()
    return [full(p.grad) for p in model.parameters()]


def refused(rank: int, dims: tuple[int, ...]) -> dict[str, str]:
    """What is refused, by its text."""

    def divided() -> None:
        model: Any = net(True)
        shard(model, dims)
        model[0].set_gradient_divide_factor(1.0)
        maker = gm.from_config(model, {"method": "adam"})
        declare(maker, model, *batch(0))
        maker.forward_and_backward()

    found = {}
    for name, work in {
        "products": lambda: declared({"method": "newton"}, rank, dims),
        "weights": lambda: declared({"method": "neumann_practical"}, rank, dims),
        "divided": divided,
    }.items():
        try:
            work()
            found[name] = "not refused"
        except (ValueError, RuntimeError) as error:
            found[name] = str(error)
    return found


HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
