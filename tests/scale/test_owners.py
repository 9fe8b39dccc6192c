"""Blocks with one owner each: equal to one process, each matrix factorised once, memory that falls, states of all owners."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist

import gradmaker as gm
from tests.scale import owners, replicas, sharded
from tests.scale.test_replicas import FLOORS, REFUSED, SIGNS, error, same

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo is not in this build")

FAST = ["kfac", "ekfac", "shampoo", "one_sided", "adam", "soap", "muon", "full_adagrad", "smw_ng", "tnt", "adahessian"]
FAST += ["lbfgs"]
COUNTED = ["kfac", "ekfac", "shampoo", "one_sided"]
SAVED = ["kfac", "ekfac", "adam", "shampoo"]
LOOPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "kfac": ({"method": "kfac", "damping": 0.1}, {}),
    "kfac, zeroed in place": ({"method": "kfac", "damping": 0.1}, {"set_to_none": False}),
    "clip": ({"method": "kfac", "damping": 0.1, "clip": 1e-3, "clip_learning_rate": 0.01}, {}),
    "front door": ({"method": "kfac", "damping": 0.1}, {"front": True}),
    "front door, shampoo": ({"method": "one_sided"}, {"front": True}),
    "adam": ({"method": "adam"}, {}),
}
FORMED = ["kfac", "shampoo", "adam", "soap"]
SHARDED = ["kfac", "ekfac", "shampoo", "adam", "muon"]


def all_of(rank: int, world: int, folder: str) -> dict[Any, Any]:
    attempt = replicas.attempt
    found: dict[Any, Any] = {name: attempt(owners.trajectory, {"method": name}, rank, world) for name in FAST}
    found |= {("saved", name): attempt(owners.saved, {"method": name}, rank, world, folder) for name in SAVED}
    found |= {("sharded", n): attempt(owners.trajectory, {"method": n}, rank, world, (world,)) for n in SHARDED}
    for name, (options, more) in LOOPS.items():
        found["loop", name] = attempt(lambda o=options, m=more: sharded.attached(o, rank, (world,), owners=True, **m))
    found |= {("formed", n): attempt(owners.formed, {"method": n}, rank, world) for n in FORMED}
    found["folder"] = folder
    return found


def slow_of(rank: int, world: int, folder: str) -> dict[Any, Any]:
    attempt = replicas.attempt
    found: dict[Any, Any] = {name: attempt(owners.trajectory, {"method": name}, rank, world) for name in FAST}
    return found | {("sharded", n): attempt(owners.trajectory, {"method": n}, rank, world, (2, 2)) for n in SHARDED}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return replicas.spawned(4, tmp_path_factory.mktemp("owners4"), slow_of)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return replicas.spawned(2, tmp_path_factory.mktemp("owners"), all_of)


def check_method(found_of: list[dict[Any, Any]], name: str, world: int) -> None:
    if name in REFUSED or name == "gradient":
        assert all(isinstance(result[name], str) for result in found_of) or name == "gradient"
        return
    for result in found_of:
        assert not isinstance(result[name], str), result[name]
    found = same([{name: result[name][0]} for result in found_of], name)
    alone = owners.trajectory({"method": name}, None, world)[0]
    if name not in SIGNS:
        assert error(found, alone) < FLOORS.get(name, 1e-10)


@pytest.mark.parametrize("name", FAST)
def test_methods(two: list[dict[Any, Any]], name: str) -> None:
    check_method(two, name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_methods_on_four_ranks(four: list[dict[Any, Any]], name: str) -> None:
    check_method(four, name, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kfac", "ekfac", "shampoo", "adam", "muon"])
def test_with_replicas_of_sharded_weights(four: list[dict[Any, Any]], name: str) -> None:
    found = same(four, ("sharded", name))
    assert error(found, owners.trajectory({"method": name}, None, 4, (2, 2))) < FLOORS.get(name, 1e-10)


@pytest.mark.parametrize("name", COUNTED)
def test_each_matrix_is_factorised_by_one_rank(two: list[dict[Any, Any]], name: str) -> None:
    _, whole, counted, _ = owners.trajectory({"method": name}, None, 2)
    total: Counter[str] = Counter()
    for result in two:
        total.update(result[name][2])
    assert dict(total) == counted and sum(counted.values())
    shares = [result[name][1] for result in two]
    assert sum(shares) == whole and max(shares) < 0.75 * whole
    assert [set(result[name][3]) for result in two] == [{0}, {1}]


@pytest.mark.parametrize("name", SAVED)
def test_a_state_of_owners_loads_in_one_process_and_in_owners(two: list[dict[Any, Any]], name: str) -> None:
    went_on, resumed = same(two, ("saved", name))
    assert error(resumed, went_on) == 0
    weights, state = torch.load(f"{two[0]['folder']}/owners_{name}.pt", weights_only=True)
    model = replicas.net()
    model.load_state_dict(weights)
    maker: Any = gm.from_config(model, {"method": name})
    maker.load_state_dict(state)
    assert error(owners.steps(maker, model, None, 2, 3, 6), went_on) < 1e-10


@pytest.mark.parametrize("name", SHARDED)
def test_with_sharded_weights(two: list[dict[Any, Any]], name: str) -> None:
    found = same(two, ("sharded", name))
    assert error(found, owners.trajectory({"method": name}, None, 2, (2,))) < FLOORS.get(name, 1e-10)


@pytest.mark.parametrize("name", LOOPS)
def test_loops_with_sharded_weights(two: list[dict[Any, Any]], name: str) -> None:
    options, more = LOOPS[name]
    alone = sharded.attached(options, None, (), more.get("front", False))
    assert error(same(two, ("loop", name)), alone) < 1e-10


@pytest.mark.parametrize("name", FORMED)
def test_a_rank_that_is_no_owner_forms_no_whole_gradient(two: list[dict[Any, Any]], name: str) -> None:
    for result in two:
        assert not isinstance(result["formed", name], str), result["formed", name]
        assert all(own == formed for own, formed in result["formed", name]), result["formed", name]
    assert {own for result in two for own, _ in result["formed", name]} == {True, False}


def test_owners_are_set_before_the_first_step() -> None:
    model = replicas.net()
    maker: Any = gm.from_config(model, {"method": "adam"})
    replicas.declare(maker, model, *replicas.batch(0))
    maker.forward_and_backward()
    with pytest.raises(RuntimeError, match="before the first step"):
        maker.owners = True
