"""Several processes: refusals in one sentence, and methods of the reduced gradient in every way of accumulating it."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import gradmaker as gm
from gradmaker.curvature import FisherExact
from gradmaker.loops.attachment import ChangedGradientWarning
from tests.loops.test_attach import CONFIGS, maker_of
from tests.models import Case, mlp


# --- refusals, with a process group that talks to nobody ------------------------------------------------------------------
@pytest.fixture
def two_ranks() -> Any:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.fixture
def one_rank() -> Any:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def declare(maker: Any, case: Case) -> None:
    maker.setup_loss_call(case.loss, maker.setup_model_call(case.model, case.x), case.t)


class OfRank(FisherExact):
    """A curvature that does not say that its parts add up."""

    by_parts: ClassVar[bool] = False


OF_PASSES = ["hessian_free", "lissa", "newton"]


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("method", OF_PASSES)
@pytest.mark.parametrize("call", ["forward_and_backward", "accumulate"])
def test_curvature_of_passes_is_refused(call: str, method: str) -> None:
    case = mlp()
    maker: Any = gm.from_config(case.model, {"method": method})
    declare(maker, case)
    with pytest.raises(RuntimeError, match=r"torch\.distributed runs 2 processes, and .* on the passes of each rank alone"):
        getattr(maker, call)()
    assert maker.step == 0 and all(p.grad is None for p in case.model.parameters())


@pytest.mark.usefixtures("two_ranks")
def test_curvature_of_passes_is_refused_where_it_is_attached() -> None:
    """At the first forward pass, and at a step without one."""
    case = mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), 0.1)
    maker = gm.KfacGradientMaker(case.model, gm.KfacGradientConfig(fisher=OfRank())).attach(optimizer, "categorical")
    for act in (case.run, optimizer.step):
        with pytest.raises(RuntimeError, match="2 processes"):
            act()
    with torch.no_grad():
        case.run()
    assert maker.step == 0


@pytest.mark.usefixtures("one_rank")
def test_a_single_process_is_served() -> None:
    case = mlp()
    maker = gm.KfacGradientMaker(case.model)
    declare(maker, case)
    maker.forward_and_backward()
    assert maker.step == 1


# --- two processes --------------------------------------------------------------------------------------------------------
METHODS = ["adam", "shampoo"]


def rows(case: Case, part: slice) -> tuple[Tensor, Tensor]:
    return case.x[part], case.t[part]


def trained(name: str, way: str, rank: int | None) -> list[Tensor]:
    """Parameters after three steps: of one process on the whole batch, or of a rank on its half of every micro-batch."""
    case = mlp()
    views = way.endswith("views")
    model: nn.Module = case.model
    if rank is not None:
        # without a search for unused parameters the buffers are exchanged after the first step
        model = DistributedDataParallel(case.model, gradient_as_bucket_view=views, find_unused_parameters=views)
    optimizer = torch.optim.SGD(case.model.parameters(), 0.05)
    maker = maker_of(case.model, CONFIGS[name]())
    if way == "attached":
        maker.attach(optimizer)
    micro = [slice(0, 2), slice(2, 6)] if way.startswith("accumulate") else [slice(0, 6)]
    for _ in range(3):
        if not way.startswith("kept"):
            optimizer.zero_grad(set_to_none=not views)
        for j, whole in enumerate(micro):
            size = whole.stop - whole.start
            half = slice(whole.start, whole.start + size // 2), slice(whole.start + size // 2, whole.stop)
            x, t = rows(case, whole if rank is None else half[rank])
            held = j + 1 < len(micro) and rank is not None
            with model.no_sync() if held else contextlib.nullcontext():  # type: ignore[operator]
                if way == "attached":
                    case.loss(model(x), t).backward()
                    continue
                maker.setup_loss_call(case.loss, maker.setup_model_call(model, x), t)
                maker.accumulate(size / 6)
        if way != "attached":
            maker.precondition()
        optimizer.step()
    return [p.detach() for p in case.model.parameters()]


WAYS = ["whole", "attached", "accumulate", "accumulate, views", "kept, views"]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", ChangedGradientWarning)  # what a reducer writes at the end of a backward pass is no change
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {f"{name}, {way}": trained(name, way, rank) for name in METHODS for way in WAYS}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo is not in this build")
def test_two_processes_are_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name in METHODS:
        for way in WAYS:
            key = f"{name}, {way}"
            assert all(torch.equal(a, b) for a, b in zip(ranks[0][key], ranks[1][key], strict=True)), key
            torch.testing.assert_close(ranks[0][key], trained(name, way, None), rtol=1e-10, atol=1e-12)
