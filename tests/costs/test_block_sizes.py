"""Sizes of blocks from shapes alone, against what makers hold after real steps and against operations counted in trials."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gradmaker import CostError, from_config
from gradmaker.costs.block_sizes import sizes_of
from gradmaker.costs.flops import OWN
from gradmaker.costs.trial import build_like, trying
from gradmaker.scale.assignment import Matrix

HOLDING = ["adam", "kfac", "ekfac", "shampoo", "soap", "kl_shampoo", "caspr_adaptive", "muon", "unit_ng", "psgd_kf", "lbfgs"]
OF_STEPS = ["skfac", "smw_ng", "mfac", "seng", "hessian_free", "curveball"]
REPORTS = 56
"""Bytes of the report on a refresh, of which statistic and cache may hold the same or, later, two."""


def net(device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)
    return nn.Sequential(*layers).to(device)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 6), torch.randint(3, (8,))


def stepped(name: str, **options: Any) -> Any:
    """A maker after steps in which all is measured and refreshed."""
    maker: Any = from_config(net(), {"method": name, **options})
    for _ in range(2):
        x, t = batch()
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(maker.model, x), t)
        maker.forward_and_backward()
    return maker


@pytest.mark.parametrize("name", HOLDING)
def test_bytes_are_those_of_a_maker_that_has_made_steps(name: str) -> None:
    """On the meta device as on the host."""
    planned: Any = from_config(net("meta"), {"method": name})
    found = sizes_of(planned.plan.blocks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        blocks = stepped(name).plan.blocks
    assert [b.members for b in found] == [tuple(b.members()) for b in blocks]
    for sizes, block in zip(found, blocks, strict=True):
        block.held = block.explicit(block.held)  # where a step by one operator holds no cache, on the host
        assert 0 <= block.bytes / len(sizes.members) - (sizes.one.state + sizes.one.cache + sizes.one.average) <= REPORTS


@pytest.mark.parametrize("name", OF_STEPS)
def test_what_only_a_step_tells_is_refused(name: str) -> None:
    planned: Any = from_config(net("meta"), {"method": name})
    with pytest.raises(CostError, match="whose number only a step tells"):
        sizes_of(planned.plan.blocks)


@pytest.mark.parametrize("name", ["kfac", "soap"])
def test_flops_are_those_of_a_trial(name: str) -> None:
    planned: Any = from_config(net(), {"method": name})
    found = sizes_of(planned.plan.blocks)
    with trying(net(), build_like(planned), batch()[0]) as (loop, recorder):
        for sizes, block in zip(found, loop.maker.plan.blocks, strict=True):
            g = block.frame.zeros(*block.frame.shape)
            recorder.start()
            block.applied(block.cache, g)
            assert recorder.work.total_flops == sizes.one.apply * len(sizes.members)


def test_flops_of_a_refresh_by_hand() -> None:
    """Shampoo on (4, 6): an eigendecomposition of each side, 9 d^3, and ``Q diag Q^T`` with its certificate."""
    planned: Any = from_config(nn.Linear(6, 4, bias=False).to("meta"), {"method": "shampoo"})
    (one,) = (b.one for b in sizes_of(planned.plan.blocks))
    with FlopCounterMode(display=False, custom_mapping=OWN) as counter:
        g = torch.randn(1, 4, 6)
        torch.linalg.eigh(g @ g.mT), torch.linalg.eigh(g.mT @ g)
    assert one.moment == 2 * (4 * 4 * 6 + 6 * 6 * 4)
    assert one.apply == 2 * (4 * 4 * 6 + 6 * 6 * 4)
    assert one.refresh > 9 * (4**3 + 6**3) and counter.get_total_flops() < one.refresh + one.moment
    assert one.matrices == (Matrix("factor 0", 4, 4), Matrix("factor 1", 6, 6))


@pytest.mark.parametrize(
    ("options", "matrices"),
    [
        ({"method": "kfac", "max_dim": 4}, [("factor 0", 5, 1), ("factor 1", 7, 1)]),
        ({"method": "kfac", "max_dim": 4, "wide_sides": "blocks"}, [("factor 0", 5, 3), ("factor 1", 7, 4)]),
        ({"method": "one_sided"}, [("factor 0", 5, 5)]),
        ({"method": "layer_ng"}, []),
    ],
)
def test_matrices_that_a_refresh_works_on_apart(options: dict[str, Any], matrices: list[tuple[str, int, int]]) -> None:
    planned: Any = from_config(net("meta"), options)
    first = sizes_of(planned.plan.blocks)[0]
    assert [(m.name, m.side, m.width) for m in first.one.matrices] == matrices
    cost = first.work(10.4, 3)
    assert (cost.cost, cost.bytes, cost.matrices, cost.whole) == (10, 3, first.one.matrices, False)


def test_tied_tables_are_not_cut_by_sides() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.table(x))
            return out

    with torch.device("meta"):
        planned: Any = from_config(Tied(), {"method": "kfac"})
    (found,) = sizes_of(planned.plan.blocks)
    assert found.one.matrices and not found.work(1, 1).matrices


def test_equal_blocks_are_sized_once() -> None:
    """Layers that are too wide for a stack are blocks of their own, and one of a kind is tried."""
    known: dict[object, Any] = {}
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(600, 600) for _ in range(4)))
    for _ in range(2):
        planned: Any = from_config(model, {"method": "kfac"})
        found = sizes_of(planned.plan.blocks, known)
    assert (len(found), len(known)) == (4, 1)
