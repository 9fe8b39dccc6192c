"""Faults on one rank of two: all ranks end with an error, or go on together."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradmaker as gm
from tests.scale.replicas import batch, declare, loaded, net, steps


def step_of(maker: Any, model: nn.Module, rank: int, step: int = 0, loss: Any = F.cross_entropy) -> None:
    x, t = batch(step)
    part = slice(6 * rank, 6 * rank + 6)
    model.zero_grad()
    declare(maker, model, x[part], t[part], loss)
    maker.forward_and_backward()


def raised(maker: Any, model: nn.Module, rank: int, loss: Any) -> str:
    try:
        step_of(maker, model, rank, 0, loss)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def told_of_a_forward_pass(rank: int) -> Any:
    """Rank 1 raises in its forward pass; afterwards both go on."""
    model = net()
    maker = gm.KfacGradientMaker(model)

    def loss(z: Tensor, t: Tensor) -> Tensor:
        if rank == 1:
            raise ValueError("no such file")
        return F.cross_entropy(z, t)

    text = raised(maker, model, rank, loss)
    kept = all(p.grad is None for p in model.parameters()) and maker.step == 0
    step_of(maker, model, rank)
    return text, kept, [p.grad for p in model.parameters()]


def told_of_a_backward_pass(rank: int) -> Any:
    """Rank 0 raises in its backward pass."""
    model = net()
    maker = gm.from_config(model, {"method": "shampoo"})

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            return z.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            if rank == 0:
                raise ValueError("broken backward")
            return g

    return raised(maker, model, rank, lambda z, t: F.cross_entropy(Broken.apply(z), t))


def skipped(method: str, rank: int) -> Any:
    """The loss of rank 1 is not finite: no rank takes the step."""
    model = net()
    maker: Any = gm.from_config(model, {"method": method})
    step_of(maker, model, rank)
    before = [v.clone() for b in maker.plan.blocks for v in b.state.values()]
    step_of(maker, model, rank, 1, lambda z, t: F.cross_entropy(z, t) * (float("nan") if rank == 1 else 1.0))
    same = all(torch.equal(a, b) for a, b in zip(before, (v for b in maker.plan.blocks for v in b.state.values()), strict=True))
    step_of(maker, model, rank, 2)
    return same, maker.skipped, [p.grad for p in model.parameters()]


class Branch(nn.Module):
    """A layer that is used on one rank alone."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        self.body, self.used = net(), used
        self.extra = nn.Linear(3, 3).double()
        with torch.no_grad():
            self.extra.weight.copy_(torch.eye(3))

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.body(x)
        return self.extra(z) if self.used else z


def fired_on_one_rank(rank: int) -> Any:
    model = Branch(rank == 1)
    maker = gm.KfacGradientMaker(model)
    step_of(maker, model, rank)
    return [p.grad for p in model.parameters()], [v for b in maker.plan.blocks for v in b.state.values()]


def refused(rank: int) -> dict[str, str]:
    """What is refused by name."""
    found = {}
    model = net()
    static = DistributedDataParallel(model, static_graph=True)
    found["static_graph"] = raised(gm.KfacGradientMaker(model), static, rank, F.cross_entropy)
    model = net()
    maker = gm.KfacGradientMaker(model)
    x, t = batch(0)
    declare(maker, model, x, t)
    try:
        maker.accumulate(0.5 if rank else 0.25)
    except RuntimeError as error:
        found["weights"] = str(error)
    model = net()
    found["losses"] = raised(gm.KfacGradientMaker(model), model, rank, lambda z, t: F.cross_entropy(z, t) * (1 + rank) * 2.5)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attached = gm.KfacGradientMaker(model).attach(optimizer)
    F.cross_entropy(model(x[6 * rank : 6 * rank + 6]), t[6 * rank : 6 * rank + 6]).backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        found["not reduced"] = str(error)
    attached.remove()
    model = net()
    wrapped = DistributedDataParallel(model)
    with wrapped.join():
        found["join"] = raised(gm.KfacGradientMaker(model), wrapped, rank, F.cross_entropy)
    return found


def alone(rank: int) -> Any:
    """Rank 1 does not come: rank 0 ends by the limit of the group. Afterwards each rank trains by itself."""
    late = dist.new_group(timeout=timedelta(seconds=2))
    own = [dist.new_group([r]) for r in range(2)][rank]
    model = net()
    maker = gm.KfacGradientMaker(model)
    maker.process_group = late
    text, begun = "", time.perf_counter()
    if rank == 0:
        text = raised(maker, model, rank, F.cross_entropy)
    seconds = time.perf_counter() - begun
    dist.barrier()
    maker.process_group = own
    step_of(maker, model, 0)  # both have the same data now
    return text, seconds, [p.grad for p in model.parameters()]


def limit(rank: int) -> float:
    """Seconds after which the maker's own group gives up."""
    maker = gm.KfacGradientMaker(net())
    assert maker.ranks is not None
    seconds: float = maker.ranks.group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    return seconds


# --- a rank that is killed -----------------------------------------------------------------------------------------------
def _train_until_killed(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=10)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=limit)
    model = net()
    maker: Any = gm.from_config(model, {"method": "kfac"})
    steps(maker, model, rank, 2, 0, 3)
    dcp.save({"model": model.state_dict(), "maker": maker.state_dict()}, checkpoint_id=f"{folder}/saved")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begun = time.perf_counter()
    text = raised(maker, model, rank, F.cross_entropy)
    torch.save((text, time.perf_counter() - begun), f"{folder}/told.pt")
    os._exit(0)  # no farewell to a rank that is gone


def killed(folder: Path) -> tuple[str, float]:
    """Rank 1 is killed after a checkpoint: what rank 0 is told in its next step, and after how many seconds."""
    folder.mkdir()
    context = torch.multiprocessing.get_context("spawn")
    started = [context.Process(target=_train_until_killed, args=(rank, str(folder))) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0, -signal.SIGKILL]
    told: tuple[str, float] = torch.load(folder / "told.pt")
    return told


def restarted(rank: int, folder: str) -> Any:
    """Parameters after three more steps from the checkpoint of the run with a killed rank, and of a run without a fault."""
    maker, model = loaded("kfac", f"{folder}/killed/saved")
    other = net()
    whole = steps(gm.from_config(other, {"method": "kfac"}), other, rank, 2, 0, 6)
    return steps(maker, model, rank, 2, 3, 6), whole[3:]
