"""What the ranks of a topology do, and what one process does with the whole batch: run in `spawned` processes."""

from __future__ import annotations

import contextlib
import datetime
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

import gradmaker as gm

N = 12
ROTATED = ("kl_shampoo", "kradagrad", "smw_ng", "smw_gn", "seng")
"""Methods whose statistic is held in one of several forms, so that the matrix has to be compared."""
CUTS = {2: [(0, 5), (0, 12), (0, 7)], 4: [(0, 3, 3, 8), (0, 1, 6, 6), (0, 2, 5, 9)]}
"""Where the batches of the ranks begin, by step: uneven ones, and empty ones."""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    x, t = torch.randn(N, 6, generator=g, dtype=torch.float64), torch.randint(3, (N,), generator=g)
    t[::5] = -100
    return x, t


def own(step: int, rank: int | None, world: int) -> slice:
    if rank is None:
        return slice(0, N)
    begins = (*CUTS[world][step % 3], N)
    return slice(begins[rank], begins[rank + 1])


def declare(maker: Any, model: nn.Module, x: Tensor, t: Tensor, loss: Callable[..., Any] = F.cross_entropy) -> None:
    maker.setup_loss_call(loss, maker.setup_model_call(model, x), t)


def denses(maker: Any) -> list[Tensor]:
    """The matrix that each block represents, where it can be formed."""
    found = []
    for block in maker.plan.blocks if hasattr(maker, "plan") else ():
        with contextlib.suppress(NotImplementedError, TypeError):
            found.append(block.triple.representation.to_dense(block.state).clone())
    return found


def statistics(maker: Any) -> list[Tensor]:
    """What the blocks hold."""
    blocks = maker.plan.blocks if hasattr(maker, "plan") else ()
    return [block.state[k].clone() for block in blocks for k in sorted(block.state)]  # which later steps may write to


# --- the matrix of methods -------------------------------------------------------------------------------------------------
def from_equal_weights(method: str, rank: int | None, world: int) -> list[Any]:
    """The gradient before ``P`` and the statistics of three steps, each from given weights."""
    model, found = net(), []
    maker: Any = gm.from_config(model, {"method": method})
    called = model if rank is None else DistributedDataParallel(model)
    for step in range(3):
        with torch.no_grad():
            torch.manual_seed(100 + step)
            for p in model.parameters():
                p.copy_(torch.randn_like(p))
                p.grad = None
        x, t = batch(step)
        part = own(step, rank, world)
        declare(maker, called, x[part], t[part])
        maker.accumulate()
        raw = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        maker.precondition()
        found.append((raw, denses(maker) if method in ROTATED else statistics(maker)))
    return found


def trajectory(method: str, rank: int | None, world: int) -> list[list[Tensor]]:
    """Parameters after each of ten steps, of plain replicas."""
    model, found = net(), []
    maker: Any = gm.from_config(model, {"method": method})
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for step in range(10):
        x, t = batch(step)
        part = own(step, rank, world)
        optimizer.zero_grad()
        declare(maker, model, x[part], t[part])
        maker.forward_and_backward()
        optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    return found


def by_method(method: str, rank: int | None, world: int) -> Any:
    return from_equal_weights(method, rank, world), trajectory(method, rank, world)


# --- loops and losses ------------------------------------------------------------------------------------------------------
def accumulated(method: str, rank: int | None, world: int) -> Any:
    """Two micro-batches a step, the first under no_sync()."""
    model = net()
    maker: Any = gm.from_config(model, {"method": method})
    wrapped = None if rank is None else DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for step in range(3):
        optimizer.zero_grad()
        for j in range(2):
            x, t = batch(2 * step + j)
            part = own(2 * step + j, rank, world)
            with wrapped.no_sync() if wrapped is not None and not j else contextlib.nullcontext():
                declare(maker, wrapped or model, x[part], t[part])
                maker.accumulate(0.5)
        maker.precondition()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def attached(options: dict[str, Any], rank: int | None, world: int, **of_wrapper: Any) -> Any:
    """A loop with equal shares, whose gradients DistributedDataParallel averages."""
    options = dict(options)
    likelihood, front = options.pop("likelihood", None), options.pop("front", False)
    model = net()
    maker: Any = gm.from_config(model, options)
    called = model if rank is None else DistributedDataParallel(model, **of_wrapper)
    optimizer: Any = torch.optim.SGD(model.parameters(), 1e-2)
    if front:
        optimizer = gm.PreconditionedOptimizer(maker, optimizer, likelihood=likelihood)
    else:
        maker.attach(optimizer, likelihood)
    n = N if rank is None else N // world
    for step in range(4):
        x, t = batch(step)
        part = slice(0, N) if rank is None else slice(rank * n, (rank + 1) * n)
        optimizer.zero_grad()
        F.cross_entropy(called(x[part]), t[part].abs() % 3).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()], denses(maker)


def attached_micro_batches(options: dict[str, Any], rank: int | None, world: int) -> Any:
    """Two passes a step, the first under no_sync()."""
    model = net()
    maker: Any = gm.from_config(model, options)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    maker.attach(optimizer, "categorical", accumulation=2)
    wrapped = None if rank is None else DistributedDataParallel(model, gradient_as_bucket_view=True)
    part = slice(0, N) if rank is None else slice(rank * (N // world), (rank + 1) * (N // world))
    for step in range(3):
        optimizer.zero_grad()
        for j in range(2):
            x, t = batch(2 * step + j)
            with wrapped.no_sync() if wrapped is not None and not j else contextlib.nullcontext():
                (F.cross_entropy((wrapped or model)(x[part]), t[part].abs() % 3) / 2).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()], denses(maker)


def of_options(options: dict[str, Any], rank: int | None, world: int) -> Any:
    """Five steps; the model is called inside of a function, and in one step all terms of rank 0 are masked."""
    model = net()
    maker: Any = gm.from_config(model, options)
    called = model if rank is None else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for step in range(5):
        x, t = batch(step)
        if step == 3:
            t[: CUTS[world][0][1]] = -100
        part = own(step, rank, world)
        optimizer.zero_grad()
        y = maker.setup_model_call(lambda a: called(a) * 2, x[part])
        maker.setup_loss_call(lambda z, targets: F.cross_entropy(z, targets) / 2, y, t[part])
        maker.forward_and_backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()], denses(maker)


def of_lengths(options: dict[str, Any], rank: int | None, world: int) -> Any:
    """Sequences that are longer on one rank; one process has the others padded, and the padding masked."""
    from tests.models import Tagger

    torch.manual_seed(3)
    model, tokens, tags = Tagger("torch", False).double(), torch.randint(7, (6, 5)), torch.randint(3, (6, 5))
    tags[:2, 3:] = -100
    if rank is not None:
        tokens, tags = (tokens[2:], tags[2:]) if rank else (tokens[:2, :3], tags[:2, :3])
    maker: Any = gm.from_config(model, options)
    declare(maker, model, tokens, tags)
    maker.forward_and_backward()
    return [p.grad for p in model.parameters()], denses(maker)


def of_loss(name: str, rank: int | None, world: int) -> Any:
    """Losses with other reductions."""
    classes = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "sum": lambda z, t: F.cross_entropy(z, t, reduction="sum") / 7,
        "class weights": lambda z, t: F.cross_entropy(z, t, weight=classes),
        "terms, mean": lambda z, t: F.cross_entropy(z, t.abs() % 3, reduction="none").mean(),
        "terms, sum": lambda z, t: F.cross_entropy(z, t.abs() % 3, reduction="none").sum(),
        "gaussian": lambda z, t: F.mse_loss(z, F.one_hot(t.abs() % 3, 3).double()),
        "bernoulli": lambda z, t: F.binary_cross_entropy_with_logits(z, F.one_hot(t.abs() % 3, 3).double()),
        "two": lambda z, t: F.cross_entropy(z, t.abs() % 3) + 0.1 * F.mse_loss(z, torch.ones_like(z)),
        "own": lambda z, t: (torch.logsumexp(z, 1) - z.gather(1, (t.abs() % 3).unsqueeze(1)).squeeze(1)).mean(),
    }
    model, found = net(), []
    maker: Any = gm.from_config(model, {"method": "kfac"})
    for step in range(2):
        x, t = batch(step)
        part = slice(0, N) if rank is None else slice(*[(0, 5), (5, 12)][rank]) if world == 2 else own(step, rank, world)
        model.zero_grad()
        declare(maker, model, x[part], t[part], losses[name])
        maker.forward_and_backward()
        found += [[p.grad for p in model.parameters()], denses(maker)]
    return found


def of_model(name: str, rank: int | None, world: int) -> Any:
    """Layers of other types; both methods of putting evidence together."""
    from tests import models

    case = {
        "convolution": models.convolution,
        "tokens": models.tagger,
        "tied": models.tied,
        "twice": models.called_twice,
        "norm": models.normed,
        "attention": models.attention,
    }[name]()
    found = []
    for options in (
        {"method": "kfac"},
        {"method": "ekfac"},
        {"method": "kfac", "fisher": {"FisherEmp": {}}},
        {"method": "seng"},
    ):
        model = case.model
        with contextlib.suppress(ValueError):  # a method that has no use for these layers
            maker: Any = gm.from_config(model, options)
            n = len(case.x)
            part = slice(0, n) if rank is None else (slice(0, n // 3) if rank == 0 else slice(n // 3, n))
            model.zero_grad()
            declare(maker, model, case.x[part], case.t[part], case.loss)
            maker.forward_and_backward()
            found += [[p.grad.clone() for p in model.parameters() if p.grad is not None], denses(maker)]
    return found


# --- checkpoints -----------------------------------------------------------------------------------------------------------
def steps(maker: Any, model: nn.Module, rank: int | None, world: int, begin: int, end: int) -> list[list[Tensor]]:
    optimizer, found = torch.optim.SGD(model.parameters(), 1e-2), []
    for step in range(begin, end):
        x, t = batch(step)
        part = own(step, rank, world)
        optimizer.zero_grad()
        declare(maker, model, x[part], t[part])
        maker.forward_and_backward()
        optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    return found


def saved(method: str, rank: int, world: int, folder: str) -> Any:
    """Parameters after a state was saved by all ranks, and after it was loaded into fresh makers."""
    model = net()
    maker: Any = gm.from_config(model, {"method": method})
    steps(maker, model, rank, world, 0, 3)
    at = f"{folder}/{method}"
    dcp.save({"model": model.state_dict(), "maker": maker.state_dict()}, checkpoint_id=at)
    return steps(maker, model, rank, world, 3, 6), steps(*loaded(method, at), rank, world, 3, 6)


def loaded(method: str, at: str) -> tuple[Any, nn.Module]:
    """A fresh maker and model, filled from a checkpoint."""
    model = net()
    maker: Any = gm.from_config(model, {"method": method})
    shown = gm.checkpoint_targets(maker.state_dict(), dcp.FileSystemReader(at).read_metadata(), "maker")
    state = {"model": model.state_dict(), "maker": shown}
    dcp.load(state, checkpoint_id=at, no_dist=not dist.is_initialized())
    model.load_state_dict(state["model"])
    maker.load_state_dict(state["maker"])
    return maker, model


def of_a_fresh_optimizer(rank: int, world: int) -> Any:
    """torch's own state dicts of an optimizer that has made no step."""
    model = net()
    maker = gm.KfacGradientMaker(model)
    wrapped = DistributedDataParallel(model)
    optimizer = gm.PreconditionedOptimizer(maker, torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9))
    state = get_optimizer_state_dict(wrapped, optimizer)
    set_optimizer_state_dict(wrapped, optimizer, state)
    return sorted(state["state"]), maker.step


# --- processes -------------------------------------------------------------------------------------------------------------
def attempt(work: Callable[..., Any], *args: Any) -> Any:
    """What a piece of work returns, or its exception as text."""
    try:
        return work(*args)
    except gm.SelfCheckError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}\n{traceback.format_exc()}"


def _start(rank: int, world: int, folder: str, work: Callable[[int, int, str], dict[Any, Any]]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=limit)
    torch.save(work(rank, world, folder), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def spawned(world: int, folder: Path, work: Callable[[int, int, str], dict[Any, Any]]) -> list[dict[Any, Any]]:
    """The results of all ranks."""
    torch.multiprocessing.spawn(_start, (world, str(folder), work), nprocs=world)  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [leaf for each in value for leaf in leaves(each)] if isinstance(value, (list, tuple)) else []
