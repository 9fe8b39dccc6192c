"""Models that `fully_shard` (FSDP2) has sharded are one process with the whole batch: methods, loops, meshes, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from tests.scale import replicas, sharded
from tests.scale.test_replicas import FLOORS, METHODS, SIGNS, error, same

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo is not in this build")

REFUSED = {
    "newton": "Hessian",
    "saddle_free": "Hessian",
    "neumann": "Hessian",
    "adahessian": "HessianProbe",
    "esgd": "HessianProbe",
    "psgd": "HessianProbe",
    "psgd_kf": "HessianProbe",
    "saddle_free_diagonal": "HessianProbe",
    "hessian_free": "GaussNewton",
    "ksd": "GaussNewton",
    "lissa": "GaussNewton",
    "curveball": "GaussNewton",
    "lbfgs": "Secant",
    "kbfgs": "LayerSecant",
    "kbfgs_l": "LayerSecant",
    "neumann_practical": "DisplacedGradient",
    "kfra": "FSDPLinear",
}
"""Methods that need the weights themselves, with the name in the refusal."""
MORE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "uneven, kfac": ({"method": "kfac"}, {"small": False}),
    "uneven, shampoo": ({"method": "shampoo"}, {"small": False}),
    "not resharded": ({"method": "kfac"}, {"reshard_after_forward": False}),
    "micro-batches": ({"method": "kfac"}, {"parts": 2}),
    "micro-batches, adam": ({"method": "adam"}, {"parts": 2}),
    "groups": ({"method": "kfac", "groups": {"0*": "ekfac", "2*": "shampoo", "*": "kfac"}}, {}),
    "clip": ({"method": "kfac", "clip": 1e-3, "clip_learning_rate": 0.01}, {}),
}
LOOPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "kfac": ({"method": "kfac", "damping": 0.1}, {}),
    "kfac, not resharded": ({"method": "kfac", "damping": 0.1}, {"reshard_after_forward": False}),
    "kfac, checkpointed": ({"method": "kfac", "damping": 0.1}, {"checkpointed": True}),
    "kfac, zeroed in place": ({"method": "kfac", "damping": 0.1}, {"set_to_none": False}),
    "adam": ({"method": "adam"}, {}),
    "muon": ({"method": "muon"}, {}),
    "front door": ({"method": "kfac", "damping": 0.1}, {"front": True}),
    "front door, adam": ({"method": "adam"}, {"front": True}),
}
TIED = ["kfac", "shampoo"]
SLOW = ["kfac", "ekfac", "shampoo", "adam", "muon", "smw_ng", "unit_ng", "kl_shampoo"]


def all_of(rank: int, world: int, folder: str) -> dict[Any, Any]:
    dims, attempt = (world,), replicas.attempt
    found = {name: attempt(sharded.declared, {"method": name}, rank, dims) for name in METHODS}
    for name, (options, more) in MORE.items():
        found["more", name] = attempt(lambda o=options, m=more: sharded.declared(o, rank, dims, **m))
    for name, (options, more) in LOOPS.items():
        found["loop", name] = attempt(lambda o=options, m=more: sharded.attached(o, rank, dims, **m))
    half = {"method": "kfac", "likelihood": "categorical", "damping": 0.1}
    found["half"] = attempt(lambda: sharded.attached(half, rank, dims, mp_policy=sharded.HALF))
    found |= {("tied", name): attempt(sharded.tied, {"method": name}, rank, dims) for name in TIED}
    found["refused"] = attempt(sharded.refused, rank, dims)
    return found


def slow_of(rank: int, world: int, folder: str) -> dict[Any, Any]:
    attempt = replicas.attempt
    found = {(dims, name): attempt(sharded.declared, {"method": name}, rank, dims) for dims in ((4,), (2, 2)) for name in SLOW}
    for name, (options, more) in LOOPS.items():
        found["loop", name] = attempt(lambda o=options, m=more: sharded.attached(o, rank, (2, 2), **m))
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return replicas.spawned(2, tmp_path_factory.mktemp("sharded"), all_of)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return replicas.spawned(4, tmp_path_factory.mktemp("meshes"), slow_of)


@pytest.mark.parametrize("name", METHODS)
def test_methods(two: list[dict[Any, Any]], name: str) -> None:
    if name in REFUSED:
        assert all(REFUSED[name] in result[name] and "Error: " in result[name] for result in two), two[0][name]
        return
    found, alone = same(two, name), sharded.declared({"method": name}, None, ())
    if name not in SIGNS:
        assert error(found, alone) < FLOORS.get(name, 1e-10)


@pytest.mark.parametrize("name", MORE)
def test_options(two: list[dict[Any, Any]], name: str) -> None:
    options, more = MORE[name]
    more = {k: v for k, v in more.items() if k in ("small", "parts")}
    limit = 1e-8 if "shampoo" in name else 1e-10
    assert error(same(two, ("more", name)), sharded.declared(options, None, (), **more)) < limit


@pytest.mark.parametrize("name", LOOPS)
def test_loops(two: list[dict[Any, Any]], name: str) -> None:
    options, more = LOOPS[name]
    assert error(same(two, ("loop", name)), sharded.attached(options, None, (), more.get("front", False))) < 1e-10


def test_mixed_precision(two: list[dict[Any, Any]]) -> None:
    half = {"method": "kfac", "likelihood": "categorical", "damping": 0.1}
    assert error(same(two, "half"), sharded.attached(half, None, ())) < 2e-2


@pytest.mark.parametrize("name", TIED)
def test_tied_weights(two: list[dict[Any, Any]], name: str) -> None:
    assert error(same(two, ("tied", name)), sharded.tied({"method": name}, None, ())) < 1e-9


@pytest.mark.parametrize(
    ("what", "words"),
    [("products", "Hessian"), ("weights", "DisplacedGradient"), ("divided", "set_gradient_divide_factor")],
)
def test_refusals(two: list[dict[Any, Any]], what: str, words: str) -> None:
    for result in two:
        assert words in result["refused"][what] and "fully_shard" in result["refused"][what]


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("dims", [(4,), (2, 2)])
def test_four_ranks(four: list[dict[Any, Any]], dims: tuple[int, ...], name: str) -> None:
    assert error(same(four, (dims, name)), sharded.declared({"method": name}, None, ())) < FLOORS.get(name, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_loops_of_four_ranks(four: list[dict[Any, Any]], name: str) -> None:
    options, more = LOOPS[name]
    assert error(same(four, ("loop", name)), sharded.attached(options, None, (), more.get("front", False))) < 1e-10
