"""Costs of many ranks: bytes by hand, memory that falls with owners, and a model of seven billion parameters."""

from __future__ import annotations

import re
from time import thread_time
from typing import Any

import pytest
import torch
from torch import nn

from gradmaker import from_config
from gradmaker.costs.ranks import Passes, RankCost, cost_of_ranks, passes_of
from gradmaker.costs.traffic import Collective, Scheme, communicated, wire

WORD = 4  # bytes of a float32
GRADIENTS = Collective("step", "gradients", "all_reduce")
MEETINGS, PRESENCE, EVIDENCE = (
    Collective(when, what, "all_reduce")
    for when, what in (("step", "meetings"), ("step", "presence"), ("measurement", "presence"))
)
SMALL = {MEETINGS: 2 * 4 * 24 * 8, PRESENCE: 4 * 2 * 4}  # of 4 ranks: two tables of 24 numbers a rank, a flag for each tensor


def maker(method: str = "kfac", **options: Any) -> Any:
    """Of one layer on the meta device, 6 inputs and 4 outputs: factors of sides 7 and 4, or 6 and 4 and a bias of 4."""
    return from_config(nn.Linear(6, 4).to("meta"), {"method": method, **options})


def test_one_process_communicates_nothing() -> None:
    for method in ("kfac", "shampoo"):
        for scheme in ("replicated", "owners"):
            assert communicated(maker(method), 1, scheme) == {}  # type: ignore[arg-type]


def test_bytes_of_replicas_by_hand() -> None:
    """The gradient, both factors with their masses at a measurement, two meetings, a flag for each tensor and each site."""
    factors = (4 * 4 + 7 * 7 + 2) * WORD
    assert communicated(maker(), 4) == {
        GRADIENTS: (4 * 6 + 4) * WORD,
        **SMALL,
        EVIDENCE: 4 * 4,
        Collective("measurement", "factors", "all_reduce"): factors,
    }
    assert communicated(maker("shampoo"), 4) == {GRADIENTS: 28 * WORD, **SMALL}  # of the reduced gradient, the same everywhere


def test_bytes_of_rows_by_hand() -> None:
    """EKFAC's scales are no sum of those of the ranks: inputs and output gradients of 8 positions a rank are gathered."""
    assert communicated(maker("ekfac"), 4, positions=8) == {
        GRADIENTS: 28 * WORD,
        **SMALL,
        Collective("measurement", "shapes", "all_reduce"): 4 * 13 * 8,
        Collective("measurement", "rows", "all_gather"): 4 * 8 * (6 + 4) * WORD,
    }


@pytest.mark.parametrize("reduce_at", ["refresh", "measurement"])
def test_bytes_of_owners_by_hand(reduce_at: Any) -> None:
    """Factors to owners; back come roots where these are smaller than the gradients of an interval, else gradients."""
    common = {GRADIENTS: 28 * WORD, **SMALL, EVIDENCE: 16, Collective(reduce_at, "factors", "reduce"): 67 * WORD}
    rare = communicated(maker(preconditioner_interval=100), 4, "owners", reduce_at=reduce_at)
    roots = rare.pop(Collective("refresh", "roots", "broadcast"))
    report = (2 * 5 + 2 * 2) * WORD  # of the refresh, beside the roots
    assert rare == common and 65 * WORD < roots <= 65 * WORD + report
    often = communicated(maker(preconditioner_interval=1, warmup_steps=0), 4, "owners", reduce_at=reduce_at)
    assert often == {**common, Collective("step", "preconditioned", "all_gather"): 28 * WORD}


def test_bytes_of_shards_by_hand() -> None:
    """2 replicas x 2 shards: the gradient is 28 numbers, a shard 14, and each replica serves the owners of a half."""
    found = communicated(maker("soap"), 4, "owners", shards=2)
    here = (24 // 2 // 2 + 4 // 2 // 2) * WORD
    assert found == {
        Collective("step", "weights", "all_gather"): 2 * 28 * WORD,
        Collective("step", "gradients", "reduce_scatter"): 28 * WORD,
        GRADIENTS: 14 * WORD,
        **SMALL,
        Collective("step", "shards", "all_to_all"): 2 * here,
        Collective("step", "preconditioned", "all_gather"): 2 * here,
    }
    alone = communicated(maker("adam"), 4, "owners", shards=2)  # an element-wise method serves its own shard
    assert {k.what for k in alone} == {"weights", "gradients", "meetings", "presence"}


def test_wire_by_hand() -> None:
    """A ring of 4: each rank sends three quarters twice, to reduce and to gather."""
    assert wire("all_reduce", 80, 4) == 2 * 60 and wire("reduce_scatter", 80, 4) == wire("all_gather", 80, 4) == 60
    assert wire("reduce", 80, 4) == wire("broadcast", 80, 4) == 80


def priced(made: Any, scheme: Scheme, positions: int = 8) -> RankCost:
    return cost_of_ranks(made, Passes(0.0, positions), scheme)


def deep(method: str, **options: Any) -> Any:
    layers = [nn.Linear(600, 600, bias=False) for _ in range(16)]
    return from_config(nn.Sequential(*layers).to("meta"), {"method": method, **options})


METHOD = ("statistics", "roots", "averages", "owned")


def held(cost: RankCost) -> int:
    return sum(cost.memory.get(k, 0) for k in METHOD)


@pytest.mark.parametrize("method", ["shampoo", "soap", "muon"])
def test_what_owners_hold_and_compute_falls_with_the_world(method: str) -> None:
    made = deep(method, preconditioner_interval=1)
    alone = priced(made, Scheme())
    for world in (2, 4, 16):
        cost = priced(made, Scheme("owners", world))
        assert held(cost) == pytest.approx(held(alone) / world, rel=1e-3)
        assert sum(cost.flops.values()) == pytest.approx(sum(alone.flops.values()) / world, rel=1e-3)
        assert cost.balance == pytest.approx(1) and not cost.why


def test_memory_against_traffic() -> None:
    """K-FAC's averages are on every rank, or on owners alone if they are reduced there ten times as often."""
    made = deep("kfac", curvature_interval=1, preconditioner_interval=10)
    local, owned = (priced(made, Scheme("owners", 16, reduce_at=at, results="gradients")) for at in ("refresh", "measurement"))
    assert local.memory["statistics"] == 16 * (2 * 600**2 + 2) * WORD and owned.memory["statistics"] == 0
    kinds = [Collective(at, "factors", "reduce") for at in ("refresh", "measurement")]
    assert owned.traffic.bytes[kinds[1]] == local.traffic.bytes[kinds[0]] == 16 * (2 * 600**2 + 2) * WORD
    assert local.memory["evidence"] == (2 * 600**2 + 2) * WORD
    assert priced(made, Scheme("replicated", 16)).memory["evidence"] == 16 * local.memory["evidence"]
    assert owned.traffic.wire[kinds[1]] == pytest.approx(10 * local.traffic.wire[kinds[0]])
    roots = priced(made, Scheme("owners", 16, results="roots"))
    assert roots.memory["roots"] >= 16 * 2 * 600**2 * WORD and local.memory["roots"] == 0
    assert roots.flops["application"] == 16 * 4 * 600**3 and local.flops["application"] == 0


def test_one_layer_on_many_ranks_is_cut_by_sides_and_said() -> None:
    made = from_config(nn.Linear(2000, 600, bias=False).to("meta"), {"method": "shampoo", "preconditioner_interval": 100})
    cost = priced(made, Scheme("owners", 4, results="roots"))
    assert cost.assignment is not None and sorted(p.path for p in cost.assignment.owners) == [(0,), (1,)]
    assert cost.why.startswith("factor 1 of weight, which cannot be cut, keeps 4 ranks at 3.9")
    gradients = priced(made, Scheme("owners", 4, results="gradients"))
    assert gradients.why == "weight, which cannot be cut, keeps 4 ranks at 4.0 times their mean"


def test_flops_of_measurements_by_hand() -> None:
    """K-FAC adds ``2 d^2`` for each position and side, on every rank; Shampoo forms ``G G^T`` and ``G^T G`` on the owner."""
    for world in (1, 4):
        cost = priced(maker(curvature_interval=5), Scheme("owners" if world > 1 else "replicated", world), positions=8)
        assert cost.flops["measurement"] == 8 * 2 * (4**2 + 7**2) / 5
    gathered = maker("ekfac", curvature_interval=1)
    of_all = priced(gathered, Scheme("replicated", 4), positions=8)  # every rank folds the rows of all
    assert of_all.flops["measurement"] == 4 * 8 * 2 * (4**2 + 7**2) and of_all.memory["evidence"] == 5 * 8 * (6 + 4) * WORD
    assert priced(gathered, Scheme("owners", 4), positions=8).flops["measurement"] == 0
    assert priced(maker("shampoo"), Scheme("owners", 4)).flops["measurement"] == 0
    assert priced(maker("shampoo"), Scheme()).flops["measurement"] == 2 * (4 * 4 * 6 + 6 * 6 * 4) + 2 * 4 * 4


def test_seconds() -> None:
    cost = priced(deep("shampoo"), Scheme("owners", 4))
    assert cost.seconds(1e9, 1e6) == pytest.approx(sum(cost.flops.values()) / 1e9 + cost.sent / 1e6)


def test_passes() -> None:
    """Three times the forward pass, by positions: axes of a batch but that of features, and all axes of integers."""
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 4)).to("meta")
    assert passes_of(model, torch.zeros(2, 5, dtype=torch.long, device="meta")) == Passes(3 * 2 * 10 * 24.0, 10)
    assert passes_of(model[1], torch.zeros(8, 6, device="meta")) == Passes(3 * 2 * 8 * 24.0, 8)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"name": "owner"}, "did you mean 'owners'"),
        ({"name": "owners", "world": 4, "shards": 3}, "shards=3: expected a divisor of world=4"),
        ({"world": 4, "shards": 2}, "'replicated' needs whole gradients on every rank"),
        ({"results": "root"}, "did you mean 'roots'"),
        ({"reduce_at": "step"}, "refresh, measurement"),
        ({"world": 0}, "world=0: expected an integer of at least 1"),
    ],
)
def test_schemes_that_are_none_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Scheme(**options)


def test_seven_billion_parameters_take_less_than_a_minute() -> None:
    from gradmaker.compare.plan_report import plan_report

    wide = {"method": "shampoo", "max_dim": 40000, "label": "wide"}
    start = thread_time()
    text = plan_report("examples.large_shapes:llama_7b", ["kfac", wide], 64, "8x8", memory=24, bandwidth=50, flops=300)
    assert thread_time() - start < 30
    assert "6,738,415,616 parameters on 64 ranks (8 replicas x 8 shards)" in text
    told = r"kfac, owners: 29\.\d GiB do not fit into 24 GiB; most of it is statistics on every rank, 22\.1 GiB; "
    assert re.search(told + r"preset='large' fits", text)
    (line,) = (line for line in text.splitlines() if line.startswith("wide, owners: 2"))
    assert "factor 0 of 0.weight (side 32000) takes 3.81 GiB alone; preset='large' fits" in line
