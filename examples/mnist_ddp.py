"""A model in several processes, each with its part of every batch: the same preconditioner, and the same weights, on all.

    torchrun --nproc-per-node 2 examples/mnist_ddp.py                      MNIST, plain replicas
    torchrun --nproc-per-node 2 examples/mnist_ddp.py --way ddp            in DistributedDataParallel
    torchrun --nproc-per-node 2 examples/mnist_ddp.py --way attach         in a loop that averages gradients itself
    torchrun --nproc-per-node 2 examples/mnist_ddp.py --way fsdp           with weights that fully_shard has sharded
    torchrun --nproc-per-node 2 examples/mnist_ddp.py --data digits        scikit-learn's digits, which need no download

With declared calls the maker weighs the batches of the ranks by their sizes, so that the last, uneven batch of an epoch is
right; an attached loop gets the mean of the ranks' means, and leaves that batch out. Without torchrun there is one process.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gradmaker import from_config
from gradmaker.compare.data import load
from gradmaker.compare.models import mlp


def batches(n: int, size: int, epoch: int, whole: bool) -> list[Tensor]:
    """Indices of the batches of an epoch, the same on all ranks.  whole: leave an incomplete last one out"""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(epoch))
    found = list(order.split(size))
    return found[:-1] if whole and len(found[-1]) < size else found


def part(rows: Tensor, rank: int, world: int) -> Tensor:
    """The part of a batch that a rank has; the last ranks of a small batch have none."""
    return rows.tensor_split(world)[rank]


def accuracy(model: nn.Module, x: Tensor, t: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == t).float().mean())


def largest_difference(model: nn.Module) -> float:
    """Between the weights of this rank and those of rank 0."""
    worst = 0.0
    for p in model.parameters():
        own = p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()
        first = own.clone()
        dist.broadcast(first, 0)
        worst = max(worst, float((first - own).abs().max()))
    return worst


def wrapped(model: nn.Module, way: str) -> nn.Module:
    """What is called in place of the model; a way without a wrapper leaves it as it is."""
    if way == "fsdp":
        for layer in (*(m for m in model.modules() if isinstance(m, nn.Linear)), model):
            fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return DistributedDataParallel(model) if way in ("ddp", "attach") else model


def main(
    data: Annotated[str, typer.Option(help="mnist or digits.")] = "mnist",
    data_dir: Annotated[
        Path | None, typer.Option(envvar="GRADMAKER_DATA", help="Folder of the data; default: the hub.")
    ] = None,
    method: Annotated[str, typer.Option(help="Any method of the library.")] = "kfac",
    way: Annotated[str, typer.Option(help="plain, ddp, attach or fsdp.")] = "plain",
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Of all ranks together.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Of SGD along the preconditioned gradient.")] = 0.03,
) -> None:
    """Train a multilayer perceptron, and compare the weights of all ranks at the end."""
    torch.set_num_threads(1)
    if several := "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    torch.manual_seed(0)  # replicas begin with equal weights
    digits = load(data, data_dir)
    model = mlp(digits, [64, 64])
    called = wrapped(model, way) if several else model
    optimizer = torch.optim.SGD(model.parameters(), learning_rate)
    maker = from_config(model, {"method": method})
    if way == "attach":
        maker.attach(optimizer)
    x, t = digits.train_inputs, digits.train_targets
    for epoch in range(epochs):
        for rows in batches(len(x), batch_size, epoch, whole=way == "attach"):
            own = part(rows, rank, world)
            optimizer.zero_grad()
            if way == "attach":
                F.cross_entropy(called(x[own]), t[own]).backward()
            else:
                y = maker.setup_model_call(called, x[own])
                maker.setup_loss_call(F.cross_entropy, y, t[own])
                maker.forward_and_backward()
            optimizer.step()
        found = accuracy(model, digits.test_inputs, digits.test_targets)
        if rank == 0:
            print(f"epoch {epoch}: test accuracy {found:.4f}")
    if several:
        print(f"rank {rank} of {world}: weights differ from those of rank 0 by {largest_difference(model):g}")
        dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
